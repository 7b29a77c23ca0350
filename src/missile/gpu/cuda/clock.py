"""Events' times on the host's clock.

The driver only tells the time between two events, as a float32 of milliseconds. So an *anchor* event is recorded on an
idle stream between two readings of the host's clock; it was reached between them, which bounds the error by half their
distance, and other events are placed relative to it. Anchors are renewed, because two oscillators drift apart and because
a float32 of milliseconds loses its nanoseconds with distance (2^-24 of it: 30 ns after 0.5 s, 4 us after a minute).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from missile.gpu.cuda.driver import Driver

__all__ = ["EventClock"]

_RENEW_NS = 500_000_000
_TRIES = 3  # the narrowest bracket wins, and one near the narrowest ever ends the search: the caller is waiting
_FIRST_TRIES = 32


class EventClock:
    """Maps timing events of one context onto `now`. `error_ns` bounds the current anchor's error."""

    def __init__(self, cu: Driver, stream: Any, now: Callable[[], int] = time.perf_counter_ns) -> None:
        self._cu = cu
        self._stream = stream
        self._now = now
        create = cu.api.CUevent_flags.CU_EVENT_DEFAULT
        self._anchor = cu("cuEventCreate", create)
        self._spare = cu("cuEventCreate", create)
        self._anchor_ns = 0
        self.error_ns = 0
        self._narrowest = 0
        for _ in range(2):  # the first event of a process sets things up
            self._renew(_FIRST_TRIES)

    def host_ns(self, event: Any) -> int:
        """When `event` (a finished timing CUevent) was reached, ns on the host's clock."""
        if self._now() - self._anchor_ns > _RENEW_NS:
            self._renew(_TRIES)
        milliseconds: float = self._cu("cuEventElapsedTime", self._anchor, event)
        return self._anchor_ns + round(milliseconds * 1e6)

    def close(self) -> None:
        for event in (self._anchor, self._spare):
            self._cu.release("cuEventDestroy", event)

    def _renew(self, tries: int) -> None:
        best = 0
        for attempt in range(tries):
            begin, end = self._bracket()
            if attempt == 0 or end - begin < best:
                best = end - begin
                self._anchor, self._spare = self._spare, self._anchor
                self._anchor_ns = (begin + end) // 2
            if best <= 1.5 * self._narrowest:
                break
        self._narrowest = min(best, self._narrowest or best)
        self.error_ns = best // 2

    def _bracket(self) -> tuple[int, int]:
        """Record the spare event on the idle stream; it was reached between the two times returned."""
        cu, spare = self._cu, self._spare
        query, not_ready = cu.api.cuEventQuery, cu.api.CUresult.CUDA_ERROR_NOT_READY
        begin = self._now()
        cu("cuEventRecord", spare, self._stream)
        while (status := query(spare)[0]) == not_ready:
            pass
        end = self._now()
        if status:
            raise cu.failure("cuEventQuery", status)
        return begin, end
