"""Keeps the front end's event loop from sleeping while calls come often, where there are processors to spare.

Each request wakes the front end twice: when it comes, and when its answer is there. Waking takes as long as a processor
needs to run a process that sleeps (see `engine.spin`, whose rule this follows).
"""

from __future__ import annotations

import asyncio
import os
import time

from missile.serving.engine.spin import STOLEN_NS, Spin

__all__ = ["LEAST_PROCESSORS", "Awake"]

LEAST_PROCESSORS = 8
"""With fewer, a second one that is kept busy, besides the engine's, is missed elsewhere: by clients, for example."""


class Awake:
    """limit_ns: the longest mean gap between calls for which the loop stays awake; 0: never. Belongs to the event loop.

    While it is awake it puts itself into the loop's next turn, so that the loop looks for input and doesn't wait for it.
    """

    def __init__(self, limit_ns: int, *, processors: int | None = None) -> None:
        there = len(os.sched_getaffinity(0)) if processors is None else processors
        self._spin = Spin(limit_ns if there >= LEAST_PROCESSORS else 0)
        self._used = self._looked = 0
        self.turning = False

    def called(self, now_ns: int) -> None:
        """A call has come."""
        self._spin.called(now_ns)
        if not self.turning and now_ns < self._spin.until_ns(now_ns):
            self.turning = True
            self._looked, self._used = now_ns, time.thread_time_ns()
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        now, used = time.monotonic_ns(), time.thread_time_ns()
        away = (now - self._looked) - (used - self._used)
        self._looked, self._used = now, used
        if away > STOLEN_NS:  # a turn takes as long as the calls in it; only what was not its own counts
            self._spin.rest(now)
            self.turning = False
        elif now >= self._spin.until_ns(now):
            self.turning = False
        else:
            asyncio.get_running_loop().call_soon(self._turn)
