"""What is done today without a scheduler: whole copies, given to the GPU at once. The comparison's other sides."""

from __future__ import annotations

import enum
from collections import deque
from typing import Protocol

from missile.gpu.interface import Event, Gpu, HostBuffer, Priority, Stream
from missile.pcie.ticket import CopyState, CopyTicket, DeviceSpan, Direction
from missile.pcie.weights import Share

__all__ = ["Copier", "Direct", "DirectCopier"]

_POLL_NS = 10_000


class Copier(Protocol):
    """What a load needs of whatever moves its bytes: the engine, or one of the ways to do without."""

    def admit(self, tenant: str, share: Share | None = None) -> None: ...
    def to_device(
        self, tenant: str, target: DeviceSpan, source: HostBuffer, *, nbytes: int | None = None
    ) -> CopyTicket: ...
    def to_host(
        self, tenant: str, target: HostBuffer, source: DeviceSpan, *, nbytes: int | None = None
    ) -> CopyTicket: ...
    def step(self) -> int | None: ...
    def events(self) -> list[Event]: ...
    def close(self) -> None: ...


class Direct(enum.StrEnum):
    STREAMS = "streams"  # a stream for each tenant
    PRIORITY = "priority"  # the same, latency-sensitive tenants' with high priority
    FIFO = "fifo"  # one stream per direction, in order of arrival


class DirectCopier:
    """Copies without a scheduler. Shares are ignored, but for which tenant is latency-sensitive."""

    def __init__(self, gpu: Gpu, how: Direct) -> None:
        self._gpu = gpu
        self._how = how
        self._streams: dict[tuple[str, Direction], Stream] = {}
        self._fifo: dict[Direction, Stream] = {}
        self._flying: dict[int, deque[tuple[CopyTicket, Event]]] = {}  # by stream, in its order
        self._events: list[Event] = []

    def admit(self, tenant: str, share: Share | None = None) -> None:
        urgent = share is not None and share.latency_sensitive and self._how is Direct.PRIORITY
        priority = Priority.HIGH if urgent else Priority.LOW
        for direction in Direction:
            shared = self._fifo.get(direction)
            stream = shared or self._gpu.create_stream(priority=priority)
            self._streams[tenant, direction] = stream
            if self._how is Direct.FIFO:
                self._fifo[direction] = stream

    def to_device(
        self, tenant: str, target: DeviceSpan, source: HostBuffer, *, nbytes: int | None = None
    ) -> CopyTicket:
        size = source.nbytes if nbytes is None else nbytes
        stream = self._streams[tenant, Direction.H2D]
        stream.copy_to_device(target.address, source, nbytes=size)
        return self._track(stream, CopyTicket(tenant, Direction.H2D, size, self._gpu.now_ns()))

    def to_host(self, tenant: str, target: HostBuffer, source: DeviceSpan, *, nbytes: int | None = None) -> CopyTicket:
        size = target.nbytes if nbytes is None else nbytes
        stream = self._streams[tenant, Direction.D2H]
        stream.copy_to_host(target, source.address, nbytes=size)
        return self._track(stream, CopyTicket(tenant, Direction.D2H, size, self._gpu.now_ns()))

    def _track(self, stream: Stream, ticket: CopyTicket) -> CopyTicket:
        event = self._events.pop() if self._events else self._gpu.create_event(timing=False)
        stream.record(event)
        ticket.mark_issued(event)
        self._flying.setdefault(id(stream), deque()).append((ticket, event))
        return ticket

    def step(self) -> int | None:
        for queue in self._flying.values():
            while queue and queue[0][1].done():
                ticket, event = queue.popleft()
                self._events.append(event)
                ticket.copied = ticket.nbytes
                ticket.finish(CopyState.DONE, self._gpu.now_ns())
        return self._gpu.now_ns() + _POLL_NS if any(self._flying.values()) else None

    def events(self) -> list[Event]:
        return [queue[0][1] for queue in self._flying.values() if queue]

    def close(self) -> None:
        """Wait for what was given to the GPU, and let go of it."""
        for queue in self._flying.values():
            for _, event in queue:
                event.synchronize()
        for stream in {id(stream): stream for stream in self._streams.values()}.values():
            stream.close()
        for event in self._events:
            event.close()
        self._events.clear()
        self._flying.clear()
