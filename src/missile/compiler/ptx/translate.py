"""The instructions that turn a logical address into a physical one, for each form of translation.

They compute exactly what `missile.coloring.translation` computes; tests interpret one and compare with the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from missile.coloring.carried import Slot
from missile.coloring.shape import CONSTANTS, WINDOW_ENTRIES, Escape, Field, Form, Shape, TableSpace

__all__ = [
    "BYTE_AND_WORD",
    "LOAD",
    "PIECE_BITS",
    "SHARED_TABLE",
    "Distance",
    "Emitter",
    "Parts",
    "module_declarations",
    "parameter",
    "prologue",
]

SHARED_TABLE = "missile_table"


def parameter(nbytes: int = Field.BYTES) -> str:
    """The declaration of the constants.

    They arrive with the launch: a first touch of a const bank of the module's own would miss in every launch.
    """
    return f".param .align 8 .b8 {CONSTANTS}[{nbytes}]"


LOAD = "ld.global.L1::evict_last"
"""Of tables, which nobody writes while kernels run, and which are used again and again."""

PIECE_BITS = 8
"""Bits of an address in a piece of 256 bytes: its lowest byte."""

BYTE_AND_WORD = 0x6540
"""For prmt: the first operand's lowest byte, below the second one's three lowest."""


@dataclass
class Parts:
    """A translation's instructions: before its lookup, the lookup in the table, which takes a while, and the rest.

    key: the register that says what is looked up: the same again gives the same. "" where that is not kept apart.
    physical: the register that has the physical address at the end.
    """

    before: list[str] = field(default_factory=list)
    lookup: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    key: str = ""
    physical: str = ""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far an address lies behind a range's start: what the register has, of 64 bits, or `factor` times what one of 32
    has. Its lower 32 bits count."""

    register: str
    factor: int | None


