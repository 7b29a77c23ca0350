"""Logical to physical addresses of one tenant, in five forms behind one interface. The reference for what kernels compute.

Logical memory is a run of frames, numbered from 0. Physical offsets count from the start of the range that the tenant's
pages are mapped into, in the tenant's own order. One frame more than the tenant uses is the guard frame: accesses outside
its memory go there. Pairs have more frames behind it that hold nothing, for windows that begin there
(`Shape.guards`). Pure arithmetic.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from missile.coloring.division import LIMIT, Divider
from missile.coloring.shape import MAX_MASKS, WINDOW, Escape, Field, Form, Shape
from missile.errors import MisuseError
from missile.probe.layout import PageLayout

__all__ = [
    "ArithmeticTranslation",
    "InPageTranslation",
    "PairTranslation",
    "ShadowTranslation",
    "StepTranslation",
    "Translation",
    "packed",
]

Ints = npt.NDArray[np.int64]


class Translation(Protocol):
    """What a tenant's kernels are bound to."""

    @property
    def shape(self) -> Shape: ...
    @property
    def pages(self) -> int:
        """Pages that the tenant's range has."""

    @property
    def frames(self) -> int:
        """Frames that the tenant can use. The guard frame, number `frames`, is not among them."""

    @property
    def logical_bytes(self) -> int:
        """`frames` in bytes."""

    def locate(self, frames: npt.ArrayLike) -> Ints:
        """Physical offset of the first byte of each frame, 0 to `frames` (the guard), same shape."""

    def physical(self, offsets: npt.ArrayLike) -> Ints:
        """Physical offset of each logical byte offset, same shape. Offsets outside the memory go to the guard frame."""

    def table(self) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
        """What has to lie in global memory, shape (entries,); empty where nothing does. Page constants stand at the end."""

    def constants(self, base: int, *, table: int = 0, escapes: int = 0) -> bytes:
        """The last parameter of every kernel of the tenant, `Field.BYTES` long. base: address of its range; table: of
        `table()` in global memory; escapes: of a u64 counter, for shapes that count."""


class _Translation:
    """What the forms have in common. `shape`, `pages`, and `locate` are theirs."""

    def __init__(self, shape: Shape, pages: int, places: int) -> None:
        if pages < 1 or places <= shape.guards:
            raise MisuseError("A color set needs memory: at least one page with two frames of its colors.")
        limit = min(LIMIT, 1 << (shape.reach - shape.frame_bits))
        if places > limit:
            raise MisuseError(
                f"A tenant's memory has at most {limit} frames in this shape of translation, not {places}."
            )
        if not shape.wide and pages * shape.layout.page_bytes > WINDOW:
            raise MisuseError(f"{pages} pages are more than 4 GiB: they need a wide translation.")
        self.shape = shape
        self.pages = pages
        self.frames = places - shape.guards

    @property
    def logical_bytes(self) -> int:
        return self.frames << self.shape.frame_bits

    @property
    def _has_table(self) -> bool:
        return True

    def locate(self, frames: npt.ArrayLike) -> Ints:
        raise NotImplementedError

    def physical(self, offsets: npt.ArrayLike) -> Ints:
        given = np.asarray(offsets, np.int64)
        layout, bits = self.shape.layout, self.shape.frame_bits
        # As the GPU does it: unsigned, so that what lies below is far above.
        frame = np.minimum((given & (1 << self.shape.reach) - 1) >> bits, self.frames)
        within = given & (layout.granule_bytes - 1)
        piece, rest = np.divmod(within, layout.piece_bytes)
        return np.asarray(self.locate(frame) + layout.pieces()[piece] + rest, np.int64)

    def table(self) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
        raise NotImplementedError

    def constants(self, base: int, *, table: int = 0, escapes: int = 0) -> bytes:
        if self.shape.escape is Escape.COUNT and not escapes:
            raise MisuseError("Kernels that count escaping accesses need the address of a counter.")
        if self._has_table and not table:
            raise MisuseError("The translation's table has to lie in global memory, and its address is not given.")
        if not self.shape.wide and base % WINDOW:
            raise MisuseError("A tenant's range starts at a multiple of 4 GiB, unless its translation is wide.")
        out = bytearray(Field.BYTES)
        struct.pack_into("<QQI", out, Field.BASE, base, table, self.frames)
        struct.pack_into("<Q", out, Field.ESCAPES, escapes)
        self._fill(out)
        return bytes(out)

    def _fill(self, out: bytearray) -> None:
        """Write what only this form has."""

    def _checked_xors(self, page_xors: Sequence[int] | Ints) -> Ints:
        """The pages' constants as an array, shape (pages,); zeros where the shape has none."""
        xors = np.asarray(page_xors, np.int64)
        if not self.shape.page_xors and xors.any():
            raise MisuseError("Pages have constants that this shape of translation leaves out.")
        if len(xors) not in (0, self.pages):
            raise MisuseError(f"{len(xors)} constants were given for {self.pages} pages.")
        if len(xors) and (xors.min() < 0 or xors.max() >= self.shape.layout.granules):
            raise MisuseError(f"Constants of pages are 0 to {self.shape.layout.granules - 1}.")
        return xors if len(xors) else np.zeros(self.pages, np.int64)


