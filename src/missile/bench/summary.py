"""What a bench run says: percentiles, ratios to solo and shares, computed from the raw samples. Pure.

The rules, which the report repeats in words:

- Percentiles are over the requests of all repeats together; the spread is the smallest and largest value of one repeat.
- A percentile is given only where at least one sample lies beyond it (p99 from 100 samples, p99.9 from 1000 on).
- A request that was rejected, or that had not finished when the run ended, counts as one that missed its objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.bench.results import Results, Run, TenantInfo
from missile.statistics import nearest_rank, supports

__all__ = [
    "ALONE",
    "BeSummary",
    "LsSummary",
    "PolicySummary",
    "Spread",
    "Summary",
    "latencies_ms",
    "percentile",
    "summarize",
]

Samples = npt.NDArray[np.float64]

ALONE = "alone"  # what stands for a policy in the rows of solo runs


@dataclass(frozen=True, slots=True)
class Spread:
    """A value over all repeats, and the smallest and largest value that one repeat gave."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LsSummary:
    """An LS tenant under one policy. Times in ms; None where there are too few samples (or no solo run) to say.

    queueing: arrival to first kernel running; service: from there to the output on the host.
    over_solo: p99 divided by the tenant's solo p99. attainment: share of requests within the objective, 0 to 1.
    over_solo_of_all: the same with requests that were rejected or lost counted as slower than all; None where they are
    more than 1%.
    """

    tenant: str
    n: int
    p50: float | None
    p95: float | None
    p99: Spread | None
    p999: float | None
    queueing_p99: float | None
    service_p99: float | None
    over_solo: float | None
    attainment: float | None
    lost: int  # rejected or unfinished
    over_solo_of_all: float | None = None


@dataclass(frozen=True, slots=True)
class BeSummary:
    """A BE tenant under one policy. rate: finished requests (batches)/s; share: rate divided by the solo rate."""

    tenant: str
    rate: Spread
    share: Spread | None


@dataclass(frozen=True, slots=True)
class PolicySummary:
    """All tenants under one policy.

    ls_over_solo: geometric mean over the LS tenants of p99 / solo p99.
    be_share: sum over the BE tenants of rate / solo rate (1.0: as much as one of them alone on the GPU).
    """

    policy: str
    repeats: int
    ls: tuple[LsSummary, ...]
    be: tuple[BeSummary, ...]
    ls_over_solo: float | None
    be_share: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """solo: each tenant alone, in the tenants' order; policies: in the order in which they were asked for."""

    solo_ls: tuple[LsSummary, ...]
    solo_be: tuple[BeSummary, ...]
    policies: tuple[PolicySummary, ...]

    def ls_rows(self) -> Iterator[tuple[str, int, LsSummary]]:
        """Every LS row as (policy, its place among that policy's rows, row); the tenants alone come first."""
        for policy, rows in ((ALONE, self.solo_ls), *((p.policy, p.ls) for p in self.policies)):
            yield from ((policy, index, row) for index, row in enumerate(rows))

    def be_rows(self) -> Iterator[tuple[str, int, BeSummary]]:
        """The same for BE."""
        for policy, rows in ((ALONE, self.solo_be), *((p.policy, p.be) for p in self.policies)):
            yield from ((policy, index, row) for index, row in enumerate(rows))


def percentile(samples: Samples, q: float) -> float | None:
    """The `q`-th percentile (0 to 100) by the nearest rank; None when no sample would lie beyond it."""
    return _percentile_of_any(samples, q) if supports(len(samples), q / 100) else None


def _percentile_of_any(samples: Samples, q: float) -> float:
    """The same of any number of samples from 1 on."""
    rank = nearest_rank(len(samples), q / 100)
    return float(np.partition(samples, rank)[rank])


def latencies_ms(runs: Sequence[Run], tenant: str) -> Samples:
    """Latency of every finished request of `tenant` in `runs`, ms."""
    return _pooled(runs, tenant, "arrival", "done")


