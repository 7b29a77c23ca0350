"""The lane that is driven from Python, chunk by chunk, when its owner steps it: on any GPU, also a simulated one."""

from __future__ import annotations

from typing import Final

from missile.errors import GpuError, MissileError
from missile.gpu.interface import Event, Gpu, HostBuffer, Stream
from missile.pcie.flight import Flight, LinkTiming, is_lost
from missile.pcie.lane import POLL_NS, ChunkRecord, Lane
from missile.pcie.policy import FairLink, Pick
from missile.pcie.request import Chunk, Request
from missile.pcie.staging import Piece, StagingRing
from missile.pcie.ticket import CopyState, Direction

__all__ = ["PacedLane"]

_NEVER: Final = 1 << 62


class PacedLane(Lane):
    """depth: chunks that the GPU may have at once; latency-sensitive tenants may add as many beyond them.
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
        super().__init__(gpu, direction, fair, staging)
        self._recording = False
        self._depth = depth
        self._bypass = bypass
        self._flight = Flight(gpu, timing)
        self._unready: set[str] = set()  # tenants whose next copy waits for an event or for the host

    # --- tenants and copies

    def remove(self, tenant: str, now_ns: int) -> None:
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

    @property
    def busy(self) -> bool:
        return bool(self._flight.nbytes or self._landing or any(self._queues.values()))

    @property
    def underway(self) -> bool:
        heads = (queue[0] for queue in self._queues.values() if queue)
        return bool(self._flight.nbytes or self._landing) or any(
            request.after is None or request.after.done() for request in heads
        )

    # --- the reactor's part

    def step(self, now_ns: int) -> int | None:
        if self._flight.nbytes:
            for chunk, failure in self._flight.arrivals(now_ns):
                self._landed(chunk, now_ns, failure)
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

    def record_chunks(self) -> None:
        self._recording = True

    def events(self) -> list[Event]:
        return self._flight.heads() + [
            queue[0].after for tenant in self._unready if (queue := self._queues[tenant]) and queue[0].after is not None
        ]

    def drop_cancelled(self, now_ns: int) -> None:
        for tenant, queue in self._queues.items():
            dropped = [request for request in queue if request.ticket.cancel_requested]
            for request in dropped:
                queue.remove(request)
                request.end(CopyState.CANCELLED)
                self._settle(request, now_ns)
            if dropped:
                self._refresh(tenant, now_ns)

    def abandon(self, error: GpuError, now_ns: int) -> None:
        self._fail_all(self._flight.abandon(), error, now_ns)
        for tenant in self._queues:
            self.fair.sleep(tenant, now_ns)
        self._unready.clear()

    def close(self) -> None:
        super().close()
        self._flight.close()

    # --- arrivals

    def _landed(self, chunk: Chunk, now_ns: int, failure: MissileError | None) -> None:
        request = chunk.request
        request.flying -= 1
        if failure is not None:
            request.end(CopyState.FAILED, failure)
        else:
            self._arrived(request, chunk.nbytes)
            if self._recording:
                tenant = request.ticket.tenant
                self._records.append(ChunkRecord(tenant, self.direction, chunk.nbytes, chunk.issued_ns, now_ns))
        if chunk.piece is not None:
            self._unstage(request, chunk.piece)
        if request.over and not request.flying:
            self._settle(request, now_ns)

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
            if request.raises is not None and nbytes == request.remaining:
                stream.raise_latch(*request.raises)

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
            self._started(request, now_ns)
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
            deadline = min(deadline or _NEVER, now_ns + POLL_NS)
        if (eligible := self.fair.next_eligible(now_ns)) is not None:
            deadline = min(deadline or _NEVER, max(eligible, now_ns + 1))
        return deadline
