"""The chunks of one direction that the GPU has: giving them to it, seeing them arrive, and when to look again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from missile.errors import GpuError, MissileError
from missile.gpu.interface import Event, Gpu, Stream
from missile.pcie.request import Chunk, Request
from missile.pcie.staging import Piece

__all__ = ["Flight", "LinkTiming", "is_lost"]

_SOON_NS = 1_000  # too short to sleep: look again at once
_SPIN_NS = 40_000  # a latency-sensitive copy that should end within this is not slept for: waking up takes too long


@dataclass(frozen=True, slots=True)
class LinkTiming:
    """How long a copy should take: says when to look for its end, not when it ended. See `EngineOptions`."""

    ns_per_byte: float
    copy_ns: float
    start_ns: float


class Flight:
    """nbytes: what the GPU has. One stream for all: hardware keeps the order within a stream, but may starve one stream
    while another is fed. The second is for copies so small that the hardware lets them overtake (docs/pcie.md).
    """

    def __init__(self, gpu: Gpu, timing: LinkTiming) -> None:
        self.nbytes = 0
        self._gpu = gpu
        self._timing = timing
        self._streams = (gpu.create_stream(), gpu.create_stream())
        self._chunks: tuple[deque[Chunk], ...] = (deque(), deque())
        self._urgent = 0
        self._busy_until = 0
        self._events: list[Event] = []

    def give(
        self,
        request: Request,
        nbytes: int,
        copy: Callable[[Stream], None],
        *,
        piece: Piece | None,
        urgent: bool,
        overtakes: bool,
        now_ns: int,
    ) -> Event:
        """Have `copy` enqueue a chunk; returns the event of its arrival. After an error nothing is kept of it.

        urgent: somebody waits for just this chunk.
        """
        stream = self._streams[overtakes]
        event = self._events.pop() if self._events else self._gpu.create_event(timing=False)
        try:
            copy(stream)
            stream.record(event)
        except MissileError:
            self._events.append(event)
            raise
        timing = self._timing
        taken = timing.copy_ns + nbytes * timing.ns_per_byte
        if overtakes:
            eta = int(now_ns + timing.start_ns + taken)
        else:
            self._busy_until = eta = int(max(now_ns + timing.start_ns, self._busy_until) + taken)
        self._chunks[overtakes].append(Chunk(request, nbytes, event, now_ns, eta, piece, urgent))
        self.nbytes += nbytes
        self._urgent += urgent
        return event

    def arrivals(self, now_ns: int) -> Iterator[tuple[Chunk, MissileError | None]]:
        """Take the chunks that have arrived, each with the error that it ended in, if any. Raises when the GPU is lost."""
        for chunks in self._chunks:
            while chunks:
                failure = None
                try:
                    if not chunks[0].event.done():
                        break
                except MissileError as error:
                    if is_lost(error):
                        raise
                    failure = error
                chunk = chunks.popleft()
                self.nbytes -= chunk.nbytes
                self._urgent -= chunk.urgent
                self._events.append(chunk.event)
                yield chunk, failure
        if not self.nbytes:
            self._busy_until = 0
        elif self._chunks[0] and (late := now_ns - self._chunks[0][0].eta_ns) > 0:
            # What should have arrived puts all behind it off: the estimate must not run away from the link.
            for chunk in self._chunks[0]:
                chunk.eta_ns += late
            self._busy_until += late

    def deadline(self, now_ns: int) -> int | None:
        """When to look for the next arrival; None when the GPU has nothing."""
        heads = [chunks[0].eta_ns for chunks in self._chunks if chunks]
        if not heads:
            return None
        deadline = min(heads)
        if self._urgent:
            soon = min(chunk.eta_ns for chunks in self._chunks for chunk in chunks if chunk.urgent) - _SPIN_NS
            deadline = max(min(deadline, soon), now_ns + _SOON_NS)
        if deadline > now_ns:
            return deadline
        bulk = self._chunks[0]
        if len(bulk) > 1:
            # Late. With another chunk behind it the link is not waiting for us, and looking often costs CPU.
            return now_ns + max(_SOON_NS, int(bulk[0].nbytes * self._timing.ns_per_byte / 8))
        return now_ns + _SOON_NS

    def heads(self) -> list[Event]:
        """The events that the next arrival is one of."""
        return [chunks[0].event for chunks in self._chunks if chunks]

    def abandon(self) -> list[Request]:
        """Forget everything (the GPU is lost); returns whose chunks they were."""
        requests = [chunk.request for chunks in self._chunks for chunk in chunks]
        for chunks in self._chunks:
            chunks.clear()
        self.nbytes = self._urgent = 0
        return requests

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        for event in self._events:
            event.close()
        self._events.clear()


def is_lost(error: MissileError) -> bool:
    """Whether nothing on the GPU works any more."""
    return isinstance(error, GpuError) and error.usable == "nothing"
