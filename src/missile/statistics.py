"""Which of sorted samples is a quantile: one rule for everything that gives percentiles. Pure."""

from __future__ import annotations

import math
from typing import Final

__all__ = ["nearest_rank", "supports"]

_ROUNDING: Final = 1e-9  # what n * q may be off an integer by, as a float


def supports(n: int, q: float) -> bool:
    """Whether at least one of `n` samples would lie beyond the q-quantile (0 < q < 1)."""
    return n * (1 - q) >= 1 - _ROUNDING


def nearest_rank(n: int, q: float) -> int:
    """Which of `n` sorted samples (n >= 1) is the q-quantile, counting from 0: the first with a share of q up to it."""
    return max(math.ceil(q * n - _ROUNDING), 1) - 1
