"""`streams`: every tenant on a stream of its own, all alike. What one gets by doing nothing about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from missile.gpu.interface import GpuInfo
from missile.runtime.policies._common import latency_first, start_all
from missile.runtime.policies.interface import Action, Lane, Layout, Snapshot
from missile.runtime.tenant import Tenant

__all__ = ["StreamsPolicy"]


class StreamsPolicy:
    """Starts everything at once; the hardware shares the SMs as it likes."""

    name: ClassVar[str] = "streams"
    summary: ClassVar[str] = "every tenant on a stream of its own, all alike. What one gets by doing nothing about it."

    def __init__(self) -> None:
        self._order: tuple[int, ...] = ()

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        self._order = latency_first(tenants)
        return Layout(tuple(Lane(f"stream of {tenant.name}") for tenant in tenants))

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        return start_all(snapshot, self._order)