class InPageTranslation(_Translation):
    """The frames of one page's colors, in a table that all pages share.

    places: int, shape (n,): the frames of the reference page that are the tenant's, as granule indices of the layout, in
    logical order. page_xors: for each page what its granule indices are XORed with (empty: nothing).
    """

    def __init__(
        self, shape: Shape, places: Sequence[int] | Ints, pages: int, page_xors: Sequence[int] | Ints = ()
    ) -> None:
        indices = np.asarray(places, np.int64)
        layout = shape.layout
        if shape.form is not Form.IN_PAGE:
            raise MisuseError(f"A table of places in a page does not go with the {shape.form} form.")
        if len(indices) and (indices.min() < 0 or indices.max() >= layout.granules):
            raise MisuseError(f"A page has the frames 0 to {layout.granules - 1}; the table names others.")
        if len(np.unique(indices)) != len(indices):
            raise MisuseError("The table names a frame of the page twice.")
        super().__init__(shape, pages, pages * len(indices))
        self._divider = Divider(len(indices))
        self._units = layout.offsets(indices) // shape.unit_bytes
        self._xors = layout.offsets(self._checked_xors(page_xors)) // shape.unit_bytes

    def locate(self, frames: npt.ArrayLike) -> Ints:
        frame = np.asarray(frames, np.int64)
        page = self._divider(frame)
        place = frame - page * self._divider.divisor
        units = self._units[place] ^ self._xors[page]
        return np.asarray(page * self.shape.layout.page_bytes + units * self.shape.unit_bytes, np.int64)

    def table(self) -> npt.NDArray[np.uint16]:
        places = np.zeros(self.shape.table_entries, np.uint16)
        places[: len(self._units)] = self._units
        return np.concatenate([places, self._xors.astype(np.uint16)]) if self.shape.page_xors else places

    def _fill(self, out: bytearray) -> None:
        divider = self._divider
        struct.pack_into("<iII", out, Field.MINUS_DIVISOR, -divider.divisor, divider.magic, divider.shift)


