"""Which tile shapes are worth trying for a matrix product or a convolution on a GPU. Pure.

A rough cost model ranks a fixed list of shapes; only the best few are compiled and measured, because compiling is what
tuning spends its time on. The model decides what is tried, the measurement what is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Problem", "Tile", "candidates"]


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """A block computes m x n elements of the result in steps of k, with `warps` warps and `stages` steps in flight."""

    m: int
    n: int
    k: int
    stages: int
    warps: int


@dataclass(frozen=True, slots=True)
class Problem:
    """batch products of (m x k) by (k x n), fp16. taps: a convolution's kernel positions, each a sum over k (else 1)."""

    m: int
    n: int
    k: int
    batch: int = 1
    taps: int = 1


# Rates of one Hopper SM, per ns: matrix operations, bytes from L2, and the latencies in ns that a block pays. Read from
# the H100 data sheet (989 TFLOP/s fp16 and about 5.5 TB/s of L2 over 132 SMs) and rounded; only ratios matter here.
_SMS = 132
_FLOPS = 4500.0
_L2_BYTES = 40.0
_START_NS = 1500.0
_STEP_NS = 650.0  # one dependent trip to L2 and through shared memory
_SHARED_BYTES = 227 * 1024

_SHAPES = tuple(
    Tile(m, n, k, stages, warps)
    for m, n, k, stages, warps in (
        (16, 16, 128, 4, 2),
        (16, 16, 256, 3, 2),
        (16, 32, 128, 4, 2),
        (16, 32, 256, 3, 4),
        (16, 64, 64, 5, 4),
        (16, 64, 128, 4, 4),
        (16, 128, 64, 4, 4),
        (16, 128, 128, 3, 4),
        (32, 16, 128, 4, 2),
        (32, 32, 64, 4, 2),
        (32, 32, 128, 4, 4),
        (32, 64, 64, 4, 4),
        (32, 64, 128, 3, 4),
        (32, 128, 64, 4, 4),
        (64, 16, 128, 4, 4),
        (64, 32, 64, 4, 4),
        (64, 32, 128, 3, 4),
        (64, 64, 32, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 64, 128, 3, 4),
        (64, 128, 32, 4, 4),
        (64, 128, 64, 3, 4),
        (64, 256, 64, 3, 4),
        (128, 32, 64, 4, 4),
        (128, 64, 32, 4, 4),
        (128, 64, 64, 3, 4),
        (128, 128, 32, 4, 4),
        (128, 128, 64, 3, 4),
        (128, 128, 64, 4, 8),
        (128, 256, 64, 3, 8),
        (256, 64, 32, 4, 4),
        (256, 64, 64, 3, 8),
        (256, 128, 64, 3, 8),
    )
)


def candidates(problem: Problem, *, count: int, max_warps: int = 8) -> tuple[Tile, ...]:
    """The `count` most promising tiles for `problem`, best first, none more than padding beyond the problem's sides."""
    fitting = {_shrink(tile, problem, max_warps) for tile in _SHAPES}
    ranked = sorted(fitting, key=lambda tile: (estimate_ns(problem, tile), tile))
    return tuple(_distinct(ranked, count))


def estimate_ns(problem: Problem, tile: Tile) -> float:
    """Rough duration of `problem` with `tile`: waves of blocks, each a start and as many steps as the sum needs."""
    blocks = math.ceil(problem.m / tile.m) * math.ceil(problem.n / tile.n) * problem.batch
    shared = (tile.m + tile.n) * tile.k * 2 * tile.stages
    resident = max(1, min(_SHARED_BYTES // shared, 16 // tile.warps * 2, math.ceil(blocks / _SMS)))
    waves = math.ceil(blocks / (_SMS * resident))
    steps = math.ceil(problem.k / tile.k) * problem.taps
    # wgmma needs four warps and 64 rows; smaller tiles run on the older and slower mma.
    speed = _FLOPS * (1.0 if tile.m >= 64 and tile.warps >= 4 else 0.5)
    busy = max(2 * tile.m * tile.n * tile.k / speed, (tile.m + tile.n) * tile.k * 2 / _L2_BYTES) * resident
    return waves * (_START_NS + steps * max(busy, _STEP_NS / max(1, tile.stages - 1)))


def _shrink(tile: Tile, problem: Problem, max_warps: int) -> Tile:
    """`tile` without the part that would only be padding (sides stay powers of two, at least 16)."""
    m, n, k = (
        min(side, max(16, 1 << (size - 1).bit_length()))
        for side, size in ((tile.m, problem.m), (tile.n, problem.n), (tile.k, problem.k))
    )
    warps = max(1, min(tile.warps, max_warps, m * n // 256))
    return Tile(m, n, k, tile.stages, warps)


def _distinct(ranked: Iterable[Tile], count: int) -> list[Tile]:
    """The first `count`, at most two of the same m and n: variety finds more than neighbours of one guess."""
    chosen: list[Tile] = []
    for tile in ranked:
        if sum(other.m == tile.m and other.n == tile.n for other in chosen) < 2:
            chosen.append(tile)
        if len(chosen) == count:
            break
    return chosen
