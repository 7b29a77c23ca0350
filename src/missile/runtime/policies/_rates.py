"""How fast LS requests come at present, and whether that is more than a plan holds for. Pure."""

from __future__ import annotations

import math

__all__ = ["RateWatch"]

_OVER_NS = 100e6  # rates are means over about this time, later arrivals counting more
_BACK = 0.8


class RateWatch:
    """Whether requests come faster than `limit` per second (0.0: never asked), until they come slower than 0.8 of it.

    At 300 requests/s that come independently the rate is off by 13% (one standard deviation); the 0.8 keeps it from going to
    and fro.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._rate = 0.0
        self._at = 0
        self._counted = 0
        self.high = False

    @property
    def per_s(self) -> float:
        """The rate when it was last asked."""
        return self._rate

    def ask(self, now: int, arrived: int) -> bool:
        """Whether `high` has changed. arrived: requests that have come since the start; now: ns."""
        if not self._limit:
            return False
        if now > self._at:
            self._rate *= math.exp((self._at - now) / _OVER_NS)
            self._at = now
        self._rate += (arrived - self._counted) * 1e9 / _OVER_NS
        self._counted = arrived
        was = self.high
        self.high = self._rate > (self._limit * _BACK if was else self._limit)
        return self.high is not was
