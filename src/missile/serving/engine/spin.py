"""How long the engine looks for the next call before it sleeps: pure.

Waking a process that sleeps costs its waker a system call, and the call the time until a processor runs it again (20 to
300 us on small virtual machines). So while calls come often the engine stays awake for the next one, at the price of one
processor; when they come seldom, or stop, it sleeps. It also sleeps for a while when somebody else wanted the processor
meanwhile: who has used one up waits longest for the next turn, and who wakes is served first.
"""

from __future__ import annotations

__all__ = ["STOLEN_NS", "Spin"]

STOLEN_NS = 300_000
"""Between two looks, longer than any step of a loop that looks for calls: somebody else had the processor."""

_NEWEST = 0.125  # weight of the newest gap in the running mean
_YIELD_NS = 200_000_000  # how long a loop then doesn't stay awake
_PATIENCE = 3.0  # gaps that vary by chance are rarely longer than this many of their mean


class Spin:
    """limit_ns: the longest mean gap between calls that is worth staying awake for; 0: never."""

    def __init__(self, limit_ns: int) -> None:
        self._limit = limit_ns
        self._last = 0
        self._looked = 0
        self._not_before = 0
        self._gap = 4.0 * limit_ns  # a longer one counts as this much: a pause must not be remembered for long

    def called(self, now_ns: int) -> None:
        """A call has come."""
        gap = min(now_ns - self._last, 4 * self._limit)
        self._gap += _NEWEST * (gap - self._gap)
        self._last = now_ns

    def until_ns(self, now_ns: int) -> int:
        """The time until which the next call is worth waiting for awake; 0 when it is not. Looking begins now."""
        self._looked = now_ns
        if self._gap > self._limit or now_ns < self._not_before:
            return 0
        return self._last + int(_PATIENCE * self._gap)

    def stolen(self, now_ns: int) -> bool:
        """Whether the processor was somebody else's since the last look; then it is better to sleep now."""
        took, self._looked = now_ns - self._looked, now_ns
        if took < STOLEN_NS:
            return False
        self.rest(now_ns)
        return True

    def rest(self, now_ns: int) -> None:
        """Somebody else wants the processor: waiting awake is not worth it for a while."""
        self._not_before = now_ns + _YIELD_NS
