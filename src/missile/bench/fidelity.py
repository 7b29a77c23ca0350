"""How far the simulator is from hardware: a measured scenario run again on a simulated GPU, figure by figure.

Pure but for `simulate`, which runs the scenario.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from missile.bench.results import Results, Run
from missile.bench.run import Bench, Planned, Step, Testbed, is_planned, run_all
from missile.bench.scenario import Scenario
from missile.bench.summary import PolicySummary, Summary
from missile.bench.testbed import describe_policy, open_testbed
from missile.errors import MisuseError
from missile.runtime.records import TenantRecord

__all__ = [
    "Comparison",
    "compare",
    "host_factor",
    "rank_by_be",
    "rank_by_p99",
    "service_factors",
    "simulate",
    "tabulate_error",
]

Figure = Literal["p50", "p99", "rate"]
CLOSE = 1.2  # within 20%


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of one tenant under one policy. p50 and p99 in ms, rate in requests/s; `neighbours`: who ran beside it."""

    policy: str
    tenant: str
    neighbours: str
    figure: Figure
    measured: float
    simulated: float

    @property
    def ratio(self) -> float:
        return self.simulated / self.measured

    @property
    def close(self) -> bool:
        """Within 20%, either way."""
        return 1 / CLOSE <= self.ratio <= CLOSE


@runtime_checkable
class _HasHost(Protocol):
    """A simulated GPU whose host thread can be slower, and whose tenants' kernels can take another time."""

    def slow_host(self, factor: float) -> None: ...

    def pace_kernels(self, tenant: str, factor: float) -> None: ...


def simulate(measured: Results, device: str, *, duration_s: float | None = None, repeats: int | None = None) -> Results:
    """Run the scenario of `measured` on the simulated GPU `device`. Raises what `open_testbed` and the runs raise.

    `missile` runs as the plan that was measured says, and not at all where that has options of another version. What calls
    cost the host is scaled to that session's host: by how long LS tenants' requests waited for it alone, measured over
    simulated. Each tenant's kernels are scaled to what a request takes alone: chips and sessions differ. No other measured
    figure is used.
    """
    changes: dict[str, object] = {"device": device}
    if duration_s is not None:
        changes["duration_s"] = duration_s
    if repeats is not None:
        changes["repeats"] = repeats
    plan = None if measured.plan is None else Planned(str(measured.plan["policy"]), measured.plan)
    notes: list[str] = []
    if plan is not None:
        try:
            describe_policy(plan.policy)
        except MisuseError as error:
            changes["policies"] = tuple(policy for policy in measured.scenario.policies if not is_planned(policy))
            notes.append(f"What was planned then is left out: {error}")
    scenario = measured.scenario.model_copy(update=changes)
    with open_testbed(scenario) as testbed:
        if isinstance(testbed.gpu, _HasHost):
            for name, factor in service_factors(measured.runs, _alone(scenario, testbed)).items():
                testbed.gpu.pace_kernels(name, factor)
            # After that: where kernels take longer than they should, requests wait for each other and not for the host.
            testbed.gpu.slow_host(host_factor(measured.runs, _alone(scenario, testbed, ls_only=True)))
        results, stopped = run_all(Bench(scenario, testbed, plan=plan), lambda *_: None)
    if stopped is not None:
        raise stopped
    return results.model_copy(update={"notes": [*results.notes, *notes]})


def _alone(scenario: Scenario, testbed: Testbed, *, ls_only: bool = False) -> Sequence[Run]:
    """Every tenant alone, once."""
    alone = Bench(scenario, testbed)
    for tenant in scenario.tenants:
        if tenant.latency_sensitive or not ls_only:
            alone.execute(Step("solo", tenant.name, 0))
    return alone.runs


def host_factor(measured: Sequence[Run], simulated: Sequence[Run]) -> float:
    """How much slower the measured session's host is than the simulated one: the median over LS tenants alone of the median
    times from arrival to launch, over one another. 1.0 where no tenant says."""
    ratios = _ratios_alone(measured, simulated, lambda row: row.dispatch - row.arrival)
    return float(np.median([*ratios.values()])) if ratios else 1.0


def service_factors(measured: Sequence[Run], simulated: Sequence[Run]) -> dict[str, float]:
    """By tenant: how long a request's kernels take alone, from the first one's start to the last one's end, the measured
    median over the simulated one."""
    return _ratios_alone(measured, simulated, lambda row: row.end - row.start)