class ArithmeticTranslation(_Translation):
    """Colors that are parities of in-page address bits, where the parity masks' lowest bits lie right above the frame.

    masks: over in-page address bits; on the `len(masks)` bits above the frame mask i has bit i alone (`lowest_form` gives
    such masks). colors: the parities of each color, bit i that of mask i, in logical order. page_xors: as parities.
    """

    def __init__(
        self,
        shape: Shape,
        masks: Sequence[int],
        colors: Sequence[int],
        pages: int,
        page_xors: Sequence[int] | Ints = (),
    ) -> None:
        if shape.form is not Form.ARITHMETIC or shape.masks != len(masks):
            raise MisuseError(f"{len(masks)} masks do not go with this shape of translation.")
        pivots = (1 << len(masks)) - 1
        for index, mask in enumerate(masks):
            if mask >> shape.frame_bits & pivots != 1 << index or mask >> shape.layout.page_bits:
                raise MisuseError("The masks' lowest bits do not name the colors one by one.")
        if not colors or len(set(colors)) != len(colors) or not all(0 <= color <= pivots for color in colors):
            raise MisuseError(
                f"The colors of a set are different numbers from 0 to {pivots}, and there is at least one."
            )
        self.masks = tuple(masks)
        self.colors = tuple(colors)
        self._rows = shape.layout.granules >> len(masks)  # groups of frames, one of each color, in a page
        super().__init__(shape, pages, pages * self._rows * len(colors))
        self._divider = Divider(len(colors))
        self._xors = self._checked_xors(page_xors)
        if len(self._xors) and self._xors.max() > pivots:
            raise MisuseError(f"Constants of pages are parities, 0 to {pivots}.")

    def locate(self, frames: npt.ArrayLike) -> Ints:
        frame = np.asarray(frames, np.int64)
        row = self._divider(frame)
        color = np.asarray(self.colors, np.int64)[frame - row * len(self.colors)]
        for index, mask in enumerate(self._row_masks()):
            color = color ^ ((np.bitwise_count(row & mask) & 1).astype(np.int64) << index)
        color = color ^ self._xors[row // self._rows]
        bits = self.shape.frame_bits
        return np.asarray((row << (bits + len(self.masks))) + (color << bits), np.int64)

    def places(self) -> Ints:
        """The same frames as granule indices of the reference page, in the same order: for a table that agrees."""
        count = self._rows * len(self.colors)
        frame = np.arange(count)
        row = self._divider(frame)
        color = np.asarray(self.colors, np.int64)[frame - row * len(self.colors)]
        for index, mask in enumerate(self._row_masks()):
            color = color ^ ((np.bitwise_count(row & mask) & 1).astype(np.int64) << index)
        return np.asarray((row << len(self.masks)) + color, np.int64)

    def table(self) -> npt.NDArray[np.uint16]:
        return self._xors.astype(np.uint16) if self.shape.page_xors else np.empty(0, np.uint16)

    @property
    def _has_table(self) -> bool:
        return self.shape.page_xors

    def _row_masks(self) -> tuple[int, ...]:
        """The masks over the bits of a row's number."""
        return tuple(mask >> (self.shape.frame_bits + len(self.masks)) for mask in self.masks)

    def _fill(self, out: bytearray) -> None:
        divider = self._divider
        struct.pack_into("<iII", out, Field.MINUS_DIVISOR, -divider.divisor, divider.magic, divider.shift)
        word = sum(color << (4 * place) for place, color in enumerate(self.colors))
        masks = (*self._row_masks(), *([0] * (MAX_MASKS - len(self.masks))))
        struct.pack_into("<Q4I", out, Field.COLORS, word, *masks)


class ShadowTranslation(_Translation):
    """A table with the physical place of every logical frame: works for any pages and any colors.

    units: int, shape (frames + 1,): offset of each frame, the guard frame last, in `shape.unit_bytes`. pages: of the range.
    MisuseError when two frames share memory or one leaves the range.
    """

    def __init__(self, shape: Shape, units: Sequence[int] | Ints, pages: int) -> None:
        if shape.form is not Form.SHADOW:
            raise MisuseError(f"A shadow page table does not go with the {shape.form} form.")
        self._units = np.asarray(units, np.int64)
        super().__init__(shape, pages, len(self._units))
        layout = shape.layout
        offsets = self._units * shape.unit_bytes
        if offsets.min() < 0 or offsets.max() >= pages * layout.page_bytes or self._units.max() >= 1 << 32:
            raise MisuseError("The shadow page table names a frame outside the tenant's pages.")
        page, within = np.divmod(offsets, layout.page_bytes)
        indices = layout.index_of(within)
        if (layout.offsets(indices) != within).any():
            raise MisuseError("The shadow page table names a place that is no start of a frame.")
        if len(np.unique(page * layout.granules + indices)) != len(offsets):
            raise MisuseError("The shadow page table names a frame twice.")

    @classmethod
    def of(cls, other: Translation) -> ShadowTranslation:
        """The shadow page table that translates as `other` does."""
        shape = replace(other.shape, form=Form.SHADOW, masks=0, page_xors=False, alike=False)
        return cls(shape, other.locate(np.arange(other.frames + 1)) // shape.unit_bytes, other.pages)

    @classmethod
    def from_pages(
        cls, layout: PageLayout, places: Sequence[Ints], escape: Escape = Escape.GUARD, *, wide: bool = False
    ) -> ShadowTranslation:
        """Frames of pages that have nothing in common: `places[i]` are the granule indices of page i, in logical order."""
        shape = Shape(Form.SHADOW, layout, escape=escape, wide=wide)
        parts = [page * layout.page_bytes + layout.offsets(np.asarray(p, np.int64)) for page, p in enumerate(places)]
        return cls(shape, np.concatenate([np.empty(0, np.int64), *parts]) // shape.unit_bytes, len(places))

    def locate(self, frames: npt.ArrayLike) -> Ints:
        return np.asarray(self._units[np.asarray(frames, np.int64)] * self.shape.unit_bytes, np.int64)

    def table(self) -> npt.NDArray[np.uint32]:
        """In units where addresses are wide, else in bytes."""
        return (self._units * (1 if self.shape.wide else self.shape.unit_bytes)).astype(np.uint32)


class PairTranslation(_Translation):
    """One frame of every two neighbours, by a bit for each logical frame.

    choices: 0 or 1, shape (pages, pairs of frames in a page): which of the two is taken.
    """

    def __init__(self, shape: Shape, choices: npt.ArrayLike) -> None:
        if shape.form is not Form.PAIR:
            raise MisuseError(f"Choices of one of two do not go with the {shape.form} form.")
        taken = np.atleast_2d(np.asarray(choices))
        if taken.shape[1] != shape.layout.granules // 2 or taken.min() < 0 or taken.max() > 1:
            raise MisuseError(f"A page has {shape.layout.granules // 2} choices of 0 or 1.")
        super().__init__(shape, len(taken), taken.size)
        self._choices = taken.reshape(-1).astype(np.uint8)
        if shape.alike and (self._choices[0::2] != self._choices[1::2]).any():
            raise MisuseError("Neighbouring frames choose differently, in a shape whose neighbours choose alike.")

    @property
    def choices(self) -> npt.NDArray[np.uint8]:
        """0 or 1 for each logical frame, the guard frames last, shape (frames + guards,)."""
        return self._choices

    def locate(self, frames: npt.ArrayLike) -> Ints:
        frame = np.asarray(frames, np.int64)
        return np.asarray((frame * 2 + self._choices[frame]) << self.shape.frame_bits, np.int64)

    def table(self) -> npt.NDArray[np.uint32]:
        """A bit for each frame, placed so that turning its word left by the frame's number brings it to the top; behind
        them, where frames choose alike and windows may be read, one for every two.
        """
        units = self.shape.window_units
        tables = [packed(self._choices), *(packed(self._choices[::2]) for _ in units[1:])]
        return np.concatenate(tables)

    def constants(self, base: int, *, table: int = 0, escapes: int = 0) -> bytes:
        out = bytearray(super().constants(base, table=table, escapes=escapes))
        if self.shape.window_units:
            if not self.shape.wide:
                struct.pack_into("<I", out, Field.LIMIT, self.logical_bytes)
            own = base + int(self.locate(0))
            struct.pack_into("<QQ", out, Field.COARSE, table + packed(self._choices).nbytes, own)
        return bytes(out)


class StepTranslation(_Translation):
    """What a pair translation does, by how far each address moves up: 2 bytes for each frame, or for two that choose alike.

    Where addresses are no wider than 32 bits, those outside the tenant's memory all go to the guard frame's first byte.
    """

    def __init__(self, shape: Shape, choices: npt.NDArray[np.uint8], pages: int) -> None:
        if shape.form is not Form.STEP:
            raise MisuseError(f"Steps of addresses do not go with the {shape.form} form.")
        super().__init__(shape, pages, len(choices))
        self._choices = choices

    @classmethod
    def of(cls, other: PairTranslation) -> StepTranslation:
        """The steps that translate as `other` does."""
        return cls(replace(other.shape, form=Form.STEP), other.choices, other.pages)

    def locate(self, frames: npt.ArrayLike) -> Ints:
        frame = np.asarray(frames, np.int64)
        return np.asarray((frame * 2 + self._choices[frame]) << self.shape.frame_bits, np.int64)

    def physical(self, offsets: npt.ArrayLike) -> Ints:
        if self.shape.wide:
            return super().physical(offsets)
        within = np.asarray(offsets, np.int64) & (1 << self.shape.reach) - 1
        return super().physical(np.minimum(within, self.logical_bytes))

    def table(self) -> npt.NDArray[np.uint16]:
        """Bytes by which a frame, or two, lie above the lower of the two places that each could have."""
        entries = self._choices[:: 2 if self.shape.alike else 1]
        return entries.astype(np.uint16) << np.uint16(self.shape.frame_bits)

    def _fill(self, out: bytearray) -> None:
        if not self.shape.wide:
            struct.pack_into("<I", out, Field.LIMIT, self.logical_bytes)


def packed(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """Bits in words of 32, the first of them in the highest; the last word is filled up with zeros."""
    whole = np.zeros((-(-len(bits) // 32), 32), np.uint8)
    whole.reshape(-1)[: len(bits)] = bits
    return np.packbits(whole, axis=1).view(">u4").reshape(-1).astype(np.uint32)
