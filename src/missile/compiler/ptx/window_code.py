"""The instructions of windows: bits of the pair form's table that accesses which differ by constants share.

What belongs to one window is found by `windows.py`, where its code stands by `placing.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from missile.coloring.carried import Slot
from missile.coloring.shape import WINDOW_ENTRIES, Field
from missile.compiler.ptx.translate import BYTE_AND_WORD, LOAD, PIECE_BITS, Distance, Emitter

__all__ = ["Pace", "WindowEmitter", "WindowParts"]

_PIECE = 1 << PIECE_BITS
_TO_UNIT = PIECE_BITS + 1  # a word is turned left by so much for its highest bit to come where a piece's number starts


@dataclass
class WindowParts:
    """A window's instructions, as `Parts`, and registers: its start, its bits, and the physical place of its start if the
    bit there is 0 (in uniform windows), or of the unit that the start is in (in others, where addresses are wide).

    unit, low: as `Window` has them; uniform are windows with a `low`. known: addresses that were written, by their unit; in
    windows that are not uniform by their byte. shared: bytes from a unit's start that several members are at. alike: windows
    for those, which start so many bytes further; all that is in them is whole units from there.
    above: where the constants have the upper half of addresses, if they are narrow.
    """

    unit: int
    low: int | None
    before: list[str] = field(default_factory=list)
    lookup: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    start: str = ""
    bits: str = ""
    place: str = ""
    known: dict[int, str] = field(default_factory=dict)
    above: int = Field.BASE + 4
    shared: Collection[int] = ()
    alike: dict[int, WindowParts] = field(default_factory=dict)

    def expect(self, places: Iterable[int]) -> None:
        """Members will be at the bytes `places`, which are constants."""
        counts = Counter(at % self.unit for at in set(places))
        self.shared = {rest for rest, count in counts.items() if count > 2}

    @property
    def bits_below(self) -> int:
        """Bits of an address below a unit's number."""
        return self.unit.bit_length() - 1


@dataclass(frozen=True)
class Pace:
    """code: of the loop's start. advance: of its end. Registers: bytes from a window's start; by how much the window's bits
    are turned, and the bytes that the physical place is further, both in uniform windows only."""

    code: list[str]
    advance: list[str]
    now: str
    turn: str
    above: str


