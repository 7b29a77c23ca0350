"""Pairs of units that a map has on one slice or on two: whether they disturb each other as that asks for.

A single measurement may be off: the second reader came too late to be felt, or other work made it twice as long. So a pair
that answers against the map is measured again, *the same two units*, and its median counts. New units would give a slice
which in truth is two another chance each time; the same two lie on one slice or on two, and say so again. Measures through
functions, so it is pure otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.probe.channel_map import Verdict

__all__ = ["REPEATS", "PairTests", "judge_pairs"]

Ratio = Callable[[], float]

REPEATS = 7  # measurements of a pair whose first one is not taken at its word
_CLEAR = 1.3  # slowdown on one slice over that on two, from which contention tells them apart
_CUT = 1 / 3  # of the way from what two slices show to the most that one does: some pairs may do more than others


@dataclass(frozen=True, slots=True)
class PairTests:
    """What was found. same, apart: slowdown of each pair, in the order given; cut: from which two units count as on one
    slice; again: how many pairs were measured more than once."""

    verdict: Verdict
    same: npt.NDArray[np.float64]
    apart: npt.NDArray[np.float64]
    cut: float
    again: int


class _Pair:
    def __init__(self, ratio: Ratio) -> None:
        self.ratio = ratio
        self.seen = [ratio()]

    @property
    def once(self) -> bool:
        return len(self.seen) == 1

    @property
    def slowdown(self) -> float:
        return float(np.median(self.seen))


def judge_pairs(same: Sequence[Ratio], apart: Sequence[Ratio], sure: int) -> PairTests:
    """Whether pairs on one slice (`same`) disturb each other and pairs on two (`apart`) do not.

    Each is a function that measures the slowdown of one pair, the same two units at each call. sure: so many of `apart`,
    from the start, are on slices that more than the map tells apart: what they show is what two slices show. UNSURE where
    no pair on one slice differs from them: contention shows nothing then.
    """
    ours, others = [_Pair(ratio) for ratio in same], [_Pair(ratio) for ratio in apart]
    while True:
        level = float(np.median([pair.slowdown for pair in others[:sure]]))
        # The most, not the median: where slices are several, only some of these pairs are on one.
        most = max(ours, key=lambda pair: pair.slowdown)
        shows, cut = most.slowdown >= _CLEAR * level, level + _CUT * (most.slowdown - level)
        against = [pair for pair in ours if pair.slowdown < cut] + [pair for pair in others if pair.slowdown >= cut]
        if not shows or not against:
            break
        # First the one that all are held against: a spike must not make others measure again, nor move the cut.
        doubted = [most] if most.once else [pair for pair in against if pair.once]
        if not doubted:
            break
        for _ in range(REPEATS - 1):  # in turn, so that a disturbance of some length does not meet one pair each time
            for pair in doubted:
                pair.seen.append(pair.ratio())
    on_one, on_two = np.array([pair.slowdown for pair in ours]), np.array([pair.slowdown for pair in others])
    verdict = Verdict.DISAGREES if against else Verdict.AGREES
    if not shows:
        verdict = Verdict.UNSURE
    return PairTests(verdict, on_one, on_two, cut, sum(not pair.once for pair in (*ours, *others)))
