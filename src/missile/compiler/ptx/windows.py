"""Which accesses take their bits from one window of the pair form's table, looked up once.

Addresses that differ by constants, those of a loop's iterations among them, lie in a few consecutive pieces of memory. The
bits of 32 of those fit in a register, so one lookup before all of them is enough.

What is found here decides whether an access reaches the right place. That it reaches the tenant's own memory does not depend
on it: the code that is written (`WindowEmitter.window`) holds the window in the memory and the access in the window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from missile.coloring.shape import WINDOW_ENTRIES
from missile.compiler.ptx.access import Access
from missile.compiler.ptx.blocks import Blocks
from missile.compiler.ptx.loops import Loop, Visit
from missile.compiler.ptx.pointers import Traced, trace_of
from missile.compiler.ptx.sums import Sum, Values, signed
from missile.compiler.ptx.syntax import Function

__all__ = ["Advance", "Member", "Window", "find_windows"]


@dataclass(frozen=True, slots=True)
class Advance:
    """How far an access goes from one iteration to the next, bytes: `step`, but `jump` behind iteration `first` and every
    `period` iterations from there. period: 0 where it never jumps.
    """

    step: int = 0
    jump: int = 0
    first: int = 0
    period: int = 0

    def after(self, count: int) -> int:
        """Bytes that it has gone when iteration `count` starts, the first being 0."""
        jumps = 0 if not self.period or count <= self.first else (count - 1 - self.first) // self.period + 1
        return count * self.step + jumps * (self.jump - self.step)


@dataclass(frozen=True, slots=True)
class Member:
    """An access `start` bytes from its window's start in the first iteration of the loop `block`; None: outside of loops."""

    access: Access
    start: int
    advance: Advance
    block: int | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """anchor: an access whose address is the same but for a constant; the window starts `offset` bytes from that. It stands
    before all members; or it is in the loop `block`, and its address in the first iteration is meant, before the loop.

    unit: bytes that a bit stands for. low: bits below a unit that the start can have set; with them no member's place
    carries into the next unit, so all threads find a member in the same unit from the start. None where that is not sure.
    last: the last byte that a member starts at, from the window's start.
    """

    anchor: Access
    offset: int
    block: int | None
    unit: int
    low: int | None
    last: int
    members: Sequence[Member]


@dataclass(frozen=True, slots=True)
class _Range:
    """Where an access goes, in bytes from an address that is common to its group.

    first: in the first iteration. places: wherever it is made. known: whether the address is known in the first iteration.
    """

    access: Access
    block: int
    loop: bool
    first: int
    advance: Advance
    places: frozenset[int]
    known: bool

    @property
    def lowest(self) -> int:
        return min(self.places)

    @property
    def highest(self) -> int:
        return max(self.places)


@dataclass(frozen=True, slots=True)
class _Group:
    """Accesses whose addresses differ by constants, in order. terms: what they have in common. zero: the address that ranges
    count from, without that."""

    terms: tuple[tuple[int, int], ...]
    zero: int
    ranges: Sequence[_Range]


def find_windows(
    function: Function,
    blocks: Blocks,
    accesses: Sequence[Access],
    aligned: Mapping[str, int],
    units: Sequence[int],
    traced: Traced | None = None,
) -> tuple[list[Window], list[Access]]:
    """Windows, and the accesses that are never made (copies of nothing).

    aligned: bytes that pointers among the parameters are multiples of, by name: wrong ones make wrong code. units: bytes
    that a bit can stand for. traced: what `trace_of` says of the same, where the caller has it.
    """
    traced = traced or trace_of(function, blocks, accesses, aligned)
    values, trace = traced.values, traced.trace
    never = [access for access, visit in trace.visits.items() if not visit.made]
    members: dict[tuple[tuple[int, int], ...], list[tuple[Access, int, Sequence[Visit], bool]]] = {}
    for access, visit in trace.visits.items():
        if visit.made:
            block = blocks.units[blocks.index_at(access.instruction.start)].block
            members.setdefault(visit.address.terms, []).append((access, block, [visit], False))
    for loop in trace.loops:
        for access, visits in loop.visits.items():
            seen = {visit.address.terms for visit in visits if visit.made}
            if not seen:
                never.append(access)
            elif len(seen) == 1 and not _inside_another(blocks, loop):
                members.setdefault(seen.pop(), []).append((access, loop.block, visits, True))
    windows = []
    for terms, found in members.items():
        found.sort(key=lambda m: m[0].instruction.start)
        group = _group(terms, found)
        windows += _Cutting(group, values, blocks, units).run()
    return windows, never


def _inside_another(blocks: Blocks, loop: Loop) -> bool:
    """Whether a loop goes around `loop`, which then is run more than once."""
    return any(
        source >= loop.block >= target and (source, target) != (loop.block, loop.block)
        for target in range(loop.block + 1)
        for source in blocks.sources(target)
    )