def _ratios_alone(
    measured: Sequence[Run], simulated: Sequence[Run], times: Callable[[TenantRecord], npt.NDArray[np.int64]]
) -> dict[str, float]:
    here, there = (_medians_alone(runs, times) for runs in (simulated, measured))
    return {name: there[name] / here[name] for name in here if here[name] > 0 and there.get(name, 0) > 0}


def _medians_alone(runs: Sequence[Run], times: Callable[[TenantRecord], npt.NDArray[np.int64]]) -> dict[str, float]:
    """By tenant whose arrivals depend on nothing, ns. A closed loop's requests wait for one another."""
    found: dict[str, float] = {}
    for run in runs:
        if run.kind == "solo" and run.whole and len(run.tenants[0].arrival_ns):
            row = run.tenants[0].record()
            found.setdefault(row.name, float(np.median(times(row))))
    return found


def compare(measured: Summary, simulated: Summary) -> list[Comparison]:
    """Every figure that both have: LS p50 and p99, BE rate, under each policy (not alone)."""
    found = []
    mine = {policy.policy: policy for policy in simulated.policies}
    for policy in measured.policies:
        if (other := mine.get(policy.policy)) is None:
            continue
        names = [*(row.tenant for row in policy.ls), *(row.tenant for row in policy.be)]
        for ls, ls_there in zip(policy.ls, other.ls, strict=True):
            beside = ", ".join(name for name in names if name != ls.tenant)
            if ls.p50 and ls_there.p50:
                found.append(Comparison(policy.policy, ls.tenant, beside, "p50", ls.p50, ls_there.p50))
            if ls.p99 and ls_there.p99:
                found.append(Comparison(policy.policy, ls.tenant, beside, "p99", ls.p99.value, ls_there.p99.value))
        for be, be_there in zip(policy.be, other.be, strict=True):
            beside = ", ".join(name for name in names if name != be.tenant)
            if be.rate.value and be_there.rate.value:
                found.append(Comparison(policy.policy, be.tenant, beside, "rate", be.rate.value, be_there.rate.value))
    return found


def rank_by_p99(summary: Summary, tenant: str) -> list[str]:
    """Policies by the LS tenant's p99, best first; those without enough samples for one are left out."""
    found = [
        (row.p99.value, policy.policy)
        for policy in summary.policies
        for row in policy.ls
        if row.tenant == tenant and row.p99
    ]
    return [policy for _, policy in sorted(found)]


def rank_by_be(summary: Summary) -> list[str]:
    """Policies by BE work done (the sum over BE tenants of rate / solo rate), most first."""

    def work(policy: PolicySummary) -> float:
        return policy.be_share or 0.0

    return [policy.policy for policy in sorted(summary.policies, key=work, reverse=True)]


def tabulate_error(comparisons: Iterable[Comparison]) -> str:
    """A Markdown table by policy and figure: how many, mean ratio, spread, how many within 20%; then the outliers."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in comparisons:
        groups.setdefault((one.policy, one.figure), []).append(one)
    lines = ["| policy | figure | n | simulated / measured, geometric mean | rms factor | within 20% |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for (policy, figure), group in groups.items():
        logs = np.log([one.ratio for one in group])
        mean, rms = np.exp(logs.mean()), np.exp(np.sqrt(np.square(logs).mean()))
        close = int((np.abs(logs) <= np.log(CLOSE)).sum())
        lines.append(f"| {policy} | {figure} | {len(group)} | {mean:.2f} | {rms:.2f} | {close} |")
    return "\n".join([*lines, "", *_outliers([one for group in groups.values() for one in group])]) + "\n"


def _outliers(comparisons: Sequence[Comparison], most: int = 10) -> list[str]:
    """The figures that are furthest off, worst first."""

    def distance(one: Comparison) -> float:
        return float(abs(np.log(one.ratio)))

    far = (one for one in comparisons if distance(one) > np.log(CLOSE))
    worst = sorted(far, key=distance, reverse=True)[:most]
    rows = [
        f"| {one.policy} | {one.tenant} | {one.neighbours} | {one.figure} | {one.measured:.3g} | {one.simulated:.3g} |"
        for one in worst
    ]
    head = ["Furthest off:", "", "| policy | tenant | beside | figure | measured | simulated |"]
    return [*head, "| --- | --- | --- | --- | ---: | ---: |", *rows] if rows else []
