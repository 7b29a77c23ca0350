"""The bench loop: every tenant alone, then all of them under each policy, on the same arrivals, several times over.

Solo runs come first (objectives and ratios stand on them). Then each repeat goes through all policies before the next
begins: a drift of the GPU meets every policy alike, and what an interruption leaves is balanced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from missile.bench.environment import describe_environment
from missile.bench.results import SCHEMA, Results, Run, TenantInfo
from missile.bench.scenario import Scenario, describe_arrivals
from missile.bench.summary import latencies_ms, percentile
from missile.errors import MissileError, UnsupportedError
from missile.gpu.interface import GpuInfo
from missile.runtime.records import RunRecord
from missile.runtime.tenant import Tenant
from missile.workloads.models import MODELS, default_batch

__all__ = ["Bench", "Planned", "Step", "Testbed", "is_planned", "run_all"]

# Switches of `missile` that leave its shares to the planner; "" where it has no option at all.
_SWITCHES = frozenset({"", "colors", "elastic", "preempt", "copies", "admission"})
_PLANNING_SEED = 1_000_003  # plans are tried on other arrivals than those they are judged by
_FEWEST_ALONE = 20  # requests: of fewer, the longest says nothing


class Testbed(Protocol):
    """One GPU with the scenario's models at hand. What the bench needs of the runtime."""

    @property
    def info(self) -> GpuInfo: ...
    def describe(self, policy: str) -> str:
        """What `policy` (a name, or a name with options) does, in a sentence. MisuseError names the known ones."""

    def solo(self, tenant: Tenant, *, seed: int, duration_ns: int, warmup_ns: int) -> RunRecord:
        """Run `tenant` alone on the whole GPU."""

    def shared(
        self, tenants: tuple[Tenant, ...], policy: str, *, seed: int, duration_ns: int, warmup_ns: int
    ) -> RunRecord:
        """Run all `tenants` under `policy`. The same seed gives the same arrivals as in `solo`."""

    def prepare(self, tenants: tuple[Tenant, ...], policies: tuple[str, ...]) -> None:
        """Told that such runs follow: make what takes time once for all of them. Never needed."""

    def plan(self, tenants: tuple[Tenant, ...], *, seed: int, solos: Mapping[str, RunRecord]) -> Planned | None:
        """What the planner of `missile` chooses for `tenants`, tried on arrivals of `seed`; None: there is no planner here.

        solos: each tenant's run alone, by name.
        """


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan: the policy to run, and all that is to be said of it (`Results.plan`)."""

    policy: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One run of the plan: `what` is the tenant's name (solo) or the policy's."""

    kind: Literal["solo", "policy"]
    what: str
    repeat: int

    def __str__(self) -> str:
        what = f"{self.what} alone" if self.kind == "solo" else self.what
        return f"{what}, repeat {self.repeat + 1}"


