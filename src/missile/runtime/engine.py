"""The engine: one thread that owns the GPU, takes arrivals by the clock, asks the policy and launches.

The same loop runs on hardware, where waiting spins, and on a simulated GPU, where waiting advances the clock. On the
request path nothing is created, logged or collected: events, streams, graphs and arrays exist before the clock starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from missile.errors import GpuError, InternalError
from missile.gpu.interface import Event, Gpu
from missile.runtime.policies.interface import Advance, Policy, Preempt, Snapshot, Start, Wake
from missile.runtime.requests import RequestLog
from missile.runtime.stage import MOST_PIECES, Slot, Stage

__all__ = ["NEVER", "Engine", "Span"]

Times = npt.NDArray[np.int64]

NEVER = 1 << 62  # ns, later than any clock

# How often the loop looks up from waiting. Hardware may sleep in a wait of milliseconds, and waking takes longer than a
# request may wait; a simulated clock only has to notice interruptions.
_LOOK_UP_NS = 250_000
_LOOK_UP_SIMULATED_NS = 50_000_000
_PATIENCE_NS = 10_000_000_000  # how long the GPU may be at work without finishing anything
_GAPS = 4096
_GAP_FLOOR_NS = 20_000  # shorter passes are not worth recording


class Span(NamedTuple):
    """A run's times, ns since its start. Measured is [begin, end); requests of it may finish until `limit`."""

    begin: int
    end: int
    limit: int


class _Flight(NamedTuple):
    """A piece of a request that the GPU has: all of it, or segments [first, last) of a cut one.

    number: how many pieces of the tenant were given to the GPU before. done: the event at its end. ends: with it, the
    request has finished.
    """

    tenant: int
    number: int
    request: int
    slot: Slot
    done: Event
    ends: bool
    first: int = 0
    last: int = 0


