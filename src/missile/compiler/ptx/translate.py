"""The instructions that turn a logical address into a physical one, for each form of translation.

They compute exactly what `missile.coloring.translation` computes; tests interpret one and compare with the other.
"""

from __future__ import annotations

from collections.abc import Callable

from missile.coloring.shape import CONSTANTS, Escape, Field, Form, Shape, TableSpace

__all__ = ["PARAMETER", "SHARED_TABLE", "Emitter", "module_declarations", "prologue"]

SHARED_TABLE = "missile_table"

# The constants arrive with the launch: a first touch of a const bank of the module's own would miss in every launch.
PARAMETER = f".param .align 8 .b8 {CONSTANTS}[{Field.BYTES}]"


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
        code: list[str] = []
        if offset:
            logical = self.wide()
            code.append(f"add.s64 {logical}, {address}, {offset};")
            address = logical
        low, high, frame = self._word(), self._word(), self._word()
        bits = self._shape.frame_bits
        code += [
            f"mov.b64 {{{low}, {high}}}, {address};",
            f"shf.r.wrap.b32 {frame}, {low}, {high}, {bits};",
            *self._bound(frame, guard, size),
        ]
        form: Callable[[str, str], tuple[list[str], str]] = {
            Form.IN_PAGE: self._in_page,
            Form.ARITHMETIC: self._arithmetic,
            Form.SHADOW: self._shadow,
            Form.PAIR: self._pair,
        }[self._shape.form]
        rest, physical = form(frame, self._within(low, code))
        return code + rest, physical

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
    def _take(self, kind: str) -> str:
        self._count[kind] += 1
        return f"%missile_{kind}{self._count[kind] - 1}"

    def _word(self) -> str:
        return self._take("w")

    def wide(self) -> str:
        """A 64-bit register."""
        return self._take("d")

    def _constant(self, kind: str, offset: int, code: list[str]) -> str:
        register = self.wide() if kind.endswith("64") else self._word()
        code.append(f"ld.param.{kind} {register}, [{CONSTANTS}+{offset}];")
        return register

    # --- steps
    def _bound(self, frame: str, guard: str, size: str) -> list[str]:
        """Send frames outside the tenant's memory to the guard frame, in place."""
        code: list[str] = []
        limit = self._constant("u32", Field.FRAMES, code)
        if self._shape.escape is not Escape.GUARD:
            outside = self._take("q")
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

    def _page_xor(self, page: str, value: str, code: list[str]) -> None:
        """XOR the page's constant into `value`, in place."""
        if not self._shape.page_xors:
            return
        address, half, word = self.wide(), self._take("h"), self._word()
        table = self._constant("u64", Field.TABLE, code)
        code += [
            f"mad.wide.u32 {address}, {page}, 2, {table};",
            f"ld.global.nc.u16 {half}, [{address}+{self._shape.xors_at}];",
            f"cvt.u32.u16 {word}, {half};",
            f"xor.b32 {value}, {value}, {word};",
        ]

    def _sum(self, base: str, offset: str, code: list[str]) -> str:
        wide, physical = self.wide(), self.wide()
        code += [f"cvt.u64.u32 {wide}, {offset};", f"add.s64 {physical}, {base}, {wide};"]
        return physical

    # --- forms
    def _in_page(self, frame: str, within: str) -> tuple[list[str], str]:
        code: list[str] = []
        page, place = self._divide(frame, code)
        unit, start, offset = self._word(), self.wide(), self._word()
        self._look_up(place, unit, code)
        self._page_xor(page, unit, code)
        base = self._constant("u64", Field.BASE, code)
        code += [
            f"mad.wide.u32 {start}, {page}, {self._shape.layout.page_bytes}, {base};",
            f"mad.lo.u32 {offset}, {unit}, {self._shape.unit_bytes}, {within};",
        ]
        return code, self._sum(start, offset, code)

    def _look_up(self, place: str, unit: str, code: list[str]) -> None:
        half = self._take("h")
        if self._shape.space is TableSpace.GLOBAL:
            entry = self.wide()
            table = self._constant("u64", Field.TABLE, code)
            code += [f"mad.wide.u32 {entry}, {place}, 2, {table};", f"ld.global.nc.u16 {half}, [{entry}];"]
        else:
            address = self._word()
            code += [
                f"mov.u32 {address}, {SHARED_TABLE};",
                f"mad.lo.u32 {address}, {place}, 2, {address};",
                f"ld.shared.u16 {half}, [{address}];",
            ]
        code.append(f"cvt.u32.u16 {unit}, {half};")

    def _arithmetic(self, frame: str, within: str) -> tuple[list[str], str]:
        shape = self._shape
        code: list[str] = []
        row, which = self._divide(frame, code)
        shift, color, start, offset = self._word(), self._word(), self.wide(), self._word()
        colors = self._constant("u64", Field.COLORS, code)
        shifted = self.wide()
        code += [
            f"shl.b32 {shift}, {which}, 2;",
            f"shr.u64 {shifted}, {colors}, {shift};",
            f"cvt.u32.u64 {color}, {shifted};",
            f"and.b32 {color}, {color}, {(1 << shape.masks) - 1};",
        ]
        for index in range(shape.masks):
            mask = self._constant("u32", Field.MASKS + 4 * index, code)
            bits, count = self._word(), self._word()
            code += [
                f"and.b32 {bits}, {row}, {mask};",
                f"popc.b32 {count}, {bits};",
                f"and.b32 {count}, {count}, 1;",
                f"shl.b32 {count}, {count}, {index};",
                f"xor.b32 {color}, {color}, {count};",
            ]
        if shape.page_xors:
            page = self._word()
            code.append(f"shr.u32 {page}, {row}, {shape.layout.page_bits - shape.frame_bits - shape.masks};")
            self._page_xor(page, color, code)
        base = self._constant("u64", Field.BASE, code)
        code += [
            f"mad.wide.u32 {start}, {row}, {1 << (shape.frame_bits + shape.masks)}, {base};",
            f"mad.lo.u32 {offset}, {color}, {1 << shape.frame_bits}, {within};",
        ]
        return code, self._sum(start, offset, code)

    def _shadow(self, frame: str, within: str) -> tuple[list[str], str]:
        code: list[str] = []
        entry, unit, start = self.wide(), self._word(), self.wide()
        table = self._constant("u64", Field.TABLE, code)
        base = self._constant("u64", Field.BASE, code)
        code += [
            f"mad.wide.u32 {entry}, {frame}, 4, {table};",
            f"ld.global.nc.u32 {unit}, [{entry}];",
            f"mad.wide.u32 {start}, {unit}, {self._shape.unit_bytes}, {base};",
        ]
        return code, self._sum(start, within, code)

    def _pair(self, frame: str, within: str) -> tuple[list[str], str]:
        code: list[str] = []
        bit = self._shape.frame_bits
        word, bits, entry, start = self._word(), self._word(), self.wide(), self.wide()
        low, high, physical = self._word(), self._word(), self.wide()
        table = self._constant("u64", Field.TABLE, code)
        base = self._constant("u64", Field.BASE, code)
        scale = self._constant("u32", Field.SCALE, code)
        code += [
            f"shr.u32 {word}, {frame}, 5;",
            f"mad.wide.u32 {entry}, {word}, 4, {table};",
            f"ld.global.nc.b32 {bits}, [{entry}];",
            f"mad.wide.u32 {start}, {frame}, {scale}, {base};",
            f"mov.b64 {{{low}, {high}}}, {start};",
            # Below the frame the start is zero: what lies in the frame is put in without a carry.
            f"or.b32 {low}, {low}, {within};",
            f"shf.l.wrap.b32 {bits}, {bits}, {bits}, {frame};",
            f"and.b32 {bits}, {bits}, {1 << bit};",
            f"xor.b32 {low}, {low}, {bits};",
            f"mov.b64 {physical}, {{{low}, {high}}};",
        ]
        return code, physical


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
        ".reg .b64 %missile_g;",
        ".reg .pred %missile_more;",
        "mov.u32 %missile_i, %tid.x;",
        "mov.u32 %missile_n, %ntid.x;",
        "missile_copy:",
        f"setp.ge.u32 %missile_more, %missile_i, {shape.table_entries // 8};",
        "@%missile_more bra missile_copied;",
        f"ld.param.u64 %missile_g, [{CONSTANTS}+{Field.TABLE}];",
        "mad.wide.u32 %missile_g, %missile_i, 16, %missile_g;",
        "ld.global.nc.v4.u32 {%missile_v0, %missile_v1, %missile_v2, %missile_v3}, [%missile_g];",
        f"mov.u32 %missile_s, {SHARED_TABLE};",
        "mad.lo.u32 %missile_s, %missile_i, 16, %missile_s;",
        "st.shared.v4.u32 [%missile_s], {%missile_v0, %missile_v1, %missile_v2, %missile_v3};",
        "add.u32 %missile_i, %missile_i, %missile_n;",
        "bra missile_copy;",
        "missile_copied:",
        "bar.sync 0;",
        "}",
    ]