@dataclass
class Bench:
    """A bench run in progress. `execute` its `steps` in order; `results()` says at any time what is there so far.

    plan: what `missile` runs with where its shares are the planner's; made when first needed unless it is given.
    Construction raises MisuseError (UnsupportedError) when the scenario names a policy that is unknown (planned).
    """

    scenario: Scenario
    testbed: Testbed
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    environment: dict[str, Any] = field(init=False)
    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: Planned | None = None
    _policies: dict[str, str] = field(init=False)
    _skipped: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._policies = {policy: self.testbed.describe(policy) for policy in self.scenario.policies}
        self.environment = describe_environment(self.testbed.info)

    @property
    def steps(self) -> tuple[Step, ...]:
        repeats = range(self.scenario.repeats)
        solo = [Step("solo", tenant.name, repeat) for repeat in repeats for tenant in self.scenario.tenants]
        shared = [Step("policy", policy, repeat) for repeat in repeats for policy in self.scenario.policies]
        return (*solo, *shared)

    def execute(self, step: Step) -> None:
        """Run one step and keep what it measured, also when a fault or Ctrl-C ended it early, which then raises.

        A policy that this GPU can't run is noted and left out; other errors are the caller's.
        """
        if step.what in self._skipped and step.kind == "policy":
            return
        scenario = self.scenario
        seed = scenario.seed + step.repeat
        duration_ns, warmup_ns = round(scenario.duration_s * 1e9), round(scenario.warmup_s * 1e9)
        if step.kind == "solo":
            tenant = next(tenant for tenant in scenario.tenants if tenant.name == step.what)
            policy = "solo"
            record = self.testbed.solo(tenant, seed=seed, duration_ns=duration_ns, warmup_ns=warmup_ns)
        else:
            policy = step.what
            try:
                tenants = tuple(self._with_objective(tenant) for tenant in scenario.tenants)
                chosen = policy
                if is_planned(policy):
                    chosen = self._planned(policy, tenants)
                    tenants = tuple(self._with_copy_weight(tenant) for tenant in tenants)
                record = self.testbed.shared(tenants, chosen, seed=seed, duration_ns=duration_ns, warmup_ns=warmup_ns)
            except UnsupportedError as error:
                self._skipped.add(policy)
                self.notes.append(f"Policy {policy} was left out: {error}")
                return
        self.runs.append(Run.from_record(record, kind=step.kind, policy=policy, repeat=step.repeat))
        if record.fault:
            raise MissileError(_with_suspects(record))
        if record.interrupted:
            raise KeyboardInterrupt
        self.notes += [note for note in record.notes if note not in self.notes]

    def _planned(self, policy: str, tenants: tuple[Tenant, ...]) -> str:
        """What is run for `policy`, which is `missile` with no shares of its own: what the planner chose."""
        options = policy.partition(":")[2]
        if self.plan is None:
            solos = {
                run.tenants[0].name: run.record() for run in reversed(self.runs) if run.kind == "solo" and run.whole
            }
            self.plan = self.testbed.plan(tenants, seed=self.scenario.seed + _PLANNING_SEED, solos=solos)
        if self.plan is None:
            return policy
        chosen = self.plan.policy
        return f"{chosen}{',' if ':' in chosen else ':'}{options}" if options else chosen

    def results(self, *, interrupted: bool = False) -> Results:
        info = self.testbed.info
        return Results(
            schema=SCHEMA,
            created=self.created,
            simulated=info.simulated,
            gpu=info.name,
            device=info.device,
            interrupted=interrupted,
            environment=self.environment,
            scenario=self.scenario,
            policies=self._policies,
            tenants=[self._tenant_info(tenant) for tenant in self.scenario.tenants],
            runs=self.runs,
            notes=self.notes,
            plan=None if self.plan is None else self.plan.data,
        )

    def _objective(self, tenant: Tenant) -> tuple[float | None, str]:
        """The tenant's objective, ms, as far as it is known by now, and where it comes from.

        Of too few requests alone for a p99 the longest stands for it; of fewer than 20, nothing does.
        """
        if tenant.slo_factor is None:
            return tenant.slo_ms, f"{tenant.slo_ms:g} ms" if tenant.slo_ms else ""
        alone = latencies_ms([run for run in self.runs if run.kind == "solo" and run.whole], tenant.name)
        if (solo_p99 := percentile(alone, 99)) is not None:
            return tenant.slo_factor * solo_p99, f"{tenant.slo_factor:g} × solo p99"
        if len(alone) < _FEWEST_ALONE:
            return None, f"{tenant.slo_factor:g} × solo p99"
        return tenant.slo_factor * max(alone), f"{tenant.slo_factor:g} × the longest of {len(alone)} solo requests"

    def _with_objective(self, tenant: Tenant) -> Tenant:
        """`tenant` with its objective in ms, which is what policies go by."""
        if tenant.slo_factor is None or (slo_ms := self._objective(tenant)[0]) is None:
            return tenant
        return tenant.model_copy(update={"slo_ms": slo_ms, "slo_factor": None})

    def _with_copy_weight(self, tenant: Tenant) -> Tenant:
        """`tenant` with the plan's weight on the link, unless it was given one."""
        weights = {} if self.plan is None else self.plan.data.get("copy_weights", {})
        if tenant.copy_weight is not None or tenant.name not in weights:
            return tenant
        return tenant.model_copy(update={"copy_weight": weights[tenant.name]})

    def _tenant_info(self, tenant: Tenant) -> TenantInfo:
        slo_ms, slo_text = self._objective(tenant)
        return TenantInfo(
            name=tenant.name,
            tenant_class=tenant.tenant_class.value,
            model=tenant.model,
            batch=tenant.batch or (default_batch(tenant.model) if tenant.model in MODELS else 1),
            arrivals=describe_arrivals(tenant.arrivals),
            slo_ms=slo_ms,
            slo_text=slo_text,
        )


def is_planned(policy: str) -> bool:
    """Whether it is `missile` with no shares of its own."""
    name, _, options = policy.partition(":")
    return name == "missile" and {part.partition("=")[0].strip() for part in options.split(",")} <= _SWITCHES


def _with_suspects(record: RunRecord) -> str:
    """The fault that ended the run, in a sentence that names the tenant, or those of which one is to blame."""
    suspects = [repr(tenant.name) for tenant in record.tenants if record.fault in tenant.error]
    if not suspects or any(name in record.fault for name in suspects):
        return record.fault
    return f"Tenant {' or '.join(suspects)} ended the run: {record.fault}"


def run_all(
    bench: Bench, on_step: Callable[[int, Step], None]
) -> tuple[Results, KeyboardInterrupt | MissileError | None]:
    """Execute every step, calling `on_step(index, step)` before each.

    Returns the results, and what stopped the run early (None: nothing did). Whatever stopped it, the runs before it are
    in the results.
    """
    stopped: KeyboardInterrupt | MissileError | None = None
    try:
        for index, step in enumerate(bench.steps):
            on_step(index, step)
            bench.execute(step)
    except KeyboardInterrupt as interrupt:
        stopped = interrupt
        bench.notes.append("The run was interrupted; what had been measured by then is kept.")
    except MissileError as error:
        stopped = error
        bench.notes.append(f"The run stopped early: {error}")
    return bench.results(interrupted=stopped is not None), stopped