def _group(terms: tuple[tuple[int, int], ...], members: Sequence[tuple[Access, int, Sequence[Visit], bool]]) -> _Group:
    """Those that advance evenly."""
    first = next(v.address for v in members[0][2] if v.made)
    zero, width = first.constant, first.width
    ranges = []
    for access, block, visits, loop in members:
        at = {
            index: signed(v.address.constant - zero & (1 << width) - 1, width)
            for index, v in enumerate(visits)
            if v.made
        }
        found = _advance(at)
        if found is not None:
            start, advance = found
            # Before iterations that make no access it may be anywhere: what the address is in the first has to be known.
            known = visits[0].address == Sum.of(width, zero + start, terms)
            ranges.append(_Range(access, block, loop, start, advance, frozenset(at.values()), known))
    return _Group(terms, zero, ranges)


def _advance(at: Mapping[int, int]) -> tuple[int, Advance] | None:
    """Where in the first iteration, and how from there, an access goes that is `at` these places by iteration."""
    (first, start), *others = at.items()
    step = (others[0][1] - start) // (others[0][0] - first) if others else 0
    if all(place == start + step * (index - first) for index, place in at.items()):
        return start - step * first, Advance(step)
    indices = list(at)
    if indices != list(range(len(indices))):
        return None
    steps = [at[index + 1] - at[index] for index in indices[:-1]]
    step = max(set(steps), key=lambda s: (steps.count(s), -s))
    jumps = [index for index, s in enumerate(steps) if s != step]
    period = jumps[1] - jumps[0] if len(jumps) > 1 else len(at)
    advance = Advance(step, steps[jumps[0]], jumps[0], period)
    return (start, advance) if steps == [_step_behind(advance, index) for index in indices[:-1]] else None


def _step_behind(advance: Advance, index: int) -> int:
    behind = index - advance.first
    return advance.jump if behind >= 0 and behind % advance.period == 0 else advance.step


class _Cutting:
    """Cuts a group into windows."""

    def __init__(self, group: _Group, values: Values, blocks: Blocks, units: Sequence[int]) -> None:
        self._group = group
        self._blocks = blocks
        self._lows = {u: values.bits(Sum.of(u.bit_length() - 1, 0, group.terms)) for u in units}
        self._left = list(group.ranges)

    def run(self) -> list[Window]:
        """From the longest range on, each window with what is near."""
        windows = []
        for wide in sorted(self._group.ranges, key=lambda r: (r.lowest - r.highest, r.lowest)):
            if wide not in self._left:
                continue
            taken = [wide]
            for near in sorted(self._left, key=lambda r: _distance(r, wide)):
                if near is not wide and self._span([*taken, near]) is not None:
                    taken.append(near)
            window = self._window(wide, taken)
            self._left.remove(wide)
            if window is not None:
                windows.append(window)
                inside = {member.access.instruction.start for member in window.members}
                self._left = [r for r in self._left if r.access.instruction.start not in inside]
        return windows

    def _window(self, wide: _Range, taken: Sequence[_Range]) -> Window | None:
        """A window over `wide` and those of `taken` that it can be one for; None where it would be for one access alone."""
        first = min(r.block for r in taken)
        anchors = [r for r in self._group.ranges if not r.loop and self._blocks.follows(first, r.block)]
        if anchors:
            anchor = min(anchors, key=lambda r: (r not in taken, r.access.instruction.start))
        elif wide.loop and wide.known:
            anchor = wide
        else:
            return None
        kept = [r for r in taken if self._is_behind(r, anchor)]
        span = self._span(kept) if wide in kept else None
        if span is None or (len(kept) == 1 and not wide.loop):
            return None
        start, unit, low, last = span
        members = [
            Member(r.access, r.first - start, r.advance, r.block if r.loop else None)
            for r in sorted(kept, key=lambda r: r.access.instruction.start)
        ]
        block = anchor.block if anchor.loop else None
        return Window(anchor.access, start - anchor.first, block, unit, low, last, members)

    def _is_behind(self, given: _Range, anchor: _Range) -> bool:
        if not self._blocks.follows(given.block, anchor.block):
            return False
        return anchor.loop or given.access.instruction.start >= anchor.access.instruction.start

    def _span(self, taken: Sequence[_Range]) -> tuple[int, int, int | None, int] | None:
        """Start of a window over `taken`, its unit, its `low`, and its last byte; None where it is too long."""
        zero = self._group.zero
        lowest, highest = min(r.lowest for r in taken), max(r.highest for r in taken)
        # The longer the unit, the more members share what they take from a window.
        for unit, low in sorted(self._lows.items(), reverse=True):
            inside = {(zero + place) % unit for r in taken for place in r.places}
            start = lowest - (zero + lowest) % unit
            fits = highest - start < WINDOW_ENTRIES * unit
            if fits and not any(low & place for place in inside) and low + max(inside) < unit:
                return start, unit, low, highest - start
        for unit in sorted(self._lows):  # shorter ones take an instruction less
            # A window that starts anywhere in its first unit reaches one unit less far.
            if highest - lowest <= (WINDOW_ENTRIES - 1) * unit:
                return lowest, unit, None, highest - lowest
        return None


def _distance(one: _Range, other: _Range) -> int:
    return max(one.lowest - other.highest, other.lowest - one.highest)
