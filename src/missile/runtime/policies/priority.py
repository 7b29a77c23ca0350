"""`priority`: streams with priorities. Pending blocks of an LS kernel go before pending blocks of BE kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from missile.errors import UnsupportedError
from missile.gpu.interface import GpuInfo, Level, Priority
from missile.runtime.policies._common import latency_first, start_all
from missile.runtime.policies.interface import Action, Lane, Layout, Snapshot
from missile.runtime.tenant import Tenant

__all__ = ["PriorityPolicy"]


class PriorityPolicy:
    """Starts everything at once, LS on high-priority streams. Running blocks are never displaced."""

    name: ClassVar[str] = "priority"
    summary: ClassVar[str] = (
        "streams with priorities. Pending blocks of an LS kernel go before pending blocks of BE kernels."
    )

    def __init__(self) -> None:
        self._order: tuple[int, ...] = ()

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        if info.level < Level.PRIORITIES:
            raise UnsupportedError(f"Policy 'priority' needs stream priorities, which {info.name} does not have.")
        self._order = latency_first(tenants)
        return Layout(
            tuple(
                Lane(f"high-priority stream of {tenant.name}", Priority.HIGH)
                if tenant.latency_sensitive
                else Lane(f"low-priority stream of {tenant.name}")
                for tenant in tenants
            )
        )

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        return start_all(snapshot, self._order)
