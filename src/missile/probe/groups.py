"""Slices in groups that share what lies behind them: decided by contention, every slice tested more than once.

A reader of one slice beside a writer to another takes as long as alone, unless they share something. On an H200 it takes
x4.8 and more within a group of 16, x7.7 and more on one slice, and at most x1.4 beside a few slices of other groups that
it only brushes against. So the cut lies half way (of the logarithm) between nothing and what one slice does to itself, a
slice joins a group when two of its members agree, and then every slice is tested against its own group and another. What
contradicts that, or the sizes, or how the groups lie along the hash, is decided anew by three members of every group.
Measures through a function, so it is pure otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.errors import NoisyGpuError
from missile.probe.channel_map import Verdict, Witness
from missile.probe.rings import renamed_groups, ring_of, strangers

__all__ = ["Groups", "check_groups", "find_groups"]

Ints = npt.NDArray[np.int64]
Ratio = Callable[[int, int], float]

WITNESS = "channels"
_SHOWS = 1.5  # slowdown on one slice from which contention can tell anything
_CUT = 0.5  # share of the logarithm of that slowdown from which two slices share something
_UNCLEAR = 0.15  # that near to the cut, two more measurements decide
_NEAREST = 8  # groups that a slice is tried against
_VOTES = 3
_ROUNDS = 3
_PAIRS = 8  # slices that the slowdown on one slice is taken from


@dataclass(frozen=True, slots=True)
class Groups:
    """members: slices of each group, ascending; none where contention shows nothing. witness: how sure that is."""

    members: tuple[tuple[int, ...], ...]
    witness: Witness


@dataclass(slots=True)
class _Tests:
    """Tests of two slices each, and what came of them."""

    ratio: Ratio
    level: float
    made: int = 0

    def share(self, victim: int, aggressor: int) -> tuple[bool, float]:
        """Whether the two share something, and the slowdown."""
        found = self.ratio(victim, aggressor)
        self.made += 1
        if abs(self._place(found) - _CUT) < _UNCLEAR:
            found = float(np.median([found, self.ratio(victim, aggressor), self.ratio(victim, aggressor)]))
            self.made += 2
        return self._place(found) >= _CUT, found

    def _place(self, ratio: float) -> float:
        return float(np.log(max(ratio, 1e-3)) / np.log(self.level))


def find_groups(
    centres: npt.NDArray[np.float32],
    permutations: Sequence[Ints],
    ratio: Ratio,
    rng: np.random.Generator,
    known: Sequence[Sequence[int]] = (),
) -> Groups:
    """Groups of all slices. NoisyGpuError, saying which slice, where contention contradicts itself again and again.

    centres: latencies of each slice, shape (slices, SMs): near slices are tried first. permutations: those of the map's
    pages. ratio(victim, aggressor): slowdown of a reader on one slice beside a writer to another, measured at each call.
    known: groups of another chip with this hash, under names that a permutation makes this one's.
    """
    tests = _tests(ratio, len(centres), rng)
    if tests.level < _SHOWS:
        says = f"A writer on the very slice slows a reader x{tests.level:.2f}: nothing tells what slices share."
        return Groups((), Witness(WITNESS, Verdict.UNSURE, says, {"same": tests.level}))
    groups = _merged(_first(centres, tests, rng), tests, rng)
    again: set[int] = set()
    moved: set[int] = set()
    open_ = set(range(len(centres)))
    inside: list[float] = []
    outside: list[float] = []
    for _ in range(_ROUNDS):
        doubted, *seen = _contradicted(groups, open_, centres, tests, rng)
        if not again:
            inside, outside = seen
        # How groups lie says where to look again, not what is true.
        doubted |= _oversize(groups) | _undersize(groups)
        doubted |= (strangers(groups, permutations) | renamed_groups(known, groups, permutations)[1]) - again
        if not doubted:
            break
        again |= doubted
        open_ = {slice_ for slice_ in doubted if _settle(slice_, groups, tests, rng)}
        moved |= open_
        groups = [group for group in groups if group]
    wrong: set[int] = set()
    if again:
        wrong, inside, outside = _contradicted(groups, set(range(len(centres))), centres, tests, rng)
        # One disturbed measurement in a dozen unsettles a slice: what contradicts itself does so each time.
        wrong = {slice_ for slice_ in wrong if all(_settle(slice_, groups, tests, rng) for _ in range(_ROUNDS))}
        groups = [group for group in groups if group]
    if wrong:
        raise NoisyGpuError(
            f"Contention puts slice {min(wrong)} now in one group of slices, now in another ({len(wrong)} slices in all): "
            "probe again while nothing else runs on the GPU."
        )
    if _oversize(groups) or _undersize(groups):
        sizes = sorted(len(group) for group in groups)
        raise NoisyGpuError(
            f"Slices that share what lies behind them come in groups of {', '.join(map(str, sizes))}, which no GPU has, "
            "even after a second look: probe again while nothing else runs on the GPU."
        )
    members = tuple(sorted(tuple(sorted(group)) for group in groups))
    return Groups(members, _witness(members, permutations, known, tests, inside, outside, len(again), len(moved)))


def check_groups(
    groups: Sequence[Sequence[int]], centres: npt.NDArray[np.float32], ratio: Ratio, rng: np.random.Generator
) -> Witness:
    """Whether the groups of a map hold on the GPU at hand: every slice against its own group and against another."""
    if not groups:
        return Witness(WITNESS, Verdict.NOT_RUN, "The map knows no groups of slices.")
    tests = _tests(ratio, len(centres), rng)
    if tests.level < _SHOWS:
        says = f"A writer on the very slice slows a reader x{tests.level:.2f}: nothing tells what slices share."
        return Witness(WITNESS, Verdict.UNSURE, says, {"same": tests.level})
    parts = [list(group) for group in groups]
    wrong, inside, outside = _contradicted(parts, set(range(len(centres))), centres, tests, rng)
    contradicted = {slice_ for slice_ in wrong if _settle(slice_, parts, tests, rng)}
    numbers = _numbers(groups, tests, inside, outside) | {"again": len(wrong), "wrong": len(contradicted)}
    if contradicted:
        says = f"Contention puts {len(contradicted)} of {len(centres)} slices in another group than the map does."
        return Witness(WITNESS, Verdict.DISAGREES, says, numbers)
    return Witness(WITNESS, Verdict.AGREES, _says(groups, inside, outside) + ".", numbers)


def _tests(ratio: Ratio, slices: int, rng: np.random.Generator) -> _Tests:
    some = rng.permutation(slices)[:_PAIRS]
    return _Tests(ratio, max(1.0 + 1e-6, float(np.median([ratio(int(s), int(s)) for s in some]))), len(some))


def _first(centres: npt.NDArray[np.float32], tests: _Tests, rng: np.random.Generator) -> list[list[int]]:
    """Each slice into the nearest group of which two members (the only one, where there is but one) share with it."""
    groups: list[list[int]] = []
    for slice_ in range(len(centres)):
        leaders = np.array([group[0] for group in groups], np.int64)
        near = np.argsort(np.linalg.norm(centres[leaders] - centres[slice_], axis=1))[:_NEAREST]
        for place in near:
            group = groups[int(place)]
            others = [group[0]] + ([int(rng.choice(group[1:]))] if len(group) > 1 else [])
            if all(tests.share(slice_, other)[0] for other in others):
                group.append(slice_)
                break
        else:
            groups.append([slice_])
    return groups


def _merged(groups: list[list[int]], tests: _Tests, rng: np.random.Generator) -> list[list[int]]:
    """Groups that are parts of one, joined: a test that failed once makes a second group, which near slices then join."""
    usual = _usual(groups)
    done: list[list[int]] = []
    for group in sorted(groups, key=len, reverse=True):
        for other in done if len(group) < usual else []:
            pairs = [(int(rng.choice(group)), int(rng.choice(other))) for _ in range(_VOTES)]
            if sum(tests.share(*pair)[0] for pair in pairs) * 2 > len(pairs):
                other.extend(group)
                break
        else:
            done.append(group)
    return done


def _contradicted(
    groups: list[list[int]],
    slices: set[int],
    centres: npt.NDArray[np.float32],
    tests: _Tests,
    rng: np.random.Generator,
) -> tuple[set[int], list[float], list[float]]:
    """Those of `slices` that share nothing with a member of their group or something with one of the nearest other group.

    Also the slowdowns of those that don't: within their group and outside.
    """
    middles = np.array([centres[group].mean(axis=0) for group in groups])
    wrong: set[int] = set()
    inside: list[float] = []
    outside: list[float] = []
    for place, group in enumerate(groups):
        for slice_ in group:
            if slice_ not in slices:
                continue
            others = [other for other in group if other != slice_]
            distance = np.linalg.norm(middles - centres[slice_], axis=1)
            distance[place] = np.inf
            stranger = int(rng.choice(groups[int(distance.argmin())])) if len(groups) > 1 else None
            within, mine = tests.share(slice_, int(rng.choice(others))) if others else (True, tests.level)
            beyond, theirs = tests.share(slice_, stranger) if stranger is not None else (False, 1.0)
            if not within or beyond:
                wrong.add(slice_)
                continue
            inside.append(mine)
            outside.append(theirs)
    return wrong, inside, outside


def _settle(slice_: int, groups: list[list[int]], tests: _Tests, rng: np.random.Generator) -> bool:
    """Put a slice where most of three members of a group say, if that is one group. Whether anything contradicts it there.

    A slice that no group wants stays alone; one that two want stays where it was, and is contradicted.
    """
    home = next(place for place, group in enumerate(groups) if slice_ in group)
    wanted = []
    for place, group in enumerate(groups):
        others = [other for other in group if other != slice_]
        asked = [int(other) for other in rng.permutation(others)[:_VOTES]]
        if asked and sum(tests.share(slice_, other)[0] for other in asked) * 2 > len(asked):
            wanted.append(place)
    if wanted == [home] or (not wanted and len(groups[home]) == 1):
        return False
    if len(wanted) == 1:
        groups[home].remove(slice_)
        groups[wanted[0]].append(slice_)
    elif not wanted:
        groups[home].remove(slice_)
        groups.append([slice_])
    return True


def _usual(groups: Sequence[Sequence[int]]) -> int:
    """The size that most slices' groups have; of equals the larger."""
    counts = Counter(len(group) for group in groups)
    return max(counts, key=lambda size: (counts[size] * size, size))


