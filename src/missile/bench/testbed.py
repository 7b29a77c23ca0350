"""The bench's testbed on a real or simulated GPU: the models stay loaded from run to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from missile.bench.scenario import Scenario
from missile.gpu import open_gpu, resolve
from missile.gpu.interface import Gpu, GpuInfo
from missile.runtime.loading import Roster, load_tenants
from missile.runtime.policies import create_policy, policy_summaries
from missile.runtime.records import RunRecord
from missile.runtime.run import run, solo
from missile.runtime.tenant import Tenant

__all__ = ["GpuTestbed", "open_testbed"]


@dataclass(frozen=True, slots=True)
class GpuTestbed:
    """A GPU with a scenario's tenants loaded. `why`: why `auto` chose this device, "" when it was named."""

    gpu: Gpu
    roster: Roster
    why: str = ""

    @property
    def info(self) -> GpuInfo:
        return self.gpu.info

    def describe(self, policy: str) -> str:
        return describe_policy(policy)

    def solo(self, tenant: Tenant, *, seed: int, duration_ns: int, warmup_ns: int) -> RunRecord:
        return solo(self.gpu, self.roster, tenant.name, seed=seed, duration_ns=duration_ns, warmup_ns=warmup_ns)

    def shared(
        self, tenants: Sequence[Tenant], policy: str, *, seed: int, duration_ns: int, warmup_ns: int
    ) -> RunRecord:
        names = {tenant.name for tenant in tenants}
        # A view: the testbed's roster owns the models.
        chosen = Roster(
            self.gpu, [loaded for loaded in self.roster.tenants if loaded.tenant.name in names], ExitStack()
        )
        return run(self.gpu, chosen, policy, seed=seed, duration_ns=duration_ns, warmup_ns=warmup_ns)


def describe_policy(policy: str) -> str:
    """What `policy` (a name, or a name with options) does. MisuseError or UnsupportedError as `create_policy`."""
    name, _, options = policy.partition(":")
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
    with open_gpu(device, seed=scenario.seed) as gpu, load_tenants(gpu, scenario.tenants, progress=on_load) as roster:
        yield GpuTestbed(gpu, roster, why)
