"""What a policy is: it lays out lanes once, then answers each snapshot with actions. Pure: no clock, no GPU, no chance.

The engine calls `decide` after every arrival and every completion, on the request path: a policy looks at a few small
sequences and returns. It may keep state of its own, as long as the same snapshots give the same actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from missile.gpu.interface import GpuInfo, Priority
from missile.runtime.tenant import Tenant

__all__ = ["Action", "Lane", "Layout", "Policy", "Snapshot", "Start"]


@dataclass(frozen=True, slots=True)
class Lane:
    """A stream that requests run on, one after another.

    partition: index into `Layout.partitions`, their number for the remainder of the split, or None for the whole GPU.
    """

    name: str
    priority: Priority = Priority.LOW
    partition: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """lanes: made once before the run. partitions: SMs of each part of one disjoint split; empty for no split.

    The engine makes nothing later: a policy that changes a tenant's share while running lays out a lane for each share.
    """

    lanes: tuple[Lane, ...]
    partitions: tuple[int, ...] = ()


@dataclass(slots=True)
class Snapshot:
    """What the engine knows now. Sequences are indexed by tenant (in `setup`'s order); a policy only reads them.

    now_ns: since the run's start. queued: requests that have arrived and were not started. running: started and not
    finished. oldest_ns: arrival of the oldest queued request (undefined where queued is 0). depth: how many requests of
    each tenant may be in flight at once; the engine refuses more.
    """

    now_ns: int
    queued: Sequence[int]
    running: Sequence[int]
    oldest_ns: Sequence[int]
    depth: Sequence[int]


class Start(NamedTuple):
    """Run the oldest queued request of tenant number `tenant` on lane number `lane`."""

    tenant: int
    lane: int


Action = Start
"""What a policy can ask for. Policies that work by kernels will add actions of their own."""


class Policy(Protocol):
    """Made by `policies.create_policy`; one object serves one run."""

    @property
    def name(self) -> str: ...

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        """Called once, before the first `decide`. UnsupportedError when this GPU can't do it, MisuseError when the
        options don't fit it."""

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        """What to start now, in order. An empty answer means wait for the next arrival or completion."""