class WindowEmitter(Emitter):
    """Writes one function's translations, windows among them."""

    def window(self, address: str, offset: int, unit: int, last: int, low: int | None) -> WindowParts:
        """The bits of the units from `address + offset` on, up to the one that the byte `last` behind that is in.

        unit: bytes that a bit stands for. low: bits of the start below a unit; others are taken for zero. None: the start is
        anywhere in its unit.
        """
        parts = WindowParts(unit, low)
        before, lookup, rest = parts.before, parts.lookup, parts.rest
        parts.start, parts.bits, parts.place = self._word(), self._word(), ""
        kept = unit - 1 if low is None else low  # bits of the start below a unit
        number, word, entry, first = self._word(), self._word(), self.wide(), self._word()
        # Behind the last byte there are more guard frames than a window has.
        if self._shape.wide:
            self._wide_start(parts, address, offset, number, kept)
        else:
            before.append(f"cvt.u32.u64 {parts.start}, {address};")
            if offset:
                before.append(f"add.s32 {parts.start}, {parts.start}, {offset};")
            limit = self._constant("u32", Field.LIMIT, before)
            before.append(f"min.u32 {parts.start}, {parts.start}, {limit};")
            if kept != unit - 1:
                before.append(f"and.b32 {parts.start}, {parts.start}, {kept - unit};")
            before.append(f"shr.u32 {number}, {parts.start}, {parts.bits_below};")
        before.append(f"shr.u32 {word}, {number}, 5;")
        table = self._constant("u64", Field.TABLE if unit == _PIECE else Field.COARSE, lookup)
        lookup += [f"mad.wide.u32 {entry}, {word}, 4, {table};", f"{LOAD}.b32 {first}, [{entry}];"]
        second = first
        if low is None or last >= unit:
            second = self._word()
            lookup.append(f"{LOAD}.b32 {second}, [{entry}+4];")
        rest.append(f"shf.l.wrap.b32 {parts.bits}, {second}, {first}, {number};")
        self._finish(parts, number, rest)
        return parts

    def window_carried(
        self, address: str | Distance, offset: int, unit: int, last: int, low: int | None, slot: Slot
    ) -> WindowParts:
        """As `window`, with bits that the launch carries, of the range that `slot` is for; it has bits for `unit` bytes."""
        parts = WindowParts(unit, low, above=slot.header + Slot.PHYSICAL + 4)
        before, lookup, rest = parts.before, parts.lookup, parts.rest
        kept = unit - 1 if low is None else low
        at = slot.at(unit)
        assert at is not None
        inside = self._inside(address, offset, slot, before)
        if kept != unit - 1:
            before.append(f"and.b32 {inside}, {inside}, {kept - unit};")
        number, parts.bits = self._word(), self._word()
        words = self._carried(inside, unit, at, 2 if low is None or last >= unit else 1, lookup)
        rest += [
            f"shr.u32 {number}, {inside}, {parts.bits_below};",
            f"shf.l.wrap.b32 {parts.bits}, {words[-1]}, {words[0]}, {number};",
        ]
        parts.start = self._word()
        if self._shape.wide:
            rest.append(f"and.b32 {parts.start}, {inside}, {kept};")
            base = self._constant("u64", slot.header + Slot.PHYSICAL, rest)
            self._wide_place(parts, number, base, kept)
        else:
            base = self._constant("u32", slot.header + Slot.BASE, rest)
            rest.append(f"add.s32 {parts.start}, {inside}, {base};")
            if low is None:  # as the units of addresses are numbered
                number = self._word()
                rest.append(f"shr.u32 {number}, {parts.start}, {parts.bits_below};")
        self._finish(parts, number, rest)
        return parts

    def _finish(self, parts: WindowParts, number: str, rest: list[str]) -> None:
        """Where addresses are narrow: what members are found with. number: of the unit that the window starts in."""
        if self._shape.wide:
            return
        if parts.low is None:  # the bit of each unit where its number, modulo 32, turns it to the top from
            turned = self._word()
            rest.append(f"shf.r.wrap.b32 {turned}, {parts.bits}, {parts.bits}, {number};")
            parts.bits = turned
        else:
            parts.place = self._doubled(parts.start, rest)

    def _wide_start(self, parts: WindowParts, address: str, offset: int, number: str, kept: int) -> None:
        """The unit's number and the start in it; the physical place is all 64 bits of the address."""
        before, rest = parts.before, parts.rest
        if offset:
            moved = self.wide()
            before.append(f"add.s64 {moved}, {address}, {offset};")
            address = moved
        low, high = self._word(), self._word()
        before += [f"mov.b64 {{{low}, {high}}}, {address};", f"shf.r.wrap.b32 {number}, {low}, {high}, {PIECE_BITS};"]
        limit = self._constant("u32", Field.FRAMES, before)
        before.append(f"min.u32 {number}, {number}, {limit};")
        if parts.unit != _PIECE:
            before.append(f"shr.u32 {number}, {number}, {parts.bits_below - PIECE_BITS};")
        before.append(f"and.b32 {parts.start}, {low}, {kept};")
        self._wide_place(parts, number, self._constant("u64", Field.BASE, rest), kept)

    def _wide_place(self, parts: WindowParts, number: str, base: str, kept: int) -> None:
        """The physical place of a window's start, or of its unit, the `number`-th from `base` on."""
        rest, place = parts.rest, self.wide()
        rest.append(f"mad.wide.u32 {place}, {number}, {2 * parts.unit}, {base};")
        if parts.low is not None:
            inside, found = self.wide(), self.wide()
            within = self._doubled(parts.start, rest) if kept >= _PIECE else parts.start
            rest += [f"cvt.u64.u32 {inside}, {within};", f"add.s64 {found}, {place}, {inside};"]
            place = found
        parts.place = place

    def _doubled(self, low: str, code: list[str]) -> str:
        """What is above a piece's bytes counts twice: of two places one is the tenant's."""
        above, place = self._word(), self._word()
        code += [f"and.b32 {above}, {low}, {-_PIECE};", f"add.s32 {place}, {low}, {above};"]
        return place

    def inside(self, window: WindowParts, at: int) -> tuple[list[str], str, int]:
        """Instructions for the byte `at` of a window, the register that has a physical address, and what is to be added."""
        number, rest = divmod(at, window.unit)
        code: list[str] = []
        if window.low is None:
            assert 0 <= at <= (WINDOW_ENTRIES - 1) * window.unit
            if rest not in window.shared:
                if at not in window.known:
                    code, window.known[at] = self._anywhere(window, f"{at}")
                return code, window.known[at], 0
            if rest not in window.alike:
                window.alike[rest] = self._alike(window, rest, code)
            window, at = window.alike[rest], at - rest
        else:
            assert 0 <= number < WINDOW_ENTRIES
            assert not rest & window.low
        if number not in window.known:
            turned, bit = self._word(), self._word()
            code += [
                f"shf.l.wrap.b32 {turned}, {window.bits}, {window.bits}, {(number + _TO_UNIT) % 32};",
                f"and.b32 {bit}, {turned}, {_PIECE};",
            ]
            if self._shape.wide:
                window.known[number] = self._from(window, bit, code)
            else:  # the place has a zero there
                place = self._word()
                code.append(f"or.b32 {place}, {window.place}, {bit};")
                window.known[number] = self._joined(place, code, window.above)
        return code, window.known[number], at + (at & -_PIECE)

    def _alike(self, window: WindowParts, rest: int, code: list[str]) -> WindowParts:
        """The window that starts `rest` bytes further, less than a unit, in the same unit or the next: a multiple of units
        from there all threads find as many units further.
        """
        low, number, bits = self._word(), self._word(), self._word()
        code += [
            f"add.s32 {low}, {window.start}, {rest};",
            f"shr.u32 {number}, {low}, {window.bits_below};",
            f"shf.l.wrap.b32 {bits}, {window.bits}, {window.bits}, {number};",
        ]
        place = self._doubled(low, code)
        if self._shape.wide:  # the start counts from its unit
            place = self._from(window, place, code)
        return WindowParts(window.unit, window.unit - 1, start=low, bits=bits, place=place, above=window.above)

    def pace(
        self,
        start: int,
        step: int,
        window: WindowParts,
        head: list[str],
        *,
        jump: int = 0,
        first: int = 0,
        period: int = 0,
    ) -> Pace:
        """How accesses of a loop advance: from `start` by `step` bytes an iteration from the start of windows like `window`,
        held in them. period: by `jump` instead at the end of iteration `first` and every so many from there; 0: never. head:
        gets what the function has to start with.
        """
        held, now = self._word(), self._word()
        head.append(f"mov.b32 {held}, {start};")
        code = []
        turn = above = ""
        if window.low is None:
            code.append(f"min.u32 {now}, {held}, {(WINDOW_ENTRIES - 1) * window.unit};")
        else:
            turn, number, whole, above = self._word(), self._word(), self._word(), self._word()
            code += [
                f"and.b32 {now}, {held}, {WINDOW_ENTRIES * window.unit - 1 - window.low};",
                f"shr.u32 {number}, {now}, {window.bits_below};",
                f"add.s32 {turn}, {number}, {_TO_UNIT};",
                f"and.b32 {whole}, {now}, {-_PIECE};",
                f"add.s32 {above}, {now}, {whole};",
            ]
        advance = [f"add.s32 {held}, {held}, {step};"]
        if period:
            left, turns, more = self._word(), self.take("q"), self._word()
            head.append(f"mov.b32 {left}, {first};")
            advance = [
                f"setp.eq.u32 {turns}, {left}, 0;",
                f"selp.b32 {more}, {jump}, {step}, {turns};",
                f"add.s32 {held}, {held}, {more};",
                f"selp.b32 {left}, {period}, {left}, {turns};",
                f"add.s32 {left}, {left}, -1;",
            ]
        return Pace(code, advance, now, turn, above)

    def paced(self, window: WindowParts, pace: Pace) -> tuple[list[str], str]:
        """Instructions for where `pace` is in a window, and the register that then has the physical address."""
        if window.low is None:
            return self._anywhere(window, pace.now)
        turned, bit, further = self._word(), self._word(), self._word()
        code = [
            f"shf.l.wrap.b32 {turned}, {window.bits}, {window.bits}, {pace.turn};",
            f"and.b32 {bit}, {turned}, {_PIECE};",
            f"or.b32 {further}, {bit}, {pace.above};",
        ]
        return code, self._from(window, further, code)

    def _from(self, window: WindowParts, further: str, code: list[str]) -> str:
        """The register that has the address `further` bytes from a window's physical place."""
        if not self._shape.wide:
            place = self._word()
            code.append(f"add.s32 {place}, {window.place}, {further};")
            return self._joined(place, code, window.above)
        extended, physical = self.wide(), self.wide()
        code += [f"cvt.u64.u32 {extended}, {further};", f"add.s64 {physical}, {window.place}, {extended};"]
        return physical

    def _anywhere(self, window: WindowParts, at: str) -> tuple[list[str], str]:
        low, number, turned, unit, place = (self._word() for _ in range(5))
        piece = number if window.unit == _PIECE else self._word()
        code = [
            f"add.s32 {low}, {window.start}, {at};",
            f"shr.u32 {number}, {low}, {window.bits_below};",
            f"shf.l.wrap.b32 {turned}, {window.bits}, {window.bits}, {number};",
            *([f"shr.u32 {piece}, {low}, {PIECE_BITS};"] if piece != number else []),
            f"shf.l.wrap.b32 {unit}, {turned}, {piece}, 1;",
            f"prmt.b32 {place}, {low}, {unit}, {BYTE_AND_WORD:#x};",
        ]
        # Where addresses are wide, the start counts from its unit.
        return code, self._from(window, place, code) if self._shape.wide else self._joined(place, code, window.above)

    def nowhere(self) -> tuple[list[str], str]:
        """An address of the tenant's own, for an access that is not made."""
        code: list[str] = []
        return code, self._constant("u64", Field.OWN, code)
