"""A token bucket in exact integer arithmetic, with the clock passed in."""

from __future__ import annotations

from typing import Final

from missile.errors import InternalError

__all__ = ["TokenBucket"]

_NANO: Final = 1_000_000_000


class TokenBucket:
    """Fills at `rate` bytes/s up to `capacity` bytes, between `resume` and `pause`. Starts paused.

    Levels are kept in bytes x 10^-9, so that no rounding accumulates however often it is asked.
    """

    __slots__ = ("_capacity", "_level", "_rate", "_since")

    def __init__(self, rate: float, capacity: int, *, full: bool) -> None:
        self._rate = max(1, round(rate))
        self._capacity = capacity * _NANO
        self._level = self._capacity if full else 0
        self._since: int | None = None

    def resume(self, now_ns: int, *, at_most: int | None = None) -> None:
        """Start filling at `now_ns`; what was left counts, up to `at_most` bytes."""
        if at_most is not None:
            self._level = min(self._level, at_most * _NANO)
        if self._since is None:
            self._since = now_ns

    def pause(self, now_ns: int) -> None:
        self.refill(now_ns)
        self._since = None

    def refill(self, now_ns: int) -> None:
        if self._since is not None and now_ns > self._since:
            self._level = min(self._capacity, self._level + self._rate * (now_ns - self._since))
            self._since = now_ns

    def holds(self, nbytes: int) -> bool:
        """Whether it holds `nbytes` as of the last refill."""
        return self._level >= nbytes * _NANO

    def take(self, nbytes: int) -> None:
        """Remove `nbytes`; what is not there is not owed."""
        self._level = max(0, self._level - nbytes * _NANO)

    def take_held(self, nbytes: int) -> None:
        """Remove `nbytes` that it must hold."""
        if not self.holds(nbytes):
            raise InternalError(f"A token bucket was asked for {nbytes} bytes that it does not hold.")
        self._level -= nbytes * _NANO

    def time_of(self, nbytes: int, now_ns: int) -> int:
        """When it has held or will hold `nbytes` if nothing is taken, ns; may lie in the past, by the same slope."""
        missing = nbytes * _NANO - self._level
        return now_ns - (-missing // self._rate)

    @property
    def level(self) -> float:
        """Bytes, as of the last refill."""
        return self._level / _NANO
