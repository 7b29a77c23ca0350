"""A queue of LS requests beside which BE runs while they can afford it: how much longer the tail is, and how long BE runs.

Pure. Requests that come independently are served one after another, at full speed, or slower while BE runs beside them; BE
does while every request there is expected to end within a bound (the rule of option `lend` of policy `missile`). There is
no formula for that queue, so one fixed stretch of arrivals is played through it. Times are in units of a request's time
alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

__all__ = ["Lending", "lending"]

_REQUESTS = 3000
_SEED = 1
_LEAVING = 0.15  # how long a request goes half as fast while BE leaves: some tens of microseconds of some hundreds


class Lending(NamedTuple):
    """stretch: p99 of latencies over that where BE never runs beside requests. lent, idle: shares of the time in which BE
    runs beside requests, and in which none is there."""

    stretch: float
    lent: float
    idle: float


@lru_cache(maxsize=512)
def lending(load: float, slower: float, bound: float) -> Lending:
    """load: requests that come in the time that one takes alone, below 1. slower: how many times as long one takes beside
    BE. bound: how long after its arrival each request there has to be expected to end for BE to run beside it; 0.0: never.
    """
    if not 0.0 <= load < 1.0:
        return Lending(math.inf, 0.0, 0.0)
    if not load:
        return Lending(1.0, 0.0, 1.0)
    arrivals = np.cumsum(np.random.default_rng(_SEED).exponential(1.0 / load, _REQUESTS)).tolist()
    pausing, _, idle_then = _play(arrivals, slower, 0.0)
    beside, lent, idle = _play(arrivals, slower, bound)
    # Of these arrivals a little more or less of the time is idle than of all that could have come, and less or more lent.
    usual = min((1.0 - load) * idle / idle_then, 1.0)
    return Lending(beside / pausing, lent * (1.0 - usual) / (1.0 - idle), usual)


def _play(arrivals: Sequence[float], slower: float, bound: float) -> tuple[float, float, float]:
    """p99 of latencies, and the shares of time lent and idle."""
    latencies: list[float] = []
    there: deque[float] = deque()  # arrivals
    now = left = lent = idle = half_until = 0.0
    lends = False
    coming = iter([*arrivals, math.inf])
    following = next(coming)
    while following < math.inf or there:
        if not there:
            idle += following - now
            now = following
        else:
            speed = 1.0 / slower if lends else 0.5 if now < half_until else 1.0
            until = min(now + left / speed, following, half_until if now < half_until and not lends else math.inf)
            left -= (until - now) * speed
            lent += (until - now) * lends
            now = until
            if left <= 1e-9:
                latencies.append(now - there.popleft())
                left = 1.0
        if following <= now:
            if not there:
                left = 1.0
                lends = True  # BE is there
            there.append(following)
            following = next(coming)
        could, lends = lends, bool(there) and _affords(there, left, now, bound)
        if could and there and not lends:
            half_until = now + _LEAVING
    return float(np.quantile(latencies, 0.99)), lent / now, idle / now


def _affords(there: Sequence[float], left: float, now: float, bound: float) -> bool:
    """Whether all are expected to end within `bound` of their arrivals, at full speed."""
    return all(now + left + place - arrival <= bound for place, arrival in enumerate(there))
