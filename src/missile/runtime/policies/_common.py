"""What the policies that start requests as they come have in common."""

from __future__ import annotations

from collections.abc import Sequence

from missile.errors import UnsupportedError
from missile.gpu.interface import GpuInfo
from missile.runtime.policies.interface import Action, Snapshot, Start
from missile.runtime.tenant import Tenant

__all__ = ["latency_first", "part_of", "start_all"]


def latency_first(tenants: Sequence[Tenant]) -> tuple[int, ...]:
    """Tenant numbers, LS before BE, heavier before lighter, else in the given order."""
    return tuple(sorted(range(len(tenants)), key=lambda i: (not tenants[i].latency_sensitive, -tenants[i].weight)))


def start_all(snapshot: Snapshot, order: Sequence[int]) -> list[Action]:
    """Start whatever is queued and may be in flight, tenant i on lane i, in `order`."""
    starts: list[Action] = []
    for tenant in order:
        room = snapshot.depth[tenant] - snapshot.running[tenant]
        starts += [Start(tenant, tenant)] * min(room, snapshot.queued[tenant])
    return starts


def part_of(share: float, info: GpuInfo) -> int:
    """`share` of the SMs to the nearest multiple that can be split off, leaving as much for the other side."""
    unit, least = max(info.sm_granularity, 1), max(info.sm_minimum, 1)
    lowest = -(-least // unit) * unit
    highest = (info.sms - least) // unit * unit
    if highest < lowest:
        raise UnsupportedError(f"{info.name} has {info.sms} SMs: too few to split in parts of at least {least}.")
    return min(max(round(share * info.sms / unit) * unit, lowest), highest)