class Emitter:
    """Writes translations for one function. Registers that it takes are counted, to be declared once."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._count = {"w": 0, "d": 0, "h": 0, "q": 0}

    def translate(self, address: str, offset: int = 0, *, guard: str = "", size: str = "") -> tuple[list[str], str]:
        """Instructions for the logical address `address + offset`, and the register that then has the physical one.

        guard: the predicate (`%p1`, `!%p1`) under which the access is made, size: the register with the number of bytes
        that it reads; only accesses that are made are counted or trapped. "": made in any case.
        """
        parts = self.split(address, offset, guard=guard, size=size)
        return [*parts.before, *parts.lookup, *parts.rest], parts.physical

    def split(self, address: str, offset: int = 0, *, guard: str = "", size: str = "") -> Parts:
        """As `translate`, in parts."""
        parts = Parts()
        before = parts.before
        if self._shape.wide:
            if offset:
                logical = self.wide()
                before.append(f"add.s64 {logical}, {address}, {offset};")
                address = logical
            low, high, frame = self._word(), self._word(), self._word()
            before += [
                f"mov.b64 {{{low}, {high}}}, {address};",
                f"shf.r.wrap.b32 {frame}, {low}, {high}, {self._shape.frame_bits};",
            ]
        else:
            # Nobody uses the upper half of the address: the assembler leaves out what computes it.
            low, frame = self._word(), self._word()
            before.append(f"cvt.u32.u64 {low}, {address};")
            if offset:
                before.append(f"add.s32 {low}, {low}, {offset};")
            if self._shape.form is Form.STEP:  # needs the address bounded, not the frame's number
                limit = self._constant("u32", Field.LIMIT, before)
                before.append(f"min.u32 {low}, {low}, {limit};")
            before.append(f"shr.u32 {frame}, {low}, {self._shape.frame_bits};")
        if self._shape.wide or self._shape.form is not Form.STEP:
            before += self._bound(frame, guard, size)
        form: Callable[[str, str, Parts], str] = {
            Form.IN_PAGE: self._in_page,
            Form.ARITHMETIC: self._arithmetic,
            Form.SHADOW: self._shadow,
            Form.PAIR: self._pair,
            Form.STEP: self._step,
        }[self._shape.form]
        parts.physical = form(frame, low, parts)
        return parts

    def split_carried(self, address: str | Distance, offset: int, slot: Slot) -> Parts:
        """As `split`, in the pair form, with bits that the launch carries of the range that `slot` is for."""
        parts = Parts()
        before, lookup, code = parts.before, parts.lookup, parts.rest
        low = self._inside(address, offset, slot, before)
        unit, at = slot.words[0]
        ahead = self._shape.head_bytes // (WINDOW_ENTRIES * unit)  # words for what only windows begin in
        if slot.nbytes < WINDOW_ENTRIES * unit:
            word = self._constant("b32", at + 4 * ahead, lookup)
        else:
            (word,) = self._carried(low, unit, at, 1, lookup)
        piece, turned, which, place = self._word(), self._word(), self._word(), self._word()
        code.append(f"shr.u32 {piece}, {low}, {PIECE_BITS};")
        number = piece
        if unit != 1 << PIECE_BITS:
            number = self._word()
            code.append(f"shr.u32 {number}, {low}, {unit.bit_length() - 1};")
        code += [
            f"shf.l.wrap.b32 {turned}, {word}, {word}, {number};",
            f"shf.l.wrap.b32 {which}, {turned}, {piece}, 1;",
            f"prmt.b32 {place}, {low}, {which}, {BYTE_AND_WORD:#x};",
        ]
        parts.physical = self._further(place, slot, code)
        return parts

    def _inside(self, address: str | Distance, offset: int, slot: Slot, code: list[str]) -> str:
        """The register that has how far `address + offset` lies behind the start of the range that `slot` has bits of, held
        in that range."""
        low = self._word()
        if isinstance(address, Distance):
            offset += self._shape.head_bytes
            if address.factor is None:
                code.append(f"cvt.u32.u64 {low}, {address.register};")
            else:
                code.append(f"mul.lo.s32 {low}, {address.register}, {address.factor};")
        else:
            start = self._constant("u32", slot.header + Slot.BASE, code)
            code += [f"cvt.u32.u64 {low}, {address};", f"sub.s32 {low}, {low}, {start};"]
        if offset:
            code.append(f"add.s32 {low}, {low}, {offset};")
        limit = self._constant("u32", slot.header + Slot.LIMIT, code)
        code.append(f"min.u32 {low}, {low}, {limit};")
        return low

    def _carried(self, low: str, unit: int, at: int, count: int, code: list[str]) -> list[str]:
        """Registers that have `count` words which the launch carries, those with the bit for the byte `low` and behind it.
        at: offset of the words, with a bit for `unit` bytes."""
        word, wide, entry = self._word(), self.wide(), self.wide()
        found = [self._word() for _ in range(count)]
        code += [
            f"shr.u32 {word}, {low}, {unit.bit_length() - 1 + 5 - 2};",
            f"and.b32 {word}, {word}, -4;",
            f"cvt.u64.u32 {wide}, {word};",
            f"mov.b64 {entry}, {CONSTANTS};",
            f"add.s64 {entry}, {entry}, {wide};",
            *(f"ld.param.b32 {register}, [{entry}+{at + 4 * index}];" for index, register in enumerate(found)),
        ]
        return found

    def _further(self, place: str, slot: Slot, code: list[str]) -> str:
        """The register that has the physical address `place` bytes behind the start of a range."""
        at = slot.header + Slot.PHYSICAL
        if not self._shape.wide:  # all of the tenant's memory has the same upper half
            start, low = self._constant("u32", at, code), self._word()
            code.append(f"add.s32 {low}, {start}, {place};")
            return self._joined(low, code, at + 4)
        extended, physical = self.wide(), self.wide()
        start = self._constant("u64", at, code)
        code += [f"cvt.u64.u32 {extended}, {place};", f"add.s64 {physical}, {start}, {extended};"]
        return physical

    def hold(self, address: str, offset: int, table: str, last: int) -> tuple[list[str], str]:
        """Instructions that hold `address + offset` between the variable `table` and its byte `last`, and the register."""
        start, inside, held = self.wide(), self.wide(), self.wide()
        return [
            f"mov.u64 {start}, {table};",
            f"sub.s64 {inside}, {address}, {start};",
            f"add.s64 {inside}, {inside}, {offset};",
            f"min.u64 {inside}, {inside}, {last};",
            f"add.s64 {held}, {start}, {inside};",
        ], held

    def declarations(self) -> list[str]:
        """Declarations of the registers taken so far."""
        types = {"w": ".b32", "d": ".b64", "h": ".b16", "q": ".pred"}
        return [f".reg {types[kind]} %missile_{kind}<{count}>;" for kind, count in self._count.items() if count]

    # --- registers
    def take(self, kind: str) -> str:
        """A new register: of 16 ("h"), 32 ("w") or 64 bits ("d"), or a predicate ("q")."""
        self._count[kind] += 1
        return f"%missile_{kind}{self._count[kind] - 1}"

    def _word(self) -> str:
        return self.take("w")

    def wide(self) -> str:
        """A 64-bit register."""
        return self.take("d")

    def _constant(self, kind: str, offset: int, code: list[str]) -> str:
        """The register that has what the constants have at `offset`."""
        register = self.wide() if kind.endswith("64") else self._word()
        code.append(f"ld.param.{kind} {register}, [{CONSTANTS}+{offset}];")
        return register

    # --- steps
    def _bound(self, frame: str, guard: str, size: str) -> list[str]:
        """Send frames outside the tenant's memory to the guard frame, in place."""
        code: list[str] = []
        limit = self._constant("u32", Field.FRAMES, code)
        if self._shape.escape is not Escape.GUARD:
            outside = self.take("q")
            if guard:
                code.append(f"setp.ge.and.u32 {outside}, {frame}, {limit}, {guard};")
            else:
                code.append(f"setp.ge.u32 {outside}, {frame}, {limit};")
            if size:
                code.append(f"setp.ne.and.b32 {outside}, {size}, 0, {outside};")
            if self._shape.escape is Escape.TRAP:
                code.append(f"@{outside} trap;")
            else:
                counter = self._constant("u64", Field.ESCAPES, code)
                code.append(f"@{outside} red.global.add.u64 [{counter}], 1;")
        code.append(f"min.u32 {frame}, {frame}, {limit};")
        return code

    def _within(self, low: str, code: list[str]) -> str:
        """The physical offset in the frame: its pieces need not be next to each other."""
        layout = self._shape.layout
        within = self._word()
        code.append(f"and.b32 {within}, {low}, {layout.granule_bytes - 1};")
        # Bits above the contiguous piece move up; from the highest, so that none is moved twice.
        for logical, bit in reversed(tuple(enumerate(layout.inner_bits))):
            if bit == logical:
                continue
            # Adding (2**(bit - logical) - 1) times the bit moves it from `logical` to `bit`.
            part = self._word()
            code += [
                f"and.b32 {part}, {within}, {1 << logical};",
                f"mad.lo.u32 {within}, {part}, {(1 << (bit - logical)) - 1}, {within};",
            ]
        return within

    def _divide(self, frame: str, code: list[str]) -> tuple[str, str]:
        """Quotient and remainder by the divisor in the constants."""
        quotient, remainder, product, shifted = self._word(), self._word(), self.wide(), self.wide()
        magic = self._constant("u32", Field.MAGIC, code)
        shift = self._constant("u32", Field.SHIFT, code)
        minus = self._constant("u32", Field.MINUS_DIVISOR, code)
        code += [
            f"mul.wide.u32 {product}, {frame}, {magic};",
            f"shr.u64 {shifted}, {product}, {shift};",
            f"cvt.u32.u64 {quotient}, {shifted};",
            f"mad.lo.u32 {remainder}, {quotient}, {minus}, {frame};",
        ]
        return quotient, remainder

    def _page_xor(self, page: str, code: list[str]) -> str:
        """The register that has the page's constant."""
        address, half, word = self.wide(), self.take("h"), self._word()
        table = self._constant("u64", Field.TABLE, code)
        code += [
            f"mad.wide.u32 {address}, {page}, 2, {table};",
            f"{LOAD}.u16 {half}, [{address}+{self._shape.xors_at}];",
            f"cvt.u32.u16 {word}, {half};",
        ]
        return word

    def _physical(self, count: str, size: int, offset: str, code: list[str]) -> str:
        """The register that has the address `count * size + offset` of the tenant's range."""
        if self._shape.wide:
            start, wide, physical = self.wide(), self.wide(), self.wide()
            base = self._constant("u64", Field.BASE, code)
            code += [
                f"mad.wide.u32 {start}, {count}, {size}, {base};",
                f"cvt.u64.u32 {wide}, {offset};",
                f"add.s64 {physical}, {start}, {wide};",
            ]
            return physical
        low = self._word()
        code.append(f"mad.lo.u32 {low}, {count}, {size}, {offset};")
        return self._joined(low, code)

    def _joined(self, low: str, code: list[str], above: int = Field.BASE + 4) -> str:
        """The register that has the address whose lower half is `low`. above: where the constants have the upper half."""
        high = self._constant("u32", above, code)
        physical = self.wide()
        code.append(f"mov.b64 {physical}, {{{low}, {high}}};")
        return physical

    # --- forms: given the frame's number and the address's lower half, continue the parts; the physical address
    def _in_page(self, frame: str, low: str, parts: Parts) -> str:
        lookup, code = parts.before, parts.rest
        page, place = self._divide(frame, lookup)
        unit, offset = self._word(), self._word()
        half = self._look_up(place, lookup)
        code.append(f"cvt.u32.u16 {unit}, {half};")
        if self._shape.page_xors:
            xor = self._page_xor(page, lookup)
            code.append(f"xor.b32 {unit}, {unit}, {xor};")
        within = self._within(low, code)
        code.append(f"mad.lo.u32 {offset}, {unit}, {self._shape.unit_bytes}, {within};")
        return self._physical(page, self._shape.layout.page_bytes, offset, code)

    def _look_up(self, place: str, code: list[str]) -> str:
        """The register, 16 bits, that has the table's entry for `place`."""
        half = self.take("h")
        if self._shape.space is TableSpace.GLOBAL:
            entry = self.wide()
            table = self._constant("u64", Field.TABLE, code)
            code += [f"mad.wide.u32 {entry}, {place}, 2, {table};", f"{LOAD}.u16 {half}, [{entry}];"]
        else:
            address = self._word()
            code += [
                f"mov.u32 {address}, {SHARED_TABLE};",
                f"mad.lo.u32 {address}, {place}, 2, {address};",
                f"ld.shared.u16 {half}, [{address}];",
            ]
        return half

    def _arithmetic(self, frame: str, low: str, parts: Parts) -> str:
        shape, lookup, code = self._shape, parts.before, parts.rest
        row, which = self._divide(frame, lookup)
        shift, color, offset = self._word(), self._word(), self._word()
        colors = self._constant("u64", Field.COLORS, lookup)
        shifted = self.wide()
        lookup += [
            f"shl.b32 {shift}, {which}, 2;",
            f"shr.u64 {shifted}, {colors}, {shift};",
            f"cvt.u32.u64 {color}, {shifted};",
            f"and.b32 {color}, {color}, {(1 << shape.masks) - 1};",
        ]
        for index in range(shape.masks):
            mask = self._constant("u32", Field.MASKS + 4 * index, lookup)
            bits, count = self._word(), self._word()
            lookup += [
                f"and.b32 {bits}, {row}, {mask};",
                f"popc.b32 {count}, {bits};",
                f"and.b32 {count}, {count}, 1;",
                f"shl.b32 {count}, {count}, {index};",
                f"xor.b32 {color}, {color}, {count};",
            ]
        if shape.page_xors:
            page = self._word()
            lookup.append(f"shr.u32 {page}, {row}, {shape.layout.page_bits - shape.frame_bits - shape.masks};")
            xor = self._page_xor(page, lookup)
            code.append(f"xor.b32 {color}, {color}, {xor};")
        within = self._within(low, code)
        code.append(f"mad.lo.u32 {offset}, {color}, {1 << shape.frame_bits}, {within};")
        return self._physical(row, 1 << (shape.frame_bits + shape.masks), offset, code)

    def _shadow(self, frame: str, low: str, parts: Parts) -> str:
        entry, unit = self.wide(), self._word()
        parts.key, code = frame, parts.rest
        table = self._constant("u64", Field.TABLE, parts.lookup)
        parts.lookup += [f"mad.wide.u32 {entry}, {frame}, 4, {table};", f"{LOAD}.b32 {unit}, [{entry}];"]
        within = self._within(low, code)
        if self._shape.wide:
            return self._physical(unit, self._shape.unit_bytes, within, code)
        place = self._word()
        code.append(f"or.b32 {place}, {unit}, {within};")
        return self._joined(place, code)

    def _pair(self, frame: str, low: str, parts: Parts) -> str:
        word, bits, entry = self._word(), self._word(), self.wide()
        turned, unit = self._word(), self._word()
        parts.key, code = word, parts.rest
        parts.before.append(f"shr.u32 {word}, {frame}, 5;")
        table = self._constant("u64", Field.TABLE, parts.lookup)
        parts.lookup += [f"mad.wide.u32 {entry}, {word}, 4, {table};", f"{LOAD}.b32 {bits}, [{entry}];"]
        # The bit comes to the top, from where a funnel shift puts it behind the frame's number.
        code += [
            f"shf.l.wrap.b32 {turned}, {bits}, {bits}, {frame};",
            f"shf.l.wrap.b32 {unit}, {turned}, {frame}, 1;",
        ]
        if self._shape.frame_bits == PIECE_BITS and not self._shape.wide:
            place = self._word()
            code.append(f"prmt.b32 {place}, {low}, {unit}, {BYTE_AND_WORD:#x};")
            return self._joined(place, code)
        return self._physical(unit, self._shape.unit_bytes, self._within(low, code), code)

    def _step(self, frame: str, low: str, parts: Parts) -> str:
        shape, code = self._shape, parts.rest
        entry, step, above, place = self.wide(), self._word(), self._word(), self._word()
        parts.key = frame
        if shape.alike:
            parts.key = self._word()
            parts.before.append(f"shr.u32 {parts.key}, {frame}, 1;")
        table = self._constant("u64", Field.TABLE, parts.lookup)
        parts.lookup += [f"mad.wide.u32 {entry}, {parts.key}, 2, {table};", f"{LOAD}.u16 {step}, [{entry}];"]
        if shape.wide:
            within = self._within(low, code)
            code.append(f"add.s32 {place}, {within}, {step};")
            return self._physical(frame, 2 * shape.unit_bytes, place, code)
        # What is above a piece's bytes counts twice: of two places one is the tenant's.
        code += [
            f"and.b32 {above}, {low}, {-shape.unit_bytes};",
            f"add.s32 {above}, {above}, {low};",
            f"add.s32 {place}, {above}, {step};",
        ]
        return self._joined(place, code)


