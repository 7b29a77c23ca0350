"""Where translations stand: once for all accesses through an address, and their lookups as early as they can be.

A lookup takes a while, and a warp waits at the first instruction that wants its result. At the start of a loop's body it
passes while the warp waits for data and products anyway, and lookups of several addresses pass together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from missile.coloring.carried import Slot
from missile.compiler.ptx.access import Access
from missile.compiler.ptx.blocks import Blocks, Slice
from missile.compiler.ptx.edits import Edit, apply, lines
from missile.compiler.ptx.flow import Flow
from missile.compiler.ptx.pointers import Pointers, trace_of
from missile.compiler.ptx.syntax import Function, Instruction
from missile.compiler.ptx.translate import Distance, Parts
from missile.compiler.ptx.unrolling import Unrolled, unrolled
from missile.compiler.ptx.window_code import Pace, WindowEmitter, WindowParts
from missile.compiler.ptx.windows import Advance, Member, Window, find_windows

__all__ = ["place_early"]

_SUMS = 4
_KINDS = {"b16": "h", "b32": "w", "b64": "d", "pred": "q"}


def place_early(
    source: str,
    function: Function,
    accesses: Sequence[Access],
    flow: Flow,
    emitter: WindowEmitter,
    *,
    hoist: bool,
    keep: bool = False,
    aligned: Mapping[str, int] | None = None,
    units: Sequence[int] = (),
    slots: Mapping[str, Slot] | None = None,
    address_bits: int = 64,
    unroll: int = 0,
) -> tuple[list[Edit], list[str], int]:
    """Edits that translate the addresses of `accesses`, what the function has to start with, and how many translations.

    An address that one instruction computes is translated once, behind that instruction or (where no other block wants
    it) before the first access. Others are translated for the accesses of a block that find the same value. hoist: look up
    early; else where the translation stands. keep: where a block is a loop's body, look up again only what has changed.
    aligned: bytes that pointers among the parameters are multiples of, by name: accesses that differ by constants then share
    what they looked up (`windows.py`); None: they don't. slots: by the name of a pointer where the launch carries bits of
    what it points into, which lookups outside of loops then take. address_bits: of addresses that matter, from the lowest.
    unroll: with windows, loops are written out where that takes at most so many statements.
    """
    blocks = Blocks(function)
    windows: Sequence[Window] = ()
    never: Sequence[Access] = ()
    pointers = Pointers(flow, {}, {}, aligned or {})
    copies: Mapping[int, Unrolled] = {}
    if aligned is not None:
        traced = trace_of(function, blocks, accesses, aligned, address_bits)
        windows, never = find_windows(function, blocks, accesses, aligned, units, traced)
        pointers = Pointers(flow, traced.pointers(), slots or {}, aligned)
        copies = unrolled(function, blocks, traced.trace.loops, unroll)
    placing = _Placing(source, blocks, flow, emitter, hoist, keep, pointers, copies)
    return placing.run(accesses, [window for window in windows if placing.has_place(window)], never)


@dataclass(frozen=True, slots=True)
class _Plan:
    """One translation. stand: where in the source what follows the lookup stands; behind: behind an instruction there."""

    base: str
    offset: int
    accesses: list[Access]
    stand: int
    behind: bool
    early: Slice | None
    before: int  # the unit before which the value of `base` is meant
    window: Window | None = None  # that starts at `base + offset`
    slot: Slot | None = None  # of the range that the launch carries the bits of


class _Placing:
    def __init__(
        self,
        source: str,
        blocks: Blocks,
        flow: Flow,
        emitter: WindowEmitter,
        hoist: bool,
        keep: bool,
        pointers: Pointers,
        loops: Mapping[int, Unrolled],
    ) -> None:
        self._source = source
        self._blocks = blocks
        self._flow = flow
        self._emitter = emitter
        self._hoist = hoist
        self._keep = keep
        self._pointers = pointers
        self._unrolled = loops  # loops, by their blocks
        self._kept: dict[tuple[int, int], list[Parts]] = {}  # by block and unit: lookups that stand together
        self._paces: dict[tuple[int, int, Advance, int, int | None], Pace] = {}
        self._head: list[str] = []
        self._own = ""  # has an address of the tenant's own, once there is one
        self._edits: list[Edit] = []
        self._copies: dict[tuple[int, str], str] = {}  # new names, by unit and register

    def run(
        self, accesses: Sequence[Access], windows: Sequence[Window], never: Sequence[Access]
    ) -> tuple[list[Edit], list[str], int]:
        apart = {m.access.instruction.start for window in windows for m in window.members}
        apart |= {access.instruction.start for access in never}
        groups: dict[tuple[str, int, int, int | None], list[Access]] = {}
        for access in accesses:
            base = access.address.base
            assert base is not None
            if access.instruction.start not in apart:
                groups.setdefault((base, access.address.offset, *self._value(base, access)), []).append(access)
        plans = [self._plan(base, offset, members) for (base, offset, *_), members in groups.items()]
        plans += [self._window_plan(window) for window in windows]
        plans = [replace(plan, slot=self._slot(plan)) for plan in plans]
        # From early to late, so that a copy of what an address is computed from serves those that stand later.
        for plan in sorted(plans, key=lambda p: p.early.at if p.early else p.before):
            self._write(plan)
        for (block, at), lookups in self._kept.items():
            self._insert(Slice((), at, block), self._changed(lookups))
        for access in never:
            self._edits.append(Edit(access.address.start, access.address.end, f"[{self._nowhere()}]"))
        for loop in self._unrolled.values():
            self._edits = loop.written(self._source, self._edits)
        return self._edits, self._head, len(plans)

    def _value(self, base: str, access: Access) -> tuple[int, int | None]:
        """What tells the value that `access` finds in `base` from others: its block and unit, -1 for the only one ever."""
        if self._only(base) is not None:
            return -1, None
        index = self._blocks.index_at(access.instruction.start)
        block = self._blocks.units[index].block
        return block, self._blocks.definition(base, index, block)

    def _only(self, base: str) -> Instruction | None:
        found = self._flow.only_definition(base)
        return None if found is None or found.root == "call" else found

    def _plan(self, base: str, offset: int, accesses: list[Access]) -> _Plan:
        units = self._blocks.units
        places = [self._blocks.index_at(a.instruction.start) for a in accesses]
        first = accesses[0].instruction.start
        definition = self._only(base)
        if definition is None:
            before, block = places[0], units[places[0]].block
            return _Plan(base, offset, accesses, first, False, self._slice(base, before, block), before)
        home = self._blocks.index_at(definition.start)
        block = units[home].block
        if all(place > home and units[place].block == block for place in places):
            return _Plan(base, offset, accesses, first, False, self._slice(base, home + 1, block), home + 1)
        local = home in places  # in an inner scope, with registers of its own
        early = None if local else self._slice(base, home + 1, block)
        return _Plan(base, offset, accesses, definition.end, True, early, home + 1)

    def has_place(self, window: Window) -> bool:
        """Whether the address that `window` starts from can be had before all its members."""
        if window.block is None:
            return True
        base = window.anchor.address.base
        assert base is not None
        place = self._blocks.index_at(window.anchor.instruction.start)
        found = self._slice(base, place, window.block)
        first = self._blocks.first_of(window.block)
        return found is not None and found.at == first and first > 0

    def _window_plan(self, window: Window) -> _Plan:
        access = window.anchor
        base = access.address.base
        assert base is not None
        offset = access.address.offset + window.offset
        if window.block is None:
            return replace(self._plan(base, offset, [access]), window=window)
        # What the address is computed from in the loop, in front of it.
        place = self._blocks.index_at(access.instruction.start)
        first = self._blocks.first_of(window.block)
        found = self._slice(base, place, window.block)
        assert found is not None
        return _Plan(base, offset, [], self._blocks.units[first - 1].end, True, found, place, window)

    def _slice(self, base: str, before: int, block: int) -> Slice | None:
        found = self._blocks.slice(base, before, block) if self._hoist else None
        if found is None or any(self._kind(t.text) is None for u in found.units for t in self._blocks.units[u].targets):
            return None
        return found

    def _kind(self, register: str) -> str | None:
        declared = self._flow.type_of(register)
        return _KINDS.get(declared if declared == "pred" else "b" + declared[1:] if declared[:1] in "bsu" else "")

    def _slot(self, plan: _Plan) -> Slot | None:
        """Of the bits for `plan` that the launch carries. In loops the table's words are in the L1 cache."""
        window = plan.window
        stands = self._blocks.units[self._blocks.index_at(plan.stand)].block
        ahead = window is not None and window.block is not None
        if self._blocks.is_in_loop(stands if ahead or plan.early is None else plan.early.block):
            return None
        slot = self._pointers.slot_of(plan.accesses[0] if window is None else window.anchor)
        return slot if slot is None or window is None or slot.at(window.unit) is not None else None

    # --- text
    def _write(self, plan: _Plan) -> None:
        early, window = plan.early, plan.window
        ahead = window is not None and window.block is not None
        address, code = plan.base, []
        # In front of a loop it is computed for the first iteration, so that no other translation can use it.
        names = {} if ahead else self._copies
        if early is not None:
            code = [copy for copy in (self._copy(unit, early, names) for unit in early.units) if copy]
            found = self._blocks.definition(plan.base, plan.before, early.block)
            address = plan.base if found is None else names.get((found, plan.base), plan.base)
        parts = self._parts(plan, address, {} if early is None else names)
        rest = parts.rest
        if early is None or ahead:
            rest = [*code, *parts.before, *parts.lookup, *parts.rest]
        else:
            code += parts.before
            if self._keep and isinstance(parts, Parts) and parts.key and self._blocks.repeats(early.block):
                self._kept.setdefault((early.block, early.at), []).append(parts)
            else:
                code += parts.lookup
            self._insert(early, code)
        self._edits.append(_edit(plan.stand, rest, plan.behind))
        if isinstance(parts, Parts):
            self._edits += [Edit(a.address.start, a.address.end, f"[{parts.physical}]") for a in plan.accesses]
        elif window is not None:
            self._use_all(parts, window.members)

    def _parts(self, plan: _Plan, address: str, names: Mapping[tuple[int, str], str]) -> Parts | WindowParts:
        """The instructions for `plan`, whose address the register `address` has. names: of what was computed anew for it."""
        window, slot = plan.window, plan.slot
        if slot is None:
            if window is None:
                return self._emitter.split(address, plan.offset)
            return self._emitter.window(address, plan.offset, window.unit, window.last, window.low)
        where: str | Distance = address
        found = self._pointers.distance(plan.base, slot)
        if found is not None:
            # What is added to the pointer: so the address itself need not be computed.
            where, unit = found, self._blocks.index_at(self._flow.definitions[plan.base][0].start)
            block = self._blocks.units[unit].block
            written = self._blocks.definition(found.register, unit, block)
            if written is not None and (written, found.register) in names:
                where = replace(found, register=names[written, found.register])
        if window is None:
            return self._emitter.split_carried(where, plan.offset, slot)
        return self._emitter.window_carried(where, plan.offset, window.unit, window.last, window.low, slot)

    def _use_all(self, window: WindowParts, members: Sequence[Member]) -> None:
        """Translate the addresses of a window's members, as they follow each other: later ones use what is there."""
        runs = [(self._unrolled.get(-1 if block is None else block), list(run)) for block, run in _by_block(members)]
        fixed = [m.start for loop, run in runs if loop is None for m in run if m.advance == Advance()]
        fixed += [m.start + m.advance.after(i) for loop, run in runs if loop is not None for m, i in loop.uses(run)]
        window.expect(fixed)
        for loop, run in runs:
            if loop is None:
                for member in run:
                    self._edits += self._use(window, member)
                continue
            for member, index in loop.uses(run):
                at = member.start + member.advance.after(index)
                loop.edits[index] += self._used(member.access, *self._emitter.inside(window, at))
            for member, index in loop.unused(run):
                loop.edits[index] += self._used(member.access, [], self._nowhere())

    def _use(self, window: WindowParts, member: Member) -> list[Edit]:
        if member.block is None or member.advance == Advance():
            return self._used(member.access, *self._emitter.inside(window, member.start))
        return self._used(member.access, *self._emitter.paced(window, self._pace(member, member.block, window)))

    def _used(self, access: Access, code: list[str], physical: str, beyond: int = 0) -> list[Edit]:
        """Edits for an access to `beyond` bytes from the address that the register `physical` has behind `code`."""
        address = Edit(access.address.start, access.address.end, f"[{physical}+{beyond}]")
        return [_edit(access.instruction.start, code, behind=False), address]

    def _pace(self, member: Member, block: int, window: WindowParts) -> Pace:
        """How the loop `block` advances its members that go like `member`, written where it starts and ends."""
        key = (block, member.start, member.advance, window.unit, window.low)
        if key not in self._paces:
            advance = member.advance
            pace = self._paces[key] = self._emitter.pace(
                member.start,
                advance.step,
                window,
                self._head,
                jump=advance.jump,
                first=advance.first,
                period=advance.period,
            )
            units = self._blocks.units_of(block)
            self._edits.append(_edit(units[0].start, pace.code, behind=False))
            self._edits.append(_edit(units[-1].start, pace.advance, behind=False))
        return self._paces[key]

    def _nowhere(self) -> str:
        """The register that has an address of the tenant's own: accesses that are not made get it, in case that they are."""
        if not self._own:
            code, self._own = self._emitter.nowhere()
            self._head += code
        return self._own

    def _changed(self, lookups: list[Parts]) -> list[str]:
        """All of `lookups` again where one of their keys is not that of the loop's last iteration."""
        other, skip = self._emitter.take("q"), f"missile_kept_{len(self._head)}"
        last = [self._emitter.take("w") for _ in lookups]
        # No table is so long that it has an entry -1.
        self._head += [f"mov.b32 {register}, -1;" for register in last]
        code: list[str] = []
        sums: list[str] = []  # several, so that they don't wait for each other
        for index, (parts, before) in enumerate(zip(lookups, last, strict=True)):
            change = self._emitter.take("w")
            code.append(f"xor.b32 {change}, {parts.key}, {before};")
            if index < _SUMS:
                sums.append(change)
            else:
                code.append(f"or.b32 {sums[index % _SUMS]}, {sums[index % _SUMS]}, {change};")
        code += [f"or.b32 {sums[0]}, {sums[0]}, {change};" for change in sums[1:]]
        code += [f"setp.ne.u32 {other}, {sums[0]}, 0;", f"@!{other} bra {skip};"]
        for parts, before in zip(lookups, last, strict=True):
            code += [*parts.lookup, f"mov.b32 {before}, {parts.key};"]
        return [*code, f"{skip}:"]

    def _insert(self, early: Slice, code: list[str]) -> None:
        units = self._blocks.units
        if early.at > self._blocks.first_of(early.block):
            self._edits.append(_edit(units[early.at - 1].end, code, behind=True))
        else:
            self._edits.append(_edit(units[early.at].start, code, behind=False))

    def _copy(self, index: int, early: Slice, names: dict[tuple[int, str], str]) -> str:
        """Unit `index` with new names for what it writes, which go to `names`; "" where there is such a copy already."""
        unit = self._blocks.units[index]
        if all((index, target.text) in names for target in unit.targets):
            return ""
        changes = []
        for target in unit.targets:
            kind = self._kind(target.text)
            assert kind is not None
            name = names.setdefault((index, target.text), self._emitter.take(kind))
            changes.append(Edit(target.start, target.end, name))
        for read in unit.reads:
            found = self._blocks.definition(read.text, index, early.block)
            if found is not None and (found, read.text) in names:
                sign = "!" if read.negated else ""
                changes.append(Edit(read.start, read.end, sign + names[found, read.text]))
        return apply(self._source, changes, unit.start, unit.end)


def _by_block(members: Sequence[Member]) -> Iterable[tuple[int | None, Iterable[Member]]]:
    return groupby(members, key=lambda member: member.block)


def _edit(where: int, code: list[str], behind: bool) -> Edit:
    return Edit(where, where, "\n\t" + lines(code).rstrip() if behind else lines(code))
