"""The lane whose chunks a thread in C gives to the GPU: Python hands over whole copies and is told of their ends."""

from __future__ import annotations

import ctypes
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from missile.errors import GpuError, InternalError, MisuseError
from missile.gpu.calls import DriverCalls
from missile.gpu.interface import Event, Gpu, HostBuffer
from missile.pcie.flight import LinkTiming, is_lost
from missile.pcie.lane import POLL_NS, ChunkRecord, Lane, LaneVitals
from missile.pcie.native.build import CALLS, Calls, Chunks, Library, Options, Report, ShareC, Vitals
from missile.pcie.policy import FLOOR_CHUNKS, MINIMUM_MARGIN, FairLink
from missile.pcie.request import Request
from missile.pcie.staging import Piece, StagingRing
from missile.pcie.ticket import CopyState, Direction
from missile.pcie.weights import Share

__all__ = ["ROW", "NativeLane", "share_of"]

_STREAMS: Final = 2
_DEPTH: Final = 256  # lane.c, DEPTH_MOST
_ISSUED, _DONE = 1, 2
_STATES: Final = (CopyState.DONE, CopyState.CANCELLED, CopyState.FAILED)
_REPORTS: Final = 256

ROW: Final = ("arrival_ns", "flow", "nbytes", "submitted_ns", "given_ns", "issued_ns", "done_ns", "state")
"""Columns of `NativeLane.run_source`. given_ns: when the submitting call returned; done_ns: 0 for a copy that is not over;
state: 0 for one that was done."""


class _Part(NamedTuple):
    """What was handed over as one copy: a whole request, or one pinned piece of a pageable one."""

    request: Request
    event: Event
    piece: Piece | None
    last: bool