def module_declarations(shape: Shape) -> list[str]:
    """Variables that a module with translations needs."""
    if shape.form is not Form.IN_PAGE or shape.space is not TableSpace.SHARED:
        return []
    return [f".shared .align 16 .b8 {SHARED_TABLE}[{2 * shape.table_entries}];"]


def prologue(shape: Shape) -> list[str]:
    """What every block does before anything else: copy the table to shared memory, where it is to lie there."""
    if shape.form is not Form.IN_PAGE or shape.space is not TableSpace.SHARED:
        return []
    return [
        "{",
        ".reg .b32 %missile_i, %missile_n, %missile_s, %missile_t, %missile_v0, %missile_v1, %missile_v2, %missile_v3;",
        ".reg .b64 %missile_g, %missile_e;",
        ".reg .pred %missile_more;",
        "mov.u32 %missile_i, %tid.x;",
        "mov.u32 %missile_n, %ntid.x;",
        "missile_copy:",
        f"setp.ge.u32 %missile_more, %missile_i, {shape.table_entries // 8};",
        "@%missile_more bra missile_copied;",
        f"ld.param.u64 %missile_g, [{CONSTANTS}+{Field.TABLE}];",
        "mad.wide.u32 %missile_e, %missile_i, 16, %missile_g;",
        "ld.global.nc.v4.u32 {%missile_v0, %missile_v1, %missile_v2, %missile_v3}, [%missile_e];",
        f"mov.u32 %missile_s, {SHARED_TABLE};",
        "mad.lo.u32 %missile_s, %missile_i, 16, %missile_s;",
        "st.shared.v4.u32 [%missile_s], {%missile_v0, %missile_v1, %missile_v2, %missile_v3};",
        "add.u32 %missile_i, %missile_i, %missile_n;",
        "bra missile_copy;",
        "missile_copied:",
        "bar.sync 0;",
        "}",
    ]
