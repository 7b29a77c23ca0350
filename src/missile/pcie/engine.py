"""The copy engine: every copy of every tenant goes through it, in chunks that the policy orders."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from missile.errors import GpuError, InternalError, MisuseError
from missile.gpu.calls import HasDriverCalls
from missile.gpu.interface import Event, Gpu, HostBuffer, Latch
from missile.pcie.flight import LinkTiming
from missile.pcie.lane import ChunkRecord, Lane, LaneStats
from missile.pcie.native import NativeLane, library
from missile.pcie.paced import PacedLane
from missile.pcie.policy import FairLink, Granularity
from missile.pcie.request import Request
from missile.pcie.staging import StagingRing
from missile.pcie.ticket import CopyState, CopyTicket, DeviceSpan, Direction
from missile.pcie.weights import MIB, Share

__all__ = ["CopyEngine", "EngineOptions", "Stop", "TenantCopies"]


class Stop(enum.StrEnum):
    """What becomes of copies that are still queued when the engine stops. None is lost silently either way."""

    DRAIN = "drain"  # they are copied
    CANCEL = "cancel"  # they end as cancelled; chunks that the GPU has still arrive


# How long `close` waits: what was to be drained may take long, what the GPU has of cancelled copies may not.
_PATIENCE_NS = {Stop.DRAIN: 60_000_000_000, Stop.CANCEL: 5_000_000_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """h2d_rate, d2h_rate: measured rates of the link, bytes/s (`missile.pcie.link`).
    granularity: chunk sizes, from the same measurement. depth: chunks that the GPU has at once per direction.
    copy_ns, start_ns: what a copy takes beyond its bytes, and what it takes more when the link was idle; with the rates
    they say when to look for its end.
    h2d_bypass, d2h_bypass: copies of latency-sensitive tenants of at most so many bytes overtake on a stream of their
    own (0: none do, the default, since hardware that does not let them overtake may starve that stream).
    ahead: bytes that the GPU is given ahead while no latency-sensitive tenant is registered, at least (native only).
    native: let a thread in C drive the link where there is a driver and a compiler; else, and on a simulated GPU, Python
    does. staging_slots: pinned buffers for pageable memory, each of one short chunk at most; 0 refuses pageable memory.
    """

    h2d_rate: float
    d2h_rate: float
    granularity: Granularity = field(default_factory=Granularity)
    depth: int = 2
    copy_ns: float = 2_500.0
    start_ns: float = 8_000.0
    h2d_bypass: int = 0
    d2h_bypass: int = 0
    ahead: int = 0
    native: bool = True
    staging_slots: int = 12
    staging_slot_bytes: int = MIB

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise MisuseError(f"The copy engine needs a depth of at least 1 chunk, not {self.depth}.")


@dataclass(frozen=True, slots=True)
class TenantCopies:
    """Accounting of one tenant in one direction. share: of all bytes that this direction has moved, 0..1."""

    tenant: str
    direction: Direction
    share: float
    queued_bytes: int
    totals: LaneStats


class CopyEngine:
    """A reactor: whoever owns the Gpu calls `step` and comes back when it says, or when `events` are done.

    `to_device`, `to_host` and tickets' `cancel` are safe from any thread; everything else belongs to the owner's.
    `wake` is called, from any thread, when there is something new to do; an owner that sleeps sets it to be woken.
    """

    def __init__(self, gpu: Gpu, options: EngineOptions, *, executor: Executor | None = None) -> None:
        """executor: where pageable memory is copied to and from pinned buffers (None: in `step`, deterministic)."""
        self.gpu = gpu
        self.options = options
        self.wake: Callable[[], None] = _nothing
        self._inbox: deque[Request] = deque()
        self._stop: Stop | None = None
        self._lost: GpuError | None = None
        self._closed = False
        self._cancellations = 0
        slot = min(options.staging_slot_bytes, options.granularity.short)
        self._staging = StagingRing(
            gpu, slots=options.staging_slots, slot_bytes=slot, executor=executor, wake=lambda: self.wake()
        )
        self.lanes = {direction: self._lane(direction) for direction in Direction}

    def _lane(self, direction: Direction) -> Lane:
        options = self.options
        h2d = direction is Direction.H2D
        rate, bypass = (options.h2d_rate, options.h2d_bypass) if h2d else (options.d2h_rate, options.d2h_bypass)
        fair = FairLink(rate, options.granularity)
        timing = LinkTiming(1e9 / rate, options.copy_ns, options.start_ns)
        compiled, _ = library() if options.native and isinstance(self.gpu, HasDriverCalls) else (None, "")
        if compiled is None:
            return PacedLane(self.gpu, direction, fair, self._staging, timing, depth=options.depth, bypass=bypass)
        assert isinstance(self.gpu, HasDriverCalls)
        return NativeLane(
            self.gpu,
            direction,
            fair,
            self._staging,
            timing,
            depth=options.depth,
            bypass=bypass,
            ahead=options.ahead,
            calls=self.gpu.driver_calls(),
            library=compiled,
        )

    @property
    def native(self) -> bool:
        """Whether a thread in C drives the link."""
        return all(isinstance(lane, NativeLane) for lane in self.lanes.values())

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the threads in C; what `step` takes is its caller's."""
        return sum(lane.vitals().cpu_ns for lane in self.lanes.values()) * 1e-9

    def __enter__(self) -> CopyEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- tenants

    def admit(self, tenant: str, share: Share | None = None, *, d2h: Share | None = None) -> None:
        """Register a tenant with the same entitlement in both directions, or another one for D2H.

        MisuseError: known already, or minimums that no longer fit the link; nothing has changed then.
        """
        share = share or Share()
        self.lanes[Direction.H2D].admit(tenant, share)
        try:
            self.lanes[Direction.D2H].admit(tenant, d2h or share)
        except MisuseError:
            self.lanes[Direction.H2D].remove(tenant, 0)
            raise

    def remove(self, tenant: str) -> None:
        """The tenant is gone: its queued copies end as cancelled, its queues are freed; others are not disturbed."""
        self._take_inbox()
        for lane in self.lanes.values():
            lane.fair.share(tenant)
            lane.remove(tenant, self.gpu.now_ns())

    # --- copies

    def to_device(
        self,
        tenant: str,
        target: DeviceSpan,
        source: HostBuffer | npt.NDArray[Any],
        *,
        target_offset: int = 0,
        source_offset: int = 0,
        nbytes: int | None = None,
        after: Event | None = None,
        raises: tuple[Latch, int] | None = None,
    ) -> CopyTicket:
        """Copy host bytes `source[source_offset:][:nbytes]` to `target` from `target_offset` on.

        source: pinned, or any C-contiguous array (pageable: goes through the staging ring). It must keep its contents,
        and both must live, until the ticket is done. after: the copy starts when this event is done.
        raises: a latch and the value that it is raised to on the GPU behind the copy (or without it, when it fails or is
        cancelled), so that streams can wait for it from now on.
        MisuseError: outside either side, unknown tenant, pageable where that is refused, engine stopped.
        """
        return self._submit(Direction.H2D, tenant, target, target_offset, source, source_offset, nbytes, after, raises)

    def to_host(
        self,
        tenant: str,
        target: HostBuffer | npt.NDArray[Any],
        source: DeviceSpan,
        *,
        target_offset: int = 0,
        source_offset: int = 0,
        nbytes: int | None = None,
        after: Event | None = None,
        raises: tuple[Latch, int] | None = None,
    ) -> CopyTicket:
        """Copy device bytes of `source` from `source_offset` on into `target`; as `to_device` otherwise."""
        return self._submit(Direction.D2H, tenant, source, source_offset, target, target_offset, nbytes, after, raises)

    def _submit(
        self,
        direction: Direction,
        tenant: str,
        device: DeviceSpan,
        device_offset: int,
        host: HostBuffer | npt.NDArray[Any],
        host_offset: int,
        nbytes: int | None,
        after: Event | None,
        raises: tuple[Latch, int] | None,
    ) -> CopyTicket:
        if self._lost is not None:
            raise self._lost
        if self._stop is not None:
            raise MisuseError("The copy engine has been stopped and takes no more copies.")
        self.lanes[direction].fair.share(tenant)  # raises for an unknown tenant
        size = host.nbytes - host_offset if nbytes is None else nbytes
        _check_range("device", device_offset, size, device.nbytes)
        _check_range("host", host_offset, size, host.nbytes)
        ticket = CopyTicket(tenant, direction, size, self.gpu.now_ns())
        address = device.address + device_offset
        if isinstance(host, np.ndarray):
            pageable = self._pageable(host, direction)[host_offset : host_offset + size]
            request = Request(ticket, address, pageable=pageable, after=after, raises=raises)
        else:
            request = Request(ticket, address, pinned=host, offset=host_offset, after=after, raises=raises)
        ticket.on_cancel = self._note_cancel
        self._inbox.append(request)
        self.wake()
        return ticket

    def _pageable(self, array: npt.NDArray[Any], direction: Direction) -> npt.NDArray[np.uint8]:
        if not self._staging.slots:
            raise MisuseError("The host side of a copy must be pinned memory (Gpu.allocate_host): staging is off.")
        if not array.flags.c_contiguous or (direction is Direction.D2H and not array.flags.writeable):
            raise MisuseError("The host side of a copy must be a C-contiguous array, writable where it is the target.")
        return array.reshape(-1).view(np.uint8)

    def _note_cancel(self) -> None:
        self._cancellations += 1
        self.wake()

    # --- the reactor

    def step(self) -> int | None:
        """Do what can be done now, without blocking. Returns the time to step again, ns; None when idle.

        A request that fails ends its own ticket. Only the loss of the GPU is raised, after all tickets have failed.
        """
        if self._lost is not None:
            raise self._lost
        now = self.gpu.now_ns()
        if self._inbox:
            self._take_inbox()
        if self._cancellations:
            self._cancellations = 0
            for lane in self.lanes.values():
                lane.drop_cancelled(now)
        try:
            deadlines = [deadline for lane in self.lanes.values() if (deadline := lane.step(now)) is not None]
        except GpuError as error:
            self._lost = error
            for lane in self.lanes.values():
                lane.abandon(error, now)
            raise
        if self._inbox:  # callbacks have submitted more
            return now
        return min(deadlines, default=None)

    def _take_inbox(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            ticket = request.ticket
            now = self.gpu.now_ns()
            lane = self.lanes[ticket.direction]
            if self._stop is Stop.CANCEL or ticket.cancel_requested or not lane.fair.knows(ticket.tenant):
                lane.release(request)
                ticket.finish(CopyState.CANCELLED, now)
            elif ticket.nbytes == 0:
                lane.release(request)
                ticket.finish(CopyState.DONE, now)
            else:
                lane.submit(request, now)

    def events(self) -> list[Event]:
        """Events whose completion gives `step` something to do, for `Gpu.wait`."""
        return [event for lane in self.lanes.values() for event in lane.events()]

    @property
    def busy(self) -> bool:
        """Whether any copy is unfinished."""
        return bool(self._inbox) or any(lane.busy for lane in self.lanes.values())

    def run_until_idle(self, timeout_ns: int | None = None) -> None:
        """Step until no copy is left. Spins as `Gpu.wait` does. InternalError when `timeout_ns` passes first."""
        limit = None if timeout_ns is None else self.gpu.now_ns() + timeout_ns
        while self.busy:
            again = self.step()
            if again is not None:
                self.gpu.wait(self.events(), again)
            if limit is not None and self.gpu.now_ns() > limit:
                raise InternalError("The copy engine did not become idle in time.")

    # --- stopping and accounting

    def stop(self, how: Stop = Stop.DRAIN) -> None:
        """Take no more copies. Queued ones are drained or cancelled by the next steps; then `busy` is False."""
        self._stop = how
        self._take_inbox()
        if how is Stop.CANCEL and self._lost is None:
            for lane in self.lanes.values():
                lane.cancel_all(self.gpu.now_ns())

    def close(self) -> None:
        """Stop, cancelling unless `stop` said to drain, wait for what the GPU has, and free everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._stop is None:
            self.stop(Stop.CANCEL)
        try:
            if self._lost is None and self._stop is not None:
                self.run_until_idle(_PATIENCE_NS[self._stop])
        finally:
            for lane in self.lanes.values():
                lane.close()
            self._staging.close()

    def statistics(self) -> tuple[TenantCopies, ...]:
        """Per tenant and direction, since the engine was made; tenants that left are included."""
        out = []
        for direction, lane in self.lanes.items():
            total = sum(stats.bytes for stats in list(lane.stats.values()))
            for tenant, stats in list(lane.stats.items()):
                out.append(
                    TenantCopies(tenant, direction, stats.bytes / total if total else 0.0, lane.queued(tenant), stats)
                )
        return tuple(out)

    def would_start(self, direction: Direction, nbytes: int) -> bool:
        """Whether a copy could just as well go on a stream of its own: nobody else's is there that could go, and it is no
        longer than the chunk that others would wait for anyway."""
        return nbytes <= self.options.granularity.short and not self.underway(direction)

    def underway(self, direction: Direction) -> bool:
        """Whether a copy in `direction` goes, or waits for nothing but the link; one that waits for work on the GPU, as a
        request's output does from its last launch on, holds nobody up."""
        return any(request.ticket.direction is direction for request in self._inbox) or self.lanes[direction].underway

    def account(self, tenant: str, direction: Direction, nbytes: int) -> None:
        """Count a copy that its owner has made himself. MisuseError for an unknown tenant."""
        lane = self.lanes[direction]
        lane.fair.share(tenant)
        lane.stats[tenant].bytes += nbytes
        lane.stats[tenant].copies += 1

    def record_chunks(self) -> None:
        """Keep a record of every chunk that arrives from now on, for `recorded_chunks`."""
        for lane in self.lanes.values():
            lane.record_chunks()

    def recorded_chunks(self) -> list[ChunkRecord]:
        """Take the records of what has been seen to arrive. Before `close`."""
        return [record for lane in self.lanes.values() for record in lane.recorded_chunks()]


def _check_range(side: str, offset: int, nbytes: int, size: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > size:
        raise MisuseError(f"A copy of {nbytes} bytes from offset {offset} leaves the {side} memory of {size} bytes.")


def _nothing() -> None: ...