class Engine:
    """Serves one run; `run` it once.

    arrivals: one int64 array of times (ns since the start, sorted, before `span.end`) for each tenant; empty for closed
    loops. depth: requests of each tenant that may be in flight.
    logs: filled while it runs and consistent whatever stops it. now_ns: how far it came. Set `stopping` (from a signal
    handler) to end it at its next pass.
    """

    def __init__(
        self,
        gpu: Gpu,
        stage: Stage,
        policy: Policy,
        logs: Sequence[RequestLog],
        arrivals: Sequence[Times],
        *,
        lanes: int,
        depth: Sequence[int],
        span: Span,
    ) -> None:
        self._gpu = gpu
        self._stage = stage
        self._policy = policy
        self._span = span
        self._origin = 0
        self.logs = tuple(logs)
        self.now_ns = 0
        self.stopping = False

        self._loops = [log.tenant.closed_loop for log in logs]
        merged = np.concatenate([*arrivals, np.empty(0, np.int64)])
        order = np.argsort(merged, kind="stable")
        self._times: list[int] = [*merged[order].tolist(), NEVER]
        self._owners: list[int] = np.repeat(np.arange(len(logs)), [len(a) for a in arrivals])[order].tolist()
        self._next = 0
        # Closed-loop requests to come, by time: at the start all that are outstanding, later those that "think".
        self._thinking: list[tuple[int, int]] = [
            (0, tenant) for tenant, loop in enumerate(self._loops) if loop is not None for _ in range(loop.depth)
        ]

        self._queued = [0] * len(logs)
        self._running = [0] * len(logs)
        self._oldest = [0] * len(logs)
        self._launched = [0] * len(logs)
        self._pending = [0] * len(logs)
        self._preempted = [False] * len(logs)
        self._snapshot = Snapshot(
            0, self._queued, self._running, self._oldest, tuple(depth), self._launched, self._pending, self._preempted
        )
        self._segments = [stage.segments(tenant) for tenant in range(len(logs))]
        # Pieces of each tenant that the GPU was given, and that were taken off their lanes: in the same order.
        self._given = [0] * len(logs)
        self._taken = [0] * len(logs)
        self._stopped: list[list[_Flight]] = [[] for _ in logs]  # pieces that a preemption may have cut short
        self._wake_at = 0
        self._quiet_since = 0
        self._lanes: list[deque[_Flight]] = [deque() for _ in range(lanes)]
        self._unread: deque[_Flight] = deque()
        self._gaps = np.zeros(_GAPS, np.int64)
        self._gap_count = 0

    @property
    def origin_ns(self) -> int:
        """The run's start on the GPU's clock."""
        return self._origin

    @property
    def jitter(self) -> Times:
        """Lengths of passes of the loop, in which it did not look at the clock, ns: those above 20 us, the last 4,096."""
        return self._gaps[: min(self._gap_count, _GAPS)].copy()

    @property
    def in_flight(self) -> tuple[str, ...]:
        """Tenants that have work on the GPU."""
        return tuple(
            log.tenant.name
            for log, given, taken in zip(self.logs, self._given, self._taken, strict=True)
            if given > taken
        )

    def run(self, progress: Callable[[int], None] | None = None, progress_ns: int = NEVER) -> None:
        """Serve until the span is over or `stopping` is set, then let what runs on the GPU end.

        progress: called with the time into the run (ns) every `progress_ns`, between passes: what it takes is taken from
        the request path. Raises what the GPU raises; the logs keep what had finished.
        """
        gpu, clock, span = self._gpu, self._gpu.now_ns, self._span
        origin = self._origin = clock()
        report_at = progress_ns
        step = _LOOK_UP_SIMULATED_NS if gpu.info.simulated else _LOOK_UP_NS
        while True:
            now = self.now_ns = clock() - origin
            changed = self._admit(now)
            changed |= self._collect()
            if now - self._quiet_since > _PATIENCE_NS:
                self._check_patience(now)
            if changed or now >= self._wake_at:
                self._decide(now)
            if self._unread:
                self._read_times(yielding=True)
            if self.stopping or now >= span.limit or (now >= span.end and self._caught_up()):
                break
            if now >= report_at and progress is not None:
                report_at = now + progress_ns
                progress(now)
            look_up = min(now + step, span.end if now < span.end else span.limit)
            deadline = min(self._next_arrival(), look_up, self._wake_at)
            self._note_gap(clock() - origin - now)
            self._stage.wait(self._heads(), origin + deadline)
        self._settle(clock)

    # --- arrivals
    def _next_arrival(self) -> int:
        return min(self._times[self._next], self._thinking[0][0]) if self._thinking else self._times[self._next]

    def _admit(self, now: int) -> bool:
        """Queue every request whose time has come."""
        times, admitted = self._times, False
        while times[self._next] <= now:
            self._arrive(self._owners[self._next], times[self._next])
            self._next += 1
            admitted = True
        while self._thinking and self._thinking[0][0] <= now:
            at, tenant = heappop(self._thinking)
            self._arrive(tenant, at)
            admitted = True
        return admitted

    def _arrive(self, tenant: int, at: int) -> None:
        if not self._queued[tenant]:
            self._oldest[tenant] = at
        self._queued[tenant] += 1
        self.logs[tenant].arrive(at)

    # --- completions
    def _heads(self) -> list[Event]:
        """What each busy lane finishes next."""
        return [lane[0].done for lane in self._lanes if lane]

    def _collect(self) -> bool:
        """Take finished pieces off their lanes, those of each tenant in order."""
        collected = False
        blocked = True
        while blocked:
            blocked = False
            progress = False
            for lane in self._lanes:
                while lane and lane[0].done.done():
                    if lane[0].number != self._taken[lane[0].tenant]:
                        blocked = True  # its tenant's former piece, on another lane, has finished too and comes first
                        break
                    self._take(lane.popleft())
                    progress = True
            collected |= progress
            blocked &= progress
        return collected

    def _take(self, flight: _Flight) -> None:
        tenant = flight.tenant
        self._taken[tenant] += 1
        self._quiet_since = self.now_ns
        if self._preempted[tenant]:
            self._stopped[tenant].append(flight)
            if self._taken[tenant] == self._given[tenant]:
                self._settle_preempted(tenant)
        else:
            self._finish(flight)

    def _finish(self, flight: _Flight) -> None:
        """A piece is whole."""
        tenant = flight.tenant
        self._pending[tenant] -= flight.last - flight.first
        if not flight.ends:
            return
        done = self._gpu.now_ns() - self._origin
        self.logs[tenant].done[flight.request] = done
        self._running[tenant] -= 1
        self._unread.append(flight)
        if (loop := self._loops[tenant]) is not None:
            if loop.think_ms:
                heappush(self._thinking, (done + int(loop.think_ms * 1e6), tenant))
            else:
                self._arrive(tenant, done)

    def _read_times(self, *, yielding: bool = False) -> None:
        """Note when finished requests ran. After `_decide`, because asking the GPU takes microseconds.

        yielding: leave one for the next pass when a request has arrived meanwhile (a stage's slots allow for one).
        """
        while self._unread:
            if yielding and len(self._unread) == 1 and self._next_arrival() <= self._gpu.now_ns() - self._origin:
                return
            flight = self._unread[0]
            log = self.logs[flight.tenant]
            log.start[flight.request] = flight.slot.start.time_ns() - self._origin
            log.end[flight.request] = flight.slot.end.time_ns() - self._origin
            log.finish(flight.request)
            self._unread.popleft()

    def _caught_up(self) -> bool:
        """Whether every request that did not depend on another has finished."""
        return all(
            log.finished == log.arrived for log, loop in zip(self.logs, self._loops, strict=True) if loop is None
        )

    # --- what the policy asks for
    def _decide(self, now: int) -> None:
        self._snapshot.now_ns = now
        if now >= self._wake_at:
            self._wake_at = NEVER
        for action in self._policy.decide(self._snapshot):
            if isinstance(action, Start):
                self._start(action.tenant, action.lane)
            elif isinstance(action, Advance):
                self._advance(action.tenant, action.lane, action.segments, action.after)
            elif isinstance(action, Wake):
                self._wake_at = min(self._wake_at, action.at_ns)
            elif isinstance(action, Preempt):
                self._preempt(action.tenant)
            else:
                self._reject(action.tenant)

    def _refuse(self, what: str) -> InternalError:
        return InternalError(f"Policy {self._policy.name!r} {what}.")

    def _start(self, tenant: int, lane: int) -> None:
        if self._segments[tenant]:
            raise self._refuse("started a whole request of a tenant that it had cut into segments")
        request = self._open(tenant)
        slot, launched = self._stage.enqueue(tenant, lane, request)
        log = self.logs[tenant]
        log.dispatch[request] = launched - self._origin
        log.lane[request] = lane
        self._lanes[lane].append(_Flight(tenant, self._given[tenant], request, slot, slot.done, True))
        self._given[tenant] += 1

    def _open(self, tenant: int) -> int:
        """Take the oldest queued request. Its number."""
        if not self._queued[tenant] or self._running[tenant] >= self._snapshot.depth[tenant]:
            raise self._refuse("started a request that can't be started")
        log = self.logs[tenant]
        request = log.started
        log.started = request + 1
        self._running[tenant] += 1
        self._queued[tenant] -= 1
        if self._queued[tenant]:
            self._oldest[tenant] = int(log.arrival[request + 1])
        return request

    def _advance(self, tenant: int, lane: int, count: int, after: tuple[int, ...]) -> None:
        first, log = self._launched[tenant], self.logs[tenant]
        last = first + count
        if not 0 < count <= self._segments[tenant] - first or self._preempted[tenant]:
            raise self._refuse("advanced a tenant that can't be advanced so far")
        if self._given[tenant] - self._taken[tenant] >= MOST_PIECES:
            raise self._refuse(f"gave the GPU more than {MOST_PIECES} pieces of one tenant at once")
        request = log.started - 1 if first else self._open(tenant)
        slot, mark, launched = self._stage.advance(tenant, lane, request, first, last, after)
        if not first:
            log.dispatch[request] = launched - self._origin
            log.lane[request] = lane
        ends = last == self._segments[tenant]
        self._lanes[lane].append(_Flight(tenant, self._given[tenant], request, slot, mark, ends, first, last))
        self._given[tenant] += 1
        self._launched[tenant] = 0 if ends else last
        self._pending[tenant] += count

    def _preempt(self, tenant: int) -> None:
        if self._given[tenant] == self._taken[tenant] or self._preempted[tenant]:
            return
        if self._running[tenant] > 1:
            raise self._refuse("preempted a tenant with more than one request on the GPU")
        self._preempted[tenant] = self._stage.preempt(tenant)

    def _settle_preempted(self, tenant: int) -> None:
        """All that a preempted tenant had on the GPU has ended: count what is whole, go back to what is not."""
        self._preempted[tenant] = False
        whole_until = self._stage.settle(tenant)
        stopped, self._stopped[tenant] = self._stopped[tenant], []
        for flight in stopped:
            if whole_until is None or flight.last <= whole_until:
                self._finish(flight)
        if whole_until is None:
            return
        self._pending[tenant] = 0
        self._launched[tenant] = whole_until
        if not whole_until:  # as if the request had not been started
            log = self.logs[tenant]
            log.started -= 1
            self._running[tenant] -= 1
            self._queued[tenant] += 1
            self._oldest[tenant] = int(log.arrival[log.started])

    def _reject(self, tenant: int) -> None:
        if not self._queued[tenant] or self._loops[tenant] is not None or self._segments[tenant]:
            raise self._refuse("rejected a request that can't be rejected")
        log = self.logs[tenant]
        log.reject()
        self._queued[tenant] -= 1
        if self._queued[tenant]:
            self._oldest[tenant] = int(log.arrival[log.started])

    # --- the rest
    def _note_gap(self, length: int) -> None:
        if length >= _GAP_FLOOR_NS:
            self._gaps[self._gap_count % _GAPS] = length
            self._gap_count += 1

    def _settle(self, clock: Callable[[], int]) -> None:
        """Let what runs end, and start nothing more. GpuError when it does not."""
        self._read_times()
        give_up = clock() + _PATIENCE_NS
        while heads := self._heads():
            if clock() >= give_up:
                raise self._lost_patience()
            self._stage.wait(heads, give_up)
            self._collect()
            self._read_times()

    def _check_patience(self, now: int) -> None:
        """GpuError when the GPU has been at the same work for too long; it may also have had none."""
        if self._heads():
            raise self._lost_patience()
        self._quiet_since = now

    def _lost_patience(self) -> GpuError:
        """Names the tenants whose requests have begun: others only wait behind them."""
        heads = [lane[0] for lane in self._lanes if lane]
        begun = [flight for flight in heads if flight.slot.start.done()] or heads
        names = tuple(dict.fromkeys(self.logs[flight.tenant].tenant.name for flight in begun))
        detail = "" if len(names) == 1 else f"tenants {', '.join(names)}"
        tenant = names[0] if len(names) == 1 else ""
        what = f"Waiting {_PATIENCE_NS // 1_000_000_000} s for running kernels"
        return GpuError(what, "TIMEOUT", tenant=tenant, usable="nothing", detail=detail)
