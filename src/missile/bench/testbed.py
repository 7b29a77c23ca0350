"""The bench's testbed on a real or simulated GPU: the models stay loaded from run to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace

from missile.bench.run import Planned
from missile.bench.scenario import Scenario
from missile.bench.variants import ModelVariants
from missile.compiler.objective import Objective
from missile.errors import MissileError, UnsupportedError
from missile.gpu import open_gpu, resolve
from missile.gpu.interface import Gpu, GpuInfo
from missile.runtime.explanation import explain, plan_data
from missile.runtime.loading import LoadedTenant, Roster, load_tenants
from missile.runtime.mps import MpsPool, MpsSettings, is_mps
from missile.runtime.planning import plan_tenants
from missile.runtime.policies import create_policy, policy_summaries
from missile.runtime.records import RunRecord
from missile.runtime.run import run, solo
from missile.runtime.tenant import Tenant

__all__ = ["GpuTestbed", "open_testbed", "trial_length"]

# Of each candidate of a plan: longer where that is too short for the LS tenants' requests to have a tail.
_TRIAL_NS, _LONGEST_TRIAL_NS = 400_000_000, 1_000_000_000
_TRIAL_REQUESTS = 200


@dataclass(slots=True)
class GpuTestbed:
    """A GPU with a scenario's tenants loaded. `why`: why `auto` chose this device, "" when it was named.

    Tenants are found by name: one that is run may have other arrivals, objectives or weights than the one loaded. Owns what
    single policies need (processes for `mps`, other code for `missile`), which is made when one is first asked
    for; `close` ends that. GPU and roster stay the caller's.
    """

    gpu: Gpu
    roster: Roster
    why: str = ""
    seed: int = 0
    overlap: Objective | None = Objective.ALONE
    _variants: ModelVariants = field(init=False)
    _pool: MpsPool | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._variants = ModelVariants(self.gpu, self.roster, self.overlap)

    @property
    def info(self) -> GpuInfo:
        return self.gpu.info

    def describe(self, policy: str) -> str:
        return describe_policy(policy)

    def solo(self, tenant: Tenant, *, seed: int, duration_ns: int, warmup_ns: int) -> RunRecord:
        return solo(
            self.gpu, self._view([tenant]), tenant.name, seed=seed, duration_ns=duration_ns, warmup_ns=warmup_ns
        )

    def shared(
        self, tenants: Sequence[Tenant], policy: str, *, seed: int, duration_ns: int, warmup_ns: int
    ) -> RunRecord:
        if is_mps(policy):
            if hosted := [tenant.name for tenant in tenants if tenant.hosted]:
                raise UnsupportedError(
                    f"tenant {hosted[0]!r} keeps its weights on the host, and processes don't share the memory for them."
                )
            return self._processes().run(tenants, policy, seed=seed, duration_ns=duration_ns, warmup_ns=warmup_ns)
        variant = self._variants.of(policy)
        view = self._view(tenants, () if variant is None else variant.roster.tenants)
        record = run(self.gpu, view, policy, seed=seed, duration_ns=duration_ns, warmup_ns=warmup_ns)
        refused = {} if variant is None else variant.refused
        notes = [f"Not preemptible: {refused[tenant.name]}" for tenant in tenants if tenant.name in refused]
        return replace(record, notes=(*record.notes, *notes))

    def prepare(self, tenants: Sequence[Tenant], policies: Sequence[str]) -> None:
        """Make at once what runs of `tenants` under `policies` would make one by one. What goes wrong they tell."""
        for policy in policies:
            if not is_mps(policy):
                with suppress(MissileError):
                    self._variants.of(policy)
        if chosen := [policy for policy in policies if is_mps(policy)]:
            with suppress(MissileError):
                self._processes().prepare(tenants, chosen)

    def plan(self, tenants: Sequence[Tenant], *, seed: int, solos: Mapping[str, RunRecord]) -> Planned | None:
        variant = self._variants.of("missile")
        view = self._view(tenants, () if variant is None else variant.roster.tenants)
        plan = plan_tenants(
            self.gpu, view, seed=seed, solos=solos, trial_ns=trial_length(tenants, solos), plain=self._view(tenants)
        )
        return Planned(plan.chosen.policy, {"text": explain(plan), **plan_data(plan)})

    def _processes(self) -> MpsPool:
        if self._pool is None:
            self._pool = MpsPool(self.info.device, seed=self.seed, overlap=self.overlap)
        return self._pool

    def _view(self, tenants: Sequence[Tenant], instead: Sequence[LoadedTenant] = ()) -> Roster:
        """A roster of `tenants` on the models that are loaded, or on those of `instead`. They stay their owners'."""
        loaded = {entry.tenant.name: entry for entry in (*self.roster.tenants, *instead)}
        return Roster(self.gpu, [replace(loaded[t.name], tenant=t) for t in tenants], ExitStack())

    def close(self) -> None:
        """Give back what single policies needed. Idempotent."""
        pool, self._pool = self._pool, None
        with closing(self._variants):
            if pool is not None:
                pool.close()


def trial_length(tenants: Sequence[Tenant], solos: Mapping[str, RunRecord]) -> int:
    """How long a candidate is tried, ns: until the LS tenant with the fewest requests has about 200, but at most 1 s."""
    rates = [
        len(record.tenants[0].done) / max(record.duration_ns - record.warmup_ns, 1)
        for tenant in tenants
        if tenant.latency_sensitive and (record := solos.get(tenant.name)) is not None
    ]
    fewest = min(rates, default=0.0)
    wanted = _TRIAL_REQUESTS / fewest if fewest else 0.0
    return round(min(max(wanted, _TRIAL_NS), _LONGEST_TRIAL_NS))


def describe_policy(policy: str) -> str:
    """What `policy` (a name, or a name with options) does. MisuseError or UnsupportedError as `create_policy`."""
    name, _, options = policy.partition(":")
    if is_mps(policy):
        MpsSettings.parse(policy)
        text = "every tenant in a process of its own under NVIDIA's MPS, each with its share of the SMs."
    else:
        create_policy(policy)
        text = policy_summaries()[name]
    return text[:1].upper() + text[1:] + (f" Here with {options}." if options else "")


@contextmanager
def open_testbed(scenario: Scenario, on_load: Callable[[str], None] | None = None) -> Iterator[GpuTestbed]:
    """Open the scenario's device and load its tenants; `on_load` is told each tenant's name before it is loaded.

    Policies are checked before the device is touched. Raises what `open_gpu` and `load_tenants` raise.
    """
    for policy in scenario.policies:
        describe_policy(policy)
    device, why = resolve(scenario.device)
    with (
        open_gpu(device, seed=scenario.seed) as gpu,
        load_tenants(
            gpu, scenario.tenants, progress=on_load, swap_bytes=scenario.swap_bytes, overlap=scenario.objective
        ) as roster,
    ):
        testbed = GpuTestbed(gpu, roster, why, scenario.seed, scenario.objective)
        with closing(testbed):
            yield testbed
