"""One direction of the link: the tenants' copies in order, what becomes of each, and pageable memory's part of the way.

Two kinds give chunks to the GPU: `paced.PacedLane`, from Python, on any GPU; `native.NativeLane`, in C, where there is a
driver and a compiler.
"""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from missile.errors import GpuError
from missile.gpu.interface import Event, Gpu, Stream
from missile.pcie.policy import FairLink
from missile.pcie.request import Request
from missile.pcie.staging import Piece, StagingRing
from missile.pcie.ticket import CopyState, Direction
from missile.pcie.weights import Share

__all__ = ["POLL_NS", "ChunkRecord", "Lane", "LaneStats", "LaneVitals"]

POLL_NS: Final = 20_000  # how often something is looked at that has no expected time: an event, a host copy
_PIECES_AHEAD: Final = 3  # pinned pieces that one copy may hold before their turn


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """One chunk that arrived. Times in ns on the GPU's clock: given to the GPU, seen to have arrived."""

    tenant: str
    direction: Direction
    nbytes: int
    issued_ns: int
    done_ns: int


@dataclass(slots=True)
class LaneStats:
    """One tenant's use of one direction. waiting_ns: summed over copies, from submission to the first chunk."""

    bytes: int = 0
    copies: int = 0
    failed: int = 0
    cancelled: int = 0
    waiting_ns: int = 0


@dataclass(frozen=True, slots=True)
class LaneVitals:
    """How a lane's own thread has fared since it began: its CPU time, how often it looked, how late it was woken at worst,
    and for how long the link, by the measured rate, had nothing to do while somebody waited; ns."""

    cpu_ns: int = 0
    looks: int = 0
    late_ns: int = 0
    dry_ns: int = 0