def _oversize(groups: list[list[int]]) -> set[int]:
    """Slices of groups larger than usual: parts of a GPU may be switched off, never added."""
    usual = _usual(groups)
    return {slice_ for group in groups if len(group) > usual for slice_ in group}


def _undersize(groups: list[list[int]]) -> set[int]:
    """Slices of groups less than half as large as usual."""
    usual = _usual(groups)
    return {slice_ for group in groups if 2 * len(group) < usual for slice_ in group}


def _witness(
    members: tuple[tuple[int, ...], ...],
    permutations: Sequence[Ints],
    known: Sequence[Sequence[int]],
    tests: _Tests,
    inside: list[float],
    outside: list[float],
    again: int,
    moved: int,
) -> Witness:
    numbers = _numbers(members, tests, inside, outside) | {"again": again, "moved": moved}
    parts = [_says(members, inside, outside), f"decided anew: {again}, of them differently: {moved}"]
    verdict = Verdict.AGREES
    if ring_of(members, permutations) is not None and (out := strangers(members, permutations)):
        verdict = Verdict.UNSURE
        numbers["strangers"] = len(out)
        parts.append(f"{len(out)} slices stand apart from their group in the order that the hash gives them")
    if known:
        differ = renamed_groups(known, members, permutations)[0]
        numbers["differ"] = differ
        parts.append(
            "these are the known chip's groups, renamed"
            if not differ
            else f"{differ} slices are in other groups than the known chip's, renamed"
        )
    return Witness(WITNESS, verdict, "; ".join(parts) + ".", numbers)


def _numbers(
    groups: Sequence[Sequence[int]], tests: _Tests, inside: list[float], outside: list[float]
) -> dict[str, float]:
    return {
        "groups": len(groups),
        "same": round(tests.level, 3),
        "inside_min": round(min(inside, default=0.0), 3),
        "outside_max": round(max(outside, default=0.0), 3),
        "cut": round(float(tests.level**_CUT), 3),
        "tests": tests.made,
    }


def _says(groups: Sequence[Sequence[int]], inside: list[float], outside: list[float]) -> str:
    sizes = sorted({len(group) for group in groups})
    count = sum(len(group) for group in groups)
    size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    most = max(outside, default=1.0)
    if sizes[-1] == 1:
        return (
            f"No two of {count} slices share anything: beside a writer to another, a reader takes x{most:.2f} at most"
        )
    return (
        f"{count} slices in {len(groups)} groups of {size}: a reader beside a writer in its group takes "
        f"x{min(inside, default=0.0):.2f} or more, beside one in another x{most:.2f} at most"
    )
