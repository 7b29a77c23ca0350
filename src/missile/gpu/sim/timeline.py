"""The simulated clock and what is due: a heap of callbacks beside the SMs' own next event."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from missile.gpu.sim.compute import Compute

__all__ = ["Timeline"]


class Timeline:
    """Time in ns. `host` is the host thread's clock; the GPU's events are carried out up to it, never beyond."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.host = 0.0
        self.changes = 0  # how often an event or a stream has completed something: cheap "look again" for waiters
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0

    def at(self, time: float, action: Callable[[float], None]) -> None:
        """Call `action(time)` when the clock gets there; actions of one time in the order in which they were given."""
        self._count += 1
        heapq.heappush(self._due, (time, self._count, action))

    def spend(self, ns: float) -> None:
        """The host thread is busy for `ns`; the GPU goes on meanwhile."""
        self.host += ns
        self.catch_up()

    def catch_up(self) -> None:
        while self.step(self.host):
            pass

    def next_ns(self) -> float:
        """When something happens next on the GPU; infinity when nothing ever will."""
        return min(self._due[0][0], self.compute.next_ns) if self._due else self.compute.next_ns

    def step(self, limit: float) -> bool:
        """Carry out the next happening if it is due by `limit`. False when there is none."""
        compute = self.compute
        time = self._due[0][0] if self._due else math.inf
        if compute.next_ns <= time:
            time = compute.next_ns
            if time > limit or time == math.inf:
                return False
            compute.advance(time)
            for kernel in compute.finished():
                kernel.finish(time)
            compute.settle()
            return True
        if time > limit:
            return False
        _, _, action = heapq.heappop(self._due)
        action(time)
        if compute.dirty:
            compute.settle()
        return True
