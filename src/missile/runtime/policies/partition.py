"""`partition`: one static split of the SMs, LS tenants on one side and BE tenants on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from missile.errors import MisuseError, UnsupportedError
from missile.gpu.interface import GpuInfo, Level, Priority
from missile.runtime.policies._common import latency_first, part_of, start_all
from missile.runtime.policies.interface import Action, Lane, Layout, Snapshot
from missile.runtime.tenant import Tenant

__all__ = ["PartitionPolicy"]


class PartitionPolicy:
    """ls_share: share of the SMs for all LS tenants together, in (0, 1), rounded to what the GPU can split.

    Tenants of one side have a stream each on its SMs. With tenants of one class only there is nothing to split: they
    get the whole GPU.
    """

    name: ClassVar[str] = "partition"
    summary: ClassVar[str] = "one static split of the SMs, LS tenants on one side and BE tenants on the other."

    def __init__(self, ls_share: float = 0.25) -> None:
        if not 0.0 < ls_share < 1.0:
            raise MisuseError(f"Policy 'partition': ls_share must lie between 0 and 1, not {ls_share:g}.")
        self.ls_share = ls_share
        self._order: tuple[int, ...] = ()

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        self._order = latency_first(tenants)
        if len({tenant.latency_sensitive for tenant in tenants}) < 2:
            return Layout(tuple(Lane(f"stream of {tenant.name}, all SMs") for tenant in tenants))
        if info.level < Level.PARTITIONS:
            raise UnsupportedError(f"Policy 'partition' needs SM partitions, which {info.name} does not have.")
        ls = part_of(self.ls_share, info)
        sides = (ls, info.sms - ls)
        lanes = []
        for tenant in tenants:
            side = 0 if tenant.latency_sensitive else 1
            lanes.append(Lane(f"stream of {tenant.name} on {sides[side]} SMs", Priority.LOW, side))
        # The second side is the remainder of the first: it needs no multiple of the granularity.
        return Layout(tuple(lanes), partitions=(ls,))

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        return start_all(snapshot, self._order)
