"""Numbers for people from loads on the link: percentiles, shares over windows, fairness. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from missile.pcie.load import LoadResult
from missile.pcie.ticket import Direction
from missile.statistics import nearest_rank, supports

__all__ = ["jain", "latency_summary", "share_deviation", "windows"]

Floats = npt.NDArray[np.float64]


def jain(amounts: Sequence[float] | Floats) -> float:
    """Jain's fairness index of amounts that should be equal: 1 when they are, 1/n when one has everything."""
    values = np.asarray(amounts, np.float64)
    squares = float((values**2).sum())
    return float(values.sum()) ** 2 / (len(values) * squares) if squares else 1.0


def latency_summary(times_ns: npt.NDArray[np.int64]) -> dict[str, float | int | None]:
    """Copies, and p50, p99, p99.9 and maximum in microseconds: latencies that a copy had (None: no copy lies beyond)."""
    ordered = np.sort(times_ns)
    count = len(ordered)

    def at(rank: int) -> float:
        return round(float(ordered[rank]) / 1e3, 2)

    def quantile(q: float) -> float | None:
        return at(nearest_rank(count, q)) if supports(count, q) else None

    return {
        "copies": count,
        "p50_us": quantile(0.5),
        "p99_us": quantile(0.99),
        "p999_us": quantile(0.999),
        "max_us": at(-1) if count else None,
    }


def windows(
    result: LoadResult, direction: Direction, window_ns: int, *, step_ns: int, skip_ns: int
) -> tuple[list[str], Floats]:
    """Bytes of each tenant that arrived in every window of `window_ns`, each `step_ns` after the one before.

    Returns the tenants, sorted, and an array of shape (windows, tenants). The first `skip_ns` are left out.
    """
    suffix = f" {direction}"
    names = sorted(key.removesuffix(suffix) for key in result.chunks if key.endswith(suffix))
    starts = np.arange(skip_ns, result.duration_ns - window_ns + 1, step_ns)
    table = np.zeros((len(starts), len(names)))
    for column, name in enumerate(names):
        rows = result.chunks[name + suffix]
        summed = np.concatenate(([0], np.cumsum(rows[:, 1])))
        first, last = (np.searchsorted(rows[:, 0], edge) for edge in (starts, starts + window_ns))
        table[:, column] = summed[last] - summed[first]
    return names, table


def share_deviation(
    result: LoadResult,
    weights: Mapping[str, float],
    *,
    direction: Direction = Direction.H2D,
    window_ns: int = 100_000_000,
) -> dict[str, Any]:
    """How far the tenants' shares are from their weights over any `window_ns` (every millisecond one begins).

    worst: the largest relative error of any tenant in any window; jain: the smallest index of amounts over weights.
    """
    names, table = windows(result, direction, window_ns, step_ns=1_000_000, skip_ns=10_000_000)
    ideal = np.array([weights[name] for name in names], np.float64)
    ideal /= ideal.sum()
    shares = table / table.sum(axis=1, keepdims=True)
    return {
        "weights": dict(weights),
        "windows": len(table),
        "worst": round(float(np.abs(shares / ideal - 1).max()), 5) if len(table) else None,
        "jain": round(min((jain(row / ideal) for row in table), default=1.0), 6),
        "shares": {name: round(float(share), 5) for name, share in zip(names, shares.mean(axis=0), strict=True)},
    }
