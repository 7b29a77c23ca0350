"""What the policies that start requests as they come have in common."""

from __future__ import annotations

from collections.abc import Sequence

from missile.runtime.policies.interface import Action, Snapshot, Start
from missile.runtime.tenant import Tenant

__all__ = ["latency_first", "start_all"]


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