class Lane(abc.ABC):
    """Driven by the engine's thread only."""

    def __init__(self, gpu: Gpu, direction: Direction, fair: FairLink, staging: StagingRing) -> None:
        """fair: decides, or (native) says who is registered with what share and admits."""
        self.direction = direction
        self.fair = fair
        self.stats: dict[str, LaneStats] = {}
        self._records: list[ChunkRecord] = []
        self._gpu = gpu
        self._staging = staging
        self._rescue: Stream | None = None
        self._queues: dict[str, deque[Request]] = {}
        self._landing: list[tuple[Request, Piece]] = []  # host copies on their way, of pieces that the GPU is done with

    # --- tenants and copies

    def admit(self, tenant: str, share: Share) -> None:
        self.fair.admit(tenant, share)
        self._queues[tenant] = deque()
        self.stats.setdefault(tenant, LaneStats())

    @abc.abstractmethod
    def remove(self, tenant: str, now_ns: int) -> None:
        """Cancel what the tenant has queued and forget it. What the GPU has of it arrives."""

    @abc.abstractmethod
    def submit(self, request: Request, now_ns: int) -> None: ...

    @abc.abstractmethod
    def cancel_all(self, now_ns: int) -> None: ...

    @abc.abstractmethod
    def drop_cancelled(self, now_ns: int) -> None:
        """End the queued copies that were asked to be cancelled, wherever they stand in their queue."""

    def queued(self, tenant: str) -> int:
        """Bytes of the tenant not yet given to the GPU (0 when it is not registered)."""
        return sum(request.remaining for request in tuple(self._queues.get(tenant, ())))

    @property
    @abc.abstractmethod
    def busy(self) -> bool:
        """Whether it has a copy, also one that waits for work on the GPU to end."""

    @property
    @abc.abstractmethod
    def underway(self) -> bool:
        """Whether it has a copy that goes, or could: one that waits for nothing but the link. Asks the GPU for events."""

    def vitals(self) -> LaneVitals:
        """All zero where Python does everything."""
        return LaneVitals()

    # --- the reactor's part

    @abc.abstractmethod
    def step(self, now_ns: int) -> int | None:
        """See what arrived, give the GPU what it should have next. Returns when to step again; None when idle."""

    @abc.abstractmethod
    def record_chunks(self) -> None:
        """Keep a record of every chunk that arrives from now on."""

    def recorded_chunks(self) -> list[ChunkRecord]:
        """Take the records kept so far, in the order of arrival."""
        records, self._records = self._records, []
        return records

    @abc.abstractmethod
    def events(self) -> list[Event]:
        """What the next step may be waiting for."""

    @abc.abstractmethod
    def abandon(self, error: GpuError, now_ns: int) -> None:
        """The GPU is lost: end everything with `error`."""

    def close(self) -> None:
        if self._rescue is not None:
            self._rescue.close()

    # --- for both kinds

    def _arrived(self, request: Request, nbytes: int) -> None:
        """Account for bytes that have arrived."""
        request.ticket.copied += nbytes
        self.stats[request.ticket.tenant].bytes += nbytes

    def _started(self, request: Request, now_ns: int) -> None:
        """Its first chunk has been given to the GPU."""
        ticket = request.ticket
        ticket.state = CopyState.COPYING
        ticket.issued_ns = now_ns
        self.stats[ticket.tenant].waiting_ns += now_ns - ticket.submitted_ns

    def _settle(self, request: Request, now_ns: int) -> None:
        """End a request of which nothing more will be issued, unless GPU or host are still at work on it."""
        while request.pieces:
            self._land(request, request.pieces.popleft())
        if request.flying or request.landing or request.ticket.done:
            return
        state = request.ending or CopyState.DONE
        stats = self.stats[request.ticket.tenant]
        stats.copies += state is CopyState.DONE
        stats.failed += state is CopyState.FAILED
        stats.cancelled += state is CopyState.CANCELLED
        if state is not CopyState.DONE:
            self.release(request)
        request.ticket.finish(state, now_ns, request.error)

    def release(self, request: Request) -> None:
        """Raise the latch of a copy that won't: what waits for it on the GPU would wait for ever."""
        if request.raises is None:
            return
        if self._rescue is None:
            self._rescue = self._gpu.create_stream()
        self._rescue.raise_latch(*request.raises)

    def _fail_all(self, others: Iterable[Request], error: GpuError, now_ns: int) -> None:
        """End `others`, what is queued and what is landing, whatever is under way of it."""
        queued = [request for queue in self._queues.values() for request in queue]
        landing = [request for request, _ in self._landing]
        self._landing.clear()
        for queue in self._queues.values():
            queue.clear()
        for request in (*others, *queued, *landing):
            request.raises = None
            request.flying = request.landing = 0
            request.pieces.clear()
            request.end(CopyState.FAILED, error)
            self._settle(request, now_ns)

    # --- pageable memory

    def _stage(self, request: Request) -> None:
        """Start filling pinned pieces with what comes next, as far as there are any free."""
        assert request.pageable is not None
        largest = self.fair.largest_piece(request.ticket.tenant)
        while request.staged < request.ticket.nbytes and len(request.pieces) < _PIECES_AHEAD:
            piece = self._staging.take(request.staged, min(largest, request.ticket.nbytes - request.staged))
            if piece is None:
                return
            self._staging.fill(piece, request.pageable)
            request.pieces.append(piece)
            request.staged += piece.nbytes

    def _unstage(self, request: Request, piece: Piece) -> None:
        """The GPU is done with the piece."""
        if self.direction is Direction.D2H and request.ending is None:
            assert request.pageable is not None
            self._staging.drain(piece, request.pageable)
            self._land(request, piece)
        else:
            self._staging.give_back(piece)

    def _land(self, request: Request, piece: Piece) -> None:
        request.landing += 1
        self._landing.append((request, piece))

    def _collect(self, now_ns: int) -> None:
        """Give back the pieces that the host is done with."""
        still = []
        for request, piece in self._landing:
            if not piece.ready:
                still.append((request, piece))
                continue
            self._staging.give_back(piece)
            request.landing -= 1
        ended = {id(request): request for request, _ in self._landing if not request.landing and request.over}
        self._landing = still
        for request in ended.values():
            self._settle(request, now_ns)