def summarize(results: Results) -> Summary:
    """Everything that the table and the report show."""
    solo_runs = {tenant.name: _runs(results, "solo", tenant.name) for tenant in results.tenants}
    ls = [tenant for tenant in results.tenants if tenant.tenant_class == "LS"]
    be = [tenant for tenant in results.tenants if tenant.tenant_class == "BE"]
    solo_ls = tuple(_ls(tenant, solo_runs[tenant.name], None) for tenant in ls if solo_runs[tenant.name])
    solo_be = tuple(_be(tenant, solo_runs[tenant.name], None) for tenant in be if solo_runs[tenant.name])
    solo_p99 = {s.tenant: s.p99.value for s in solo_ls if s.p99}
    solo_rate = {s.tenant: s.rate.value for s in solo_be}
    policies = []
    for policy in results.scenario.policies:
        runs = _runs(results, "policy", policy)
        if runs:
            policies.append(
                _policy(
                    policy,
                    runs,
                    tuple(_ls(tenant, runs, solo_p99.get(tenant.name)) for tenant in ls),
                    tuple(_be(tenant, runs, solo_rate.get(tenant.name)) for tenant in be),
                )
            )
    return Summary(solo_ls, solo_be, tuple(policies))


def _runs(results: Results, kind: str, what: str) -> list[Run]:
    """The whole runs of a kind, of one tenant (solo) or policy."""
    whole = [run for run in results.runs if run.kind == kind and run.whole]
    if kind == "solo":
        return [run for run in whole if run.tenants and run.tenants[0].name == what]
    return [run for run in whole if run.policy == what]


def _policy(policy: str, runs: list[Run], ls: tuple[LsSummary, ...], be: tuple[BeSummary, ...]) -> PolicySummary:
    ratios = [s.over_solo for s in ls]
    shares = [s.share.value if s.share else None for s in be]
    known_ratios = [r for r in ratios if r is not None]
    known_shares = [s for s in shares if s is not None]
    return PolicySummary(
        policy=policy,
        repeats=len(runs),
        ls=ls,
        be=be,
        ls_over_solo=math.exp(float(np.mean(np.log(known_ratios))))
        if known_ratios and len(known_ratios) == len(ratios)
        else None,
        be_share=sum(known_shares) if known_shares and len(known_shares) == len(shares) else None,
    )


def _ls(tenant: TenantInfo, runs: list[Run], solo_p99: float | None) -> LsSummary:
    latency = latencies_ms(runs, tenant.name)
    p99 = percentile(latency, 99)
    # One repeat may be too short for a p99 of its own; its largest latency then stands in the spread, which is no estimate.
    each = [_percentile_of_any(part, 99) for run in runs if len(part := latencies_ms([run], tenant.name))]
    records = [record for run in runs for record in run.tenants if record.name == tenant.name]
    lost = sum(record.rejected + record.unfinished for record in records)
    total = len(latency) + lost
    p99_of_all = None if p99 is None else _p99_with_lost(latency, lost)
    return LsSummary(
        tenant=tenant.name,
        n=len(latency),
        p50=percentile(latency, 50),
        p95=percentile(latency, 95),
        p99=None if p99 is None else Spread(p99, min(each), max(each)),
        p999=percentile(latency, 99.9),
        queueing_p99=percentile(_pooled(runs, tenant.name, "arrival", "start"), 99),
        service_p99=percentile(_pooled(runs, tenant.name, "start", "done"), 99),
        over_solo=p99 / solo_p99 if p99 is not None and solo_p99 else None,
        attainment=float(np.count_nonzero(latency <= tenant.slo_ms)) / total if tenant.slo_ms and total else None,
        lost=lost,
        over_solo_of_all=p99_of_all / solo_p99 if p99_of_all is not None and solo_p99 else None,
    )


def _p99_with_lost(latency: Samples, lost: int) -> float | None:
    """The p99 of these and `lost` more that are longer than all; None where it is one of those."""
    rank = nearest_rank(len(latency) + lost, 0.99)
    return float(np.partition(latency, rank)[rank]) if rank < len(latency) else None


def _be(tenant: TenantInfo, runs: list[Run], solo_rate: float | None) -> BeSummary:
    records = [(run, record) for run in runs for record in run.tenants if record.name == tenant.name]
    rates = [len(record.done_ns) / run.span_s for run, record in records] or [0.0]
    rate = Spread(float(np.mean(rates)), min(rates), max(rates))
    share = Spread(rate.value / solo_rate, rate.low / solo_rate, rate.high / solo_rate) if solo_rate else None
    return BeSummary(tenant.name, rate, share)


def _pooled(runs: Sequence[Run], tenant: str, since: str, until: str) -> Samples:
    parts = [
        np.asarray(getattr(record, f"{until}_ns"), np.float64) - np.asarray(getattr(record, f"{since}_ns"), np.float64)
        for run in runs
        for record in run.tenants
        if record.name == tenant
    ]
    return np.concatenate(parts) / 1e6 if parts else np.empty(0)