class NativeLane(Lane):
    """Takes the same arguments as `PacedLane`, and the driver's calls with the library that makes them.

    ahead: bytes given to the GPU ahead while no latency-sensitive tenant is registered, at least: a host that stops for
    less than they take does not idle the link.
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
        ahead: int,
        calls: DriverCalls,
        library: Library,
    ) -> None:
        super().__init__(gpu, direction, fair, staging)
        self._calls = calls
        self._library = library
        self._flows: dict[str, int] = {}
        self._parts: dict[int, _Part] = {}
        self._waiting: set[str] = set()  # tenants whose next copy waits for pinned pieces
        self._streams = [gpu.create_stream() for _ in range(_STREAMS)]
        self._chunk_events = [gpu.create_event(timing=False) for _ in range(_STREAMS * _DEPTH)]
        self._events: list[Event] = []
        handles = (ctypes.c_void_p * len(self._chunk_events))(*map(calls.event_handle, self._chunk_events))
        g = fair.granularity
        options = Options(
            calls=Calls(**{name: getattr(calls, name) for name in CALLS}),
            chunk=Chunks(g.solo, g.shared, g.short),
            streams=(ctypes.c_void_p * _STREAMS)(*(stream.handle for stream in self._streams)),
            chunk_events=handles,
            ns_per_byte=timing.ns_per_byte,
            copy_ns=timing.copy_ns,
            start_ns=timing.start_ns,
            bypass=bypass,
            ahead=ahead,
            depth=depth,
            to_host=direction is Direction.D2H,
            floor_chunks=FLOOR_CHUNKS,
        )
        self._lane = library.lane_open(ctypes.byref(options))
        if not self._lane:
            raise InternalError("The copy engine's thread could not be started.")
        self._closed = False
        self._last_vitals = LaneVitals()
        self._reports = np.zeros((_REPORTS, len(Report._fields_)), np.int64)
        self._reports_at = self._reports.ctypes.data
        self._deadline = ctypes.c_int64(-1)

    # --- tenants and copies

    def admit(self, tenant: str, share: Share) -> None:
        super().admit(tenant, share)
        flow = self._library.lane_admit(self._lane, ctypes.byref(share_of(share, self.fair)))
        if flow < 0:
            self.fair.remove(tenant)
            raise MisuseError(f"Tenant {tenant!r} is one more than the copy engine can have ({len(self._flows)}).")
        self._flows[tenant] = flow

    def remove(self, tenant: str, now_ns: int) -> None:
        self._cancel_held(tenant, now_ns)
        self._records = self.recorded_chunks()  # their flow's number will be another's
        self._library.lane_remove(self._lane, self._flows.pop(tenant))
        self._take_reports()
        self._waiting.discard(tenant)
        self.fair.remove(tenant)
        del self._queues[tenant]

    def submit(self, request: Request, now_ns: int) -> None:
        queue = self._queues[request.ticket.tenant]
        queue.append(request)
        if len(queue) == 1:
            self._hand_over(request.ticket.tenant, now_ns)

    def cancel_all(self, now_ns: int) -> None:
        for tenant in self._queues:
            self._cancel_held(tenant, now_ns)
        for number, part in list(self._parts.items()):
            self._cancel(number, part)

    def drop_cancelled(self, now_ns: int) -> None:
        for number, part in list(self._parts.items()):
            if part.request.ticket.cancel_requested:
                self._cancel(number, part)
        for tenant, queue in self._queues.items():
            for request in [request for request in queue if request.ticket.cancel_requested]:
                queue.remove(request)
                request.end(CopyState.CANCELLED)
                self._settle(request, now_ns)
            self._hand_over(tenant, now_ns)

    def queued(self, tenant: str) -> int:
        flow = self._flows.get(tenant)
        if flow is None or self._closed:
            return 0
        return super().queued(tenant) + int(self._library.lane_queued(self._lane, flow))

    @property
    def busy(self) -> bool:
        return bool(self._parts or self._landing or self._waiting)

    @property
    def underway(self) -> bool:
        return bool(self._landing or self._waiting) or any(
            part.request.after is None or part.request.ticket.state is not CopyState.QUEUED or part.request.after.done()
            for part in self._parts.values()
        )

    def record_chunks(self) -> None:
        self._library.lane_record(self._lane)

    def recorded_chunks(self) -> list[ChunkRecord]:
        room = int(self._library.lane_recorded(self._lane, None, 0))
        rows = np.zeros((room, 4), np.int64)
        self._library.lane_recorded(self._lane, rows.ctypes.data, room)
        names = {flow: tenant for tenant, flow in self._flows.items()}
        taken = [ChunkRecord(names[row[0]], self.direction, *row[1:]) for row in rows.tolist() if row[0] in names]
        records, self._records = [*self._records, *taken], []
        return records

    def vitals(self) -> LaneVitals:
        if self._closed:
            return self._last_vitals
        out = Vitals()
        self._library.lane_vitals(self._lane, ctypes.byref(out))
        return LaneVitals(out.cpu_ns, out.looks, out.late_ns, out.dry_ns)

    # --- copies that a loop in C submits

    def run_source(self, rows: npt.NDArray[np.int64], host: HostBuffer, device: int, *, end_ns: int) -> int:
        """Submit copies of `host` to or from `device` as they arrive, by the entry that `submit` uses, and see their ends.

        rows: shape (n, 8), written in place (`ROW` names the columns), by arrival, ns on the GPU's clock. Blocks, without
        the interpreter's lock, until all that arrived by `end_ns` are over: for a thread of its own, joined before `close`.
        Returns how many were submitted. They appear in no statistics.
        """
        assert rows.flags.c_contiguous
        assert rows.shape[1] == len(ROW)
        at = rows.ctypes.data
        return int(self._library.source_run(self._lane, at, len(rows), host.address, device, end_ns))

    def flow(self, tenant: str) -> int:
        """The tenant's number, for `run_source`."""
        return self._flows[tenant]

    # --- the reactor's part

    def step(self, now_ns: int) -> int | None:
        if not self.busy:
            return None
        deadline = self._take_reports()
        if self._landing:
            self._collect(now_ns)
        for tenant in tuple(self._waiting):
            self._hand_over(tenant, now_ns)
        if self._waiting or self._landing:
            soon = now_ns + POLL_NS
            deadline = soon if deadline < 0 else min(deadline, soon)
        elif deadline < 0 and self.busy:  # handed over just now
            deadline = now_ns
        return None if deadline < 0 else deadline

    def events(self) -> list[Event]:
        # The thread in C looks after the others; `step` has said when a copy can have ended.
        waiting = (part.request for part in self._parts.values() if part.request.after is not None)
        return [request.after for request in waiting if request.after and request.ticket.state is CopyState.QUEUED]

    def abandon(self, error: GpuError, now_ns: int) -> None:
        self._library.lane_abandon(self._lane)
        parts = list(self._parts.values())
        self._parts.clear()
        self._waiting.clear()
        self._fail_all({id(part.request): part.request for part in parts}.values(), error, now_ns)

    def close(self) -> None:
        super().close()
        self._last_vitals = self.vitals()
        self._closed = True
        self._library.lane_close(self._lane)
        for stream in self._streams:
            stream.close()
        for event in (*self._chunk_events, *self._events):
            event.close()
        self._events.clear()

    # --- handing over

    def _hand_over(self, tenant: str, now_ns: int) -> None:
        """Give on what heads the tenant's queue, until something there waits for pinned pieces."""
        queue = self._queues[tenant]
        while queue:
            request = queue[0]
            if not request.over:
                if request.pageable is None:
                    self._give(request, None, request.ticket.nbytes)
                else:
                    self._give_pieces(request)
            if not request.over:
                self._waiting.add(tenant)
                return
            queue.popleft()
            self._settle(request, now_ns)
        self._waiting.discard(tenant)

    def _give_pieces(self, request: Request) -> None:
        if self.direction is Direction.H2D:
            self._stage(request)
            while request.pieces and request.pieces[0].ready:
                piece = request.pieces.popleft()
                self._give(request, piece, piece.nbytes)
                self._stage(request)
            return
        largest = self.fair.largest_piece(request.ticket.tenant)
        while not request.over:
            taken = self._staging.take(request.issued, min(largest, request.remaining))
            if taken is None:
                return
            self._give(request, taken, taken.nbytes)

    def _give(self, request: Request, piece: Piece | None, nbytes: int) -> None:
        if piece is not None:
            host = piece.buffer.address
        else:
            assert request.pinned is not None
            host = request.pinned.address + request.offset
        event = self._events.pop() if self._events else self._gpu.create_event(timing=False)
        handle = self._calls.event_handle
        after = None if request.after is None else handle(request.after)
        last = request.issued + nbytes == request.ticket.nbytes
        latch, value = (request.raises[0].address, request.raises[1]) if last and request.raises else (0, 0)
        number = self._library.lane_submit(
            self._lane,
            self._flows[request.ticket.tenant],
            host,
            request.device + request.issued,
            nbytes,
            handle(event),
            after,
            latch,
            value,
            None,
        )
        if not number:
            raise InternalError("The copy engine has no memory for another copy.")
        request.flying += 1
        request.issued += nbytes
        self._parts[number] = _Part(request, event, piece, last)

    def _cancel(self, number: int, part: _Part) -> None:
        flow = self._flows.get(part.request.ticket.tenant)
        if flow is not None:
            self._library.lane_cancel(self._lane, flow, number)

    def _cancel_held(self, tenant: str, now_ns: int) -> None:
        queue = self._queues[tenant]
        while queue:
            request = queue.popleft()
            request.end(CopyState.CANCELLED)
            self._settle(request, now_ns)
        self._waiting.discard(tenant)

    # --- what the thread tells

    def _take_reports(self) -> int:
        """Returns when to come again, ns; negative for never."""
        step, most = self._library.lane_step, _REPORTS
        while True:
            count = step(self._lane, self._reports_at, most, self._deadline)
            for report in self._reports[:count].tolist() if count else ():
                self._heed(*report)
            if count < most:
                return self._deadline.value

    def _heed(self, kind: int, number: int, nbytes: int, issued_ns: int, done_ns: int, state: int, code: int) -> None:
        part = self._parts[number]
        request, ticket = part.request, part.request.ticket
        if issued_ns >= 0 and ticket.state is CopyState.QUEUED:
            self._started(request, issued_ns)
        if kind == _ISSUED:
            if part.last:
                ticket.mark_issued(part.event)
        else:
            if _STATES[state] is not CopyState.FAILED:
                self._arrived(request, nbytes)
            self._ended(number, part, _STATES[state], code, done_ns)

    def _ended(self, number: int, part: _Part, state: CopyState, code: int, now_ns: int) -> None:
        request = part.request
        if state is CopyState.FAILED:
            error = self._calls.failure(f"copying {self.direction.value}", code)
            if is_lost(error):
                raise error
            request.end(CopyState.FAILED, error)
        elif state is CopyState.CANCELLED:
            request.end(CopyState.CANCELLED)
        del self._parts[number]
        self._events.append(part.event)
        request.flying -= 1
        if part.piece is not None:
            self._unstage(request, part.piece)
        if request.over:
            self._settle(request, now_ns)


def share_of(share: Share, fair: FairLink) -> Any:
    """A share as the C side takes it, with the credit that `fair` would give it."""
    g = fair.granularity
    return ShareC(
        units=share.units,
        credit=g.latency_sensitive_credit if share.latency_sensitive else g.credit,
        limit=0 if share.limit is None else max(1, round(share.limit)),
        burst=share.burst_bytes,
        minimum=max(1, round(MINIMUM_MARGIN * share.minimum)) if share.minimum else 0,
        latency_sensitive=share.latency_sensitive,
    )
