"""The order that a hash gives its slices, and how groups of slices lie in it. Pure arithmetic.

A digit that is a sum modulo n turns by one for some page: among the renamings of slices that pages use there are then
rotations, whose cycles are rings of n slices. What stands together on the chip is a run of a ring (on an H200 of 7 or 8 of
47 digits, in both rings). That is a rule seen, not a law: it says which slices to look at again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

__all__ = ["renamed_groups", "ring_of", "strangers"]

Ints = npt.NDArray[np.int64]

_SHORTEST = 5  # slices in a ring
_MOST_BROKEN = 0.15  # runs more than there need be, over slices, up to which the rule is still seen
_MOST_DIFFERENT = 0.1  # share of the slices that may differ where another chip's groups are still taken for a guide


def ring_of(groups: Sequence[Sequence[int]], permutations: Sequence[Ints]) -> Ints | None:
    """The rings of slices, shape (rings, n), in the order in which the groups make the fewest runs.

    None where the pages' renamings rotate nothing, or the groups are no runs in any order.
    """
    slices = sum(len(group) for group in groups)
    owner = _owner(groups, slices)
    best: tuple[int, Ints] | None = None
    for permutation in permutations:
        rings = _cycles(permutation)
        if rings is None:
            continue
        runs = sum(_runs(owner[ring]) for ring in rings)
        if best is None or runs < best[0]:
            best = runs, rings
    if best is None:
        return None
    least = sum(len(np.unique(owner[ring])) for ring in best[1])
    return best[1] if best[0] - least <= _MOST_BROKEN * slices else None


def strangers(groups: Sequence[Sequence[int]], permutations: Sequence[Ints]) -> set[int]:
    """Slices that break the order: alone between others of one group, or at the ends of a run longer than usual."""
    rings = ring_of(groups, permutations)
    if rings is None or len(groups) < 2:
        return set()
    owner = _owner(groups, rings.size)
    found: set[int] = set()
    cut = [_split(ring, owner) for ring in rings]
    lengths = Counter(len(run) for runs in cut for run in runs)
    usual = max(lengths, key=lambda length: (lengths[length] * length, length))
    for runs in cut:
        times = Counter(int(owner[run[0]]) for run in runs)
        for run in runs:
            if rings.shape[1] > len(run) > usual:
                found |= {int(run[0]), int(run[-1])}
            if times[int(owner[run[0]])] > 1 and 2 * len(run) < usual:
                found |= set(run.tolist())
    return found


def renamed_groups(
    known: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], permutations: Sequence[Ints]
) -> tuple[int, set[int]]:
    """How many slices are in other groups than under the renaming of `known` that fits best, and which.

    None are named where so many differ that `known` says nothing here.
    """
    slices = sum(len(group) for group in groups)
    if not known or sum(len(group) for group in known) != slices:
        return 0, set()
    mine, theirs = _owner(groups, slices), _owner(known, slices)
    best: set[int] | None = None
    for permutation in permutations:
        # Slice s of the known chip is called permutation[s] here.
        there = np.empty(slices, np.int64)
        there[permutation] = theirs
        overlap = np.zeros((len(groups), len(known)), np.int64)
        np.add.at(overlap, (mine, there), 1)
        rows, columns = linear_sum_assignment(-overlap)
        match = np.full(len(groups), -1)
        match[rows] = columns
        differ = {int(slice_) for slice_ in np.flatnonzero(match[mine] != there)}
        if best is None or len(differ) < len(best):
            best = differ
    differ = best or set()
    return len(differ), differ if len(differ) <= _MOST_DIFFERENT * slices else set()


def _owner(groups: Sequence[Sequence[int]], slices: int) -> Ints:
    out = np.empty(slices, np.int64)
    for place, group in enumerate(groups):
        out[list(group)] = place
    return out


def _cycles(permutation: Ints) -> Ints | None:
    """The permutation's cycles as rows, None where they are not all of one length, long enough."""
    seen = np.zeros(len(permutation), np.bool_)
    cycles: list[list[int]] = []
    for start in range(len(permutation)):
        if seen[start]:
            continue
        cycle = []
        slice_ = start
        while not seen[slice_]:
            seen[slice_] = True
            cycle.append(slice_)
            slice_ = int(permutation[slice_])
        if len(cycle) < _SHORTEST or (cycles and len(cycle) != len(cycles[0])):
            return None
        cycles.append(cycle)
    return np.array(cycles, np.int64)


def _runs(owners: Ints) -> int:
    """Runs of equal owners around a ring."""
    return max(1, int((owners != np.roll(owners, 1)).sum()))


def _split(ring: Ints, owner: Ints) -> list[Ints]:
    """The ring cut into runs of one owner each."""
    starts = np.flatnonzero(owner[ring] != np.roll(owner[ring], 1))
    if not starts.size:
        return [ring]
    turned = np.roll(ring, -int(starts[0]))
    return np.split(turned, (starts - starts[0])[1:])
