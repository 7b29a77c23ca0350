"""What a policy is: it lays out lanes once, then answers each snapshot with actions. Pure: no clock, no GPU, no chance.

The engine calls `decide` after every arrival and every completion, on the request path: a policy looks at a few small
sequences and returns. It may keep state of its own, as long as the same snapshots give the same actions.

Most policies start whole requests (`Start`). One that works below a request says in its layout which tenants' models are
to be cut into segments, learns the cut in `brief`, and starts requests piece by piece (`Advance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from missile.gpu.interface import GpuInfo, Priority
from missile.gpu.work import KernelWork
from missile.runtime.tenant import Tenant

__all__ = [
    "Action",
    "Advance",
    "BriefedPolicy",
    "Lane",
    "Layout",
    "Policy",
    "Preempt",
    "Reject",
    "ReplanningPolicy",
    "Segment",
    "Snapshot",
    "Start",
    "TenantBrief",
    "Wake",
]


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

    segment_ns: by tenant, how long a segment of its model should take alone, ns; 0.0 for one kernel to a segment, None for
    a tenant whose requests are started whole. Empty: all of them are.

    The engine makes nothing later: a policy that changes a tenant's share while running lays out a lane for each share.
    """

    lanes: tuple[Lane, ...]
    partitions: tuple[int, ...] = ()
    segment_ns: tuple[float | None, ...] = ()


class Segment(NamedTuple):
    """Consecutive operations [first, last) of a model, which are started as one.

    expected_ns: how long they take alone on the whole GPU. works: of each operation, None where it was never profiled.
    """

    first: int
    last: int
    expected_ns: float
    works: tuple[KernelWork | None, ...]


@dataclass(frozen=True, slots=True)
class TenantBrief:
    """What was found about one tenant's model before the clock started.

    service_ns: by lane, the shortest time from start to end of a request that ran alone there, ns.
    segments: the cut that the layout asked for; one segment with everything where it asked for none.
    preemptible: its kernels check a flag, so `Preempt` stops it; else `Preempt` does nothing.
    exclusive: its weights wait on the host and share their place on the device with others': while a cut request of one such
    tenant is open, work of another between its segments would have the weights copied twice.
    """

    service_ns: tuple[float, ...]
    segments: tuple[Segment, ...]
    preemptible: bool = False
    exclusive: bool = False


@dataclass(slots=True)
class Snapshot:
    """What the engine knows now. Sequences are indexed by tenant (in `setup`'s order); a policy only reads them.

    now_ns: since the run's start. queued: requests that have arrived and were not started. running: started and not
    finished. oldest_ns: arrival of the oldest queued request (undefined where queued is 0). depth: how many requests of
    each tenant may be in flight at once; the engine refuses more.

    Of tenants that are cut: `launched`, how many segments of the started request that is not wholly with the GPU were
    given to it (0: there is no such request, the next `Advance` starts one); `pending`, how many segments, of all its
    requests, the GPU has not finished. stopping: a preempted tenant's work has not left the GPU yet; it can't be advanced.
    """

    now_ns: int
    queued: Sequence[int]
    running: Sequence[int]
    oldest_ns: Sequence[int]
    depth: Sequence[int]
    launched: Sequence[int] = ()
    pending: Sequence[int] = ()
    stopping: Sequence[bool] = ()


class Start(NamedTuple):
    """Run the oldest queued request of tenant number `tenant` on lane number `lane`."""

    tenant: int
    lane: int


class Advance(NamedTuple):
    """Give the GPU the next `segments` segments of a cut tenant's request on lane `lane`; starts the oldest queued one when
    no started one has segments left. They run after the tenant's former ones, whatever their lanes. At most those left of
    the one request, and `stage.MOST_PIECES` advances of a tenant in flight.

    after: tenants whose requests, as far as the GPU has them, end first: it waits for that, not the host, and goes on at
    once when their kernels have ended (output copies may still be under way)."""

    tenant: int
    lane: int
    segments: int = 1
    after: tuple[int, ...] = ()


class Preempt(NamedTuple):
    """Stop what a preemptible tenant has on the GPU: blocks that run end, others leave.

    When all have left (`Snapshot.stopping` is False again), `launched` is back at the first segment that is not whole, or
    the request is queued again where that is its first; `Advance` then runs what is missing of it. Nothing happens where
    the tenant has nothing pending or is not preemptible. The tenant must not have two requests in flight.
    """

    tenant: int


class Reject(NamedTuple):
    """Refuse the oldest queued request of `tenant`, whose arrivals must not depend on completions."""

    tenant: int


class Wake(NamedTuple):
    """Call `decide` again at `at_ns` even if nothing happens until then. The earliest one asked for holds."""

    at_ns: int


Action = Start | Advance | Preempt | Reject | Wake
"""What a policy can ask for."""


class Policy(Protocol):
    """Made by `policies.create_policy`; one object serves one run."""

    @property
    def name(self) -> str: ...

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        """Called once, before the first `decide`. UnsupportedError when this GPU can't do it, MisuseError when the
        options don't fit it."""

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        """What to start now, in order. An empty answer means wait for the next arrival or completion."""


@runtime_checkable
class BriefedPolicy(Protocol):
    """A policy that wants to know the tenants' models."""

    def brief(self, tenants: Sequence[TenantBrief]) -> None:
        """Called once, between `setup` and the first `decide`."""


@runtime_checkable
class ReplanningPolicy(Protocol):
    """A policy that changes its plan while it runs."""

    @property
    def changes(self) -> Sequence[tuple[int, str]]:
        """When (ns since the run's start) and what, in order."""
