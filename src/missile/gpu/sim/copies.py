"""The copy engines: one for each direction, each serving its copies one after another in the order of issue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from missile.gpu.sim.timeline import Timeline

__all__ = ["CopyEngine", "PendingCopy"]


class PendingCopy:
    """A copy on its way: `move` moves the bytes at its end, then `finish` is called (when somebody waits)."""

    __slots__ = ("done", "engine", "finish", "move", "nbytes", "ready", "submitted")

    def __init__(self, engine: CopyEngine, nbytes: int, ready: float, move: Callable[[], None]) -> None:
        self.engine = engine
        self.nbytes = nbytes
        self.ready = ready
        self.move = move
        self.submitted = False
        self.done = False
        self.finish: Callable[[float], None] | None = None


class CopyEngine:
    """One direction of the link. A copy takes `overhead_ns + nbytes / rate`, times the noise's next factor."""

    def __init__(self, timeline: Timeline, bytes_per_ns: float, overhead_ns: float, noise: Callable[[], float]) -> None:
        self._timeline = timeline
        self._rate = bytes_per_ns
        self._overhead = overhead_ns
        self._noise = noise
        self._queue: deque[PendingCopy] = deque()
        self._busy = False

    @property
    def idle(self) -> bool:
        return not self._queue

    def submit(self, copy: PendingCopy, now: float) -> None:
        copy.submitted = True
        self._queue.append(copy)
        if not self._busy:
            self._next(now)

    def _next(self, now: float) -> None:
        copy = self._queue[0]
        self._busy = True
        start = max(now, copy.ready)
        duration = (self._overhead + copy.nbytes / self._rate) * self._noise()
        self._timeline.at(start + duration, self._ended)

    def _ended(self, now: float) -> None:
        copy = self._queue.popleft()
        self._busy = False
        copy.done = True
        copy.move()
        if self._queue:
            self._next(now)
        if copy.finish is not None:
            copy.finish(now)
