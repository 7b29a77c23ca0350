"""One direction of the link at work: the tenants' queues, and the chunks that the GPU has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from missile.errors import GpuError, MissileError
from missile.gpu.interface import Event, Gpu, HostBuffer, Stream
from missile.pcie.flight import Flight, LinkTiming, is_lost
from missile.pcie.policy import FairLink, Pick
from missile.pcie.request import Chunk, Request
from missile.pcie.staging import Piece, StagingRing
from missile.pcie.ticket import CopyState, Direction
from missile.pcie.weights import Share

__all__ = ["ChunkRecord", "Lane", "LaneStats"]

_POLL_NS = 20_000  # how often something is looked at that has no expected time: an event, a host copy
_NEVER = 1 << 62
_PIECES_AHEAD = 3  # pinned pieces that one copy may hold before their turn


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


class Lane:
    """Driven by the engine's thread only.

    depth: chunks that the GPU may have at once; latency-sensitive tenants may add as many beyond them.
    bypass: latency-sensitive copies of at most so many bytes go on a stream of their own.
    """

    def __init__(
        self,
        gpu: Gpu,
        direction: Direction,
        fair: FairLink,
        staging: StagingRing,
        timing: LinkTiming,
        *,
        depth: int,
        bypass: int,
    ) -> None:
        self.direction = direction
        self.fair = fair
        self.stats: dict[str, LaneStats] = {}
        self.on_chunk: Callable[[ChunkRecord], None] | None = None
        self._depth = depth
        self._bypass = bypass
        self._staging = staging
        self._flight = Flight(gpu, timing)
        self._queues: dict[str, deque[Request]] = {}
        self._unready: set[str] = set()  # tenants whose next copy waits for an event or for the host
        self._landing: list[tuple[Request, Piece]] = []  # host copies on their way, of pieces that the GPU is done with

    # --- tenants and copies

    def admit(self, tenant: str, share: Share) -> None:
        self.fair.admit(tenant, share)
        self._queues[tenant] = deque()
        self.stats.setdefault(tenant, LaneStats())

    def remove(self, tenant: str, now_ns: int) -> None:
        """Cancel what the tenant has queued and forget it. What the GPU has of it arrives."""
        for request in list(self._queues[tenant]):
            request.end(CopyState.CANCELLED)
            self._settle(request, now_ns)
        self.fair.remove(tenant)
        self._unready.discard(tenant)
        del self._queues[tenant]

    def submit(self, request: Request, now_ns: int) -> None:
        queue = self._queues[request.ticket.tenant]
        queue.append(request)
        if len(queue) == 1:
            self._refresh(request.ticket.tenant, now_ns)

    def cancel_all(self, now_ns: int) -> None:
        for tenant, queue in self._queues.items():
            for request in queue:
                request.end(CopyState.CANCELLED)
            self._refresh(tenant, now_ns)

    def queued(self, tenant: str) -> int:
        """Bytes of the tenant not yet given to the GPU (0 when it is not registered)."""
        return sum(request.remaining for request in tuple(self._queues.get(tenant, ())))

    @property
    def busy(self) -> bool:
        return bool(self._flight.nbytes or self._landing or any(self._queues.values()))

    # --- the reactor's part

    def step(self, now_ns: int) -> int | None:
        """See what arrived, give the GPU what it should have next. Returns when to step again; None when idle."""
        if self._flight.nbytes:
            for chunk, failure in self._flight.arrivals():
                self._arrived(chunk, now_ns, failure)
        if self._landing:
            self._collect(now_ns)
        if self._unready:
            for tenant in tuple(self._unready):
                self._refresh(tenant, now_ns)
        if self.fair.awake_count:
            self._fill(now_ns)
        elif not (self._flight.nbytes or self._landing or self._unready):
            return None
        return self._deadline(now_ns)

    def events(self) -> list[Event]:
        """What the next step may be waiting for."""
        return self._flight.heads() + [
            queue[0].after for tenant in self._unready if (queue := self._queues[tenant]) and queue[0].after is not None
        ]

    def drop_cancelled(self, now_ns: int) -> None:
        """End the queued copies that were asked to be cancelled, wherever they stand in their queue."""
        for tenant, queue in self._queues.items():
            dropped = [request for request in queue if request.ticket.cancel_requested]
            for request in dropped:
                queue.remove(request)
                request.end(CopyState.CANCELLED)
                self._settle(request, now_ns)
            if dropped:
                self._refresh(tenant, now_ns)

    def abandon(self, error: GpuError, now_ns: int) -> None:
        """The GPU is lost: end everything with `error`."""
        flying = self._flight.abandon()
        queued = [request for queue in self._queues.values() for request in queue]
        landing = [request for request, _ in self._landing]
        self._landing.clear()
        for request in (*flying, *queued, *landing):
            request.flying = request.landing = 0
            request.pieces.clear()
            request.end(CopyState.FAILED, error)
            self._settle(request, now_ns)
        for tenant, queue in self._queues.items():
            queue.clear()
            self.fair.sleep(tenant, now_ns)
        self._unready.clear()

    def close(self) -> None:
        self._flight.close()

    # --- arrivals

    def _arrived(self, chunk: Chunk, now_ns: int, failure: MissileError | None) -> None:
        request, nbytes = chunk.request, chunk.nbytes
        ticket = request.ticket
        request.flying -= 1
        if failure is not None:
            request.end(CopyState.FAILED, failure)
        else:
            ticket.copied += nbytes
            self.stats[ticket.tenant].bytes += nbytes
            if self.on_chunk is not None:
                self.on_chunk(ChunkRecord(ticket.tenant, self.direction, nbytes, chunk.issued_ns, now_ns))
        if chunk.piece is not None:
            self._unstage(request, chunk.piece)
        if request.over and not request.flying:
            self._settle(request, now_ns)

    def _unstage(self, request: Request, piece: Piece) -> None:
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
        request.ticket.finish(state, now_ns, request.error)

    # --- readiness

    def _refresh(self, tenant: str, now_ns: int) -> None:
        """Bring the policy's idea of the tenant (awake or not) up to date with its queue."""
        queue = self._queues[tenant]
        while queue:
            request = queue[0]
            if request.ticket.cancel_requested:
                request.end(CopyState.CANCELLED)
            if not request.over:
                break
            queue.popleft()
            self._settle(request, now_ns)
        if not queue:
            self._unready.discard(tenant)
            self.fair.sleep(tenant, now_ns)
        elif self._ready(queue[0]):
            self._unready.discard(tenant)
            self.fair.wake(tenant, now_ns)
        else:
            self._unready.add(tenant)
            self.fair.sleep(tenant, now_ns)

    def _ready(self, request: Request) -> bool:
        if request.after is not None:
            if not request.after.done():
                return False
            request.after = None
        if request.pageable is None:
            return True
        if self.direction is Direction.D2H:
            return self._staging.available > 0
        self._stage(request)
        return bool(request.pieces) and request.pieces[0].ready

    def _stage(self, request: Request) -> None:
        assert request.pageable is not None
        largest = self.fair.largest_piece(request.ticket.tenant)
        while request.staged < request.ticket.nbytes and len(request.pieces) < _PIECES_AHEAD:
            piece = self._staging.take(request.staged, min(largest, request.ticket.nbytes - request.staged))
            if piece is None:
                return
            self._staging.fill(piece, request.pageable)
            request.pieces.append(piece)
            request.staged += piece.nbytes

    # --- issuing

    def _fill(self, now_ns: int) -> None:
        granularity = self.fair.granularity
        while True:
            short = self.fair.latency_sensitive_registered
            solo = self.fair.awake_count < 2
            window = self._depth * (granularity.short if short else granularity.solo if solo else granularity.shared)
            full = self._flight.nbytes >= window
            if full and not (short and self.fair.latency_sensitive_awake):
                return
            pick = self.fair.pick(now_ns)
            if pick is None:
                return
            # A latency-sensitive copy queues behind the window at once: waiting for room would only add our own delay.
            if full and not (pick.latency_sensitive and self._flight.nbytes < 2 * window):
                return
            self._issue(pick, now_ns)

    def _issue(self, pick: Pick, now_ns: int) -> None:
        queue = self._queues[pick.tenant]
        request = queue[0]
        ticket = request.ticket
        if ticket.cancel_requested or request.ending is not None:
            self._refresh(pick.tenant, now_ns)
            return
        nbytes = min(pick.quantum, request.remaining)
        piece = None
        if request.pageable is not None:
            if self.direction is Direction.H2D:
                piece = request.pieces.popleft()
                nbytes = piece.nbytes
            else:
                piece = self._staging.take(request.issued, nbytes)
                if piece is None:  # another tenant has just taken the last buffer
                    self._refresh(pick.tenant, now_ns)
                    return
                nbytes = piece.nbytes
        urgent = pick.latency_sensitive and nbytes == request.remaining
        overtakes = pick.latency_sensitive and ticket.nbytes <= self._bypass

        def copy(stream: Stream) -> None:
            self._enqueue(stream, request, nbytes, piece)

        try:
            event = self._flight.give(
                request, nbytes, copy, piece=piece, urgent=urgent, overtakes=overtakes, now_ns=now_ns
            )
        except MissileError as error:
            if piece is not None:
                self._staging.give_back(piece)
            if is_lost(error):
                raise
            request.end(CopyState.FAILED, error)
            self._refresh(pick.tenant, now_ns)
            return
        self.fair.charge(pick, nbytes)
        request.flying += 1
        request.issued += nbytes
        if ticket.state is CopyState.QUEUED:
            ticket.state = CopyState.COPYING
            ticket.issued_ns = now_ns
            self.stats[pick.tenant].waiting_ns += now_ns - ticket.submitted_ns
        if request.over:
            ticket.mark_issued(event)
        if request.over or request.pageable is not None:
            self._refresh(pick.tenant, now_ns)

    def _enqueue(self, stream: Stream, request: Request, nbytes: int, piece: Piece | None) -> None:
        host: HostBuffer
        if piece is not None:
            host, offset = piece.buffer, 0
        else:
            assert request.pinned is not None
            host, offset = request.pinned, request.offset + request.issued
        if self.direction is Direction.H2D:
            stream.copy_to_device(request.device + request.issued, host, offset=offset, nbytes=nbytes)
        else:
            stream.copy_to_host(host, request.device + request.issued, offset=offset, nbytes=nbytes)

    def _deadline(self, now_ns: int) -> int | None:
        deadline = self._flight.deadline(now_ns)
        if self._unready or self._landing:
            deadline = min(deadline or _NEVER, now_ns + _POLL_NS)
        if (eligible := self.fair.next_eligible(now_ns)) is not None:
            deadline = min(deadline or _NEVER, max(eligible, now_ns + 1))
        return deadline
