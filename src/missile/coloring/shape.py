"""The shape of a translation: what kernels are compiled for. Which colors and pages a tenant has is bound later, as data.

A kernel compiled for a shape reads everything else from its constants, a parameter that rewriting adds behind the kernel's
own, `Field.BYTES` bytes by value. Their layout is written down here once for both sides: the code that reads them and the
host that fills them in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from missile.errors import MisuseError
from missile.probe.layout import PageLayout

__all__ = [
    "CONSTANTS",
    "LOGICAL_BASE",
    "MAX_MASKS",
    "WINDOW",
    "WINDOW_ENTRIES",
    "Escape",
    "Field",
    "Form",
    "Shape",
    "TableSpace",
]

CONSTANTS = "missile_color"  # the parameter's name

# No memory can lie here, so an access that was not translated faults and never reads a neighbour's tensor. All bits that
# a frame number is cut from are zero.
LOGICAL_BASE = 1 << 60

WINDOW = 1 << 32  # bytes that lower halves of addresses tell apart

MAX_MASKS = 4  # 16 colors of 4 bits are a 64-bit word


WINDOW_ENTRIES = 32  # bits of the pair form's table that are kept in one register


class Form(StrEnum):
    PAIR = "pair"  # one of every two neighbouring pieces, by a bit for each
    ARITHMETIC = "arithmetic"  # colors are parities of address bits
    IN_PAGE = "in-page"  # a table of one page's frames, the same for every page up to an XOR
    SHADOW = "shadow"  # a shadow page table: an entry for every frame
    STEP = "step"  # what pairs are, by an entry of 2 bytes for each: more table, fewer instructions


class TableSpace(StrEnum):
    """Where the in-page table lies when a kernel runs."""

    GLOBAL = "global"  # read through the L1 cache
    SHARED = "shared"  # copied by every block when it starts


class Escape(StrEnum):
    """What happens to an access outside the tenant's memory."""

    GUARD = "guard"  # goes to the tenant's guard frame
    COUNT = "count"  # the same, and is counted
    TRAP = "trap"  # ends the kernel, and with it the GPU context of all tenants


class Field:
    """Offsets in the constants, bytes. All little-endian."""

    BASE = 0  # u64: address that page 0 of the tenant is mapped at
    TABLE = 8  # u64: address of the table in global memory, the pages' constants (u16 each) behind it
    FRAMES = 16  # u32: logical frames; the number of the guard frame
    MINUS_DIVISOR = 20  # s32
    MAGIC = 24  # u32
    SHIFT = 28  # u32
    COLORS = 32  # u64: parities of color i in bits 4i to 4i+3 (arithmetic form)
    LIMIT = 32  # u32: logical bytes (step form, windows of the pair form)
    COARSE = 40  # u64: address of the table with a bit for every two frames (pair form, where they choose alike)
    MASKS = 40  # u32 each
    OWN = 48  # u64: an address of the tenant's own, in which no buffer lies (pair form)
    ESCAPES = 56  # u64: address of a u64 counter
    BYTES = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """layout: how a page is cut into frames; the frame is the layout's granule. masks: how many (arithmetic form only).
    In the pair and the step form frames are contiguous, and the lowest address bit above a frame tells two neighbours apart.
    alike: whether logical frames 2k and 2k + 1 always choose alike, so that one entry is enough for both (step form).

    page_xors: whether pages can have constants that are XORed to a frame's place in its page.
    space: where the in-page table is looked up. wide: whether the tenant's logical memory or its range of physical
    addresses can be larger than 4 GiB. Where they can't, translations work on lower halves of addresses only, and the
    physical range starts at a multiple of 4 GiB. MisuseError for a shape that no code can be written for.
    """

    form: Form
    layout: PageLayout
    masks: int = 0
    space: TableSpace = TableSpace.SHARED
    page_xors: bool = False
    escape: Escape = Escape.GUARD
    wide: bool = False
    alike: bool = False

    def __post_init__(self) -> None:
        bits = self.layout.inner_bits
        if self.form is Form.ARITHMETIC:
            if not 1 <= self.masks <= MAX_MASKS:
                raise MisuseError(f"The arithmetic form takes 1 to {MAX_MASKS} masks, not {self.masks}.")
        elif self.masks:
            raise MisuseError(f"The {self.form} form has no masks.")
        if self.form in (Form.ARITHMETIC, Form.PAIR, Form.STEP) and bits != tuple(range(len(bits))):
            raise MisuseError(f"The {self.form} form needs frames that are contiguous.")
        if self.form in (Form.SHADOW, Form.PAIR, Form.STEP) and self.page_xors:
            raise MisuseError(f"The {self.form} form has no constants of pages.")
        if self.alike and self.form not in (Form.PAIR, Form.STEP):
            raise MisuseError(f"The {self.form} form has no frames that choose alike.")
        if self.escape is not Escape.GUARD and not self.wide:
            raise MisuseError("Only wide translations tell an access outside from one inside.")
        if self.units_per_page > 1 << 16:
            raise MisuseError("A page has more places for frames than a table entry of 16 bits can name.")

    @property
    def frame_bits(self) -> int:
        return len(self.layout.inner_bits)

    @property
    def window_units(self) -> tuple[int, ...]:
        """Bytes that a bit stands for in tables that windows can be read from; none where there are no windows."""
        if self.form is not Form.PAIR or not self._has_windows:
            return ()
        return (self.unit_bytes, 2 * self.unit_bytes) if self.alike else (self.unit_bytes,)

    @property
    def head_bytes(self) -> int:
        """At the start of a tenant's memory, where no buffer lies: a window may begin there that is used from further on."""
        return WINDOW_ENTRIES * max(self.window_units, default=0)

    @property
    def guards(self) -> int:
        """Frames at the end of a tenant's memory that hold nothing: one, or as many as a window has that begins there."""
        return 1 + 2 * WINDOW_ENTRIES if self._has_windows else 1

    @property
    def _has_windows(self) -> bool:
        """Of pairs, and of steps that translate as pairs do."""
        return self.form in (Form.PAIR, Form.STEP) and self.unit_bytes == 256 and self.escape is Escape.GUARD

    @property
    def reach(self) -> int:
        """Bits of a logical offset that count; what differs above them only is taken for the same."""
        return 32 + (self.frame_bits if self.wide else 0)

    @property
    def unit_bytes(self) -> int:
        """Tables count in these: the contiguous piece of a frame."""
        return self.layout.piece_bytes

    @property
    def units_per_page(self) -> int:
        return self.layout.page_bytes // self.unit_bytes

    @property
    def table_entries(self) -> int:
        """Room of the in-page table, entries of 2 bytes; 0 in other forms."""
        return self.layout.granules if self.form is Form.IN_PAGE else 0

    @property
    def xors_at(self) -> int:
        """Offset of the pages' constants (u16 each) in what lies in global memory, bytes."""
        return 2 * self.table_entries
