"""How a page is cut into granules: which address bits lie inside one, and which number it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError

__all__ = ["PageLayout"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Granules of a page of `page_bytes`.

    inner_bits: address bits inside a granule, ascending. They need not be contiguous: on Hopper bits 0-7 and 9, so a
    granule is two pieces of 256 bytes, 512 bytes apart. The page's other bits, ascending, number the granules.
    """

    page_bytes: int
    inner_bits: tuple[int, ...]

    @property
    def page_bits(self) -> int:
        return self.page_bytes.bit_length() - 1

    @property
    def index_bits(self) -> tuple[int, ...]:
        return tuple(bit for bit in range(self.page_bits) if bit not in self.inner_bits)

    @property
    def granule_bytes(self) -> int:
        return 1 << len(self.inner_bits)

    @property
    def piece_bytes(self) -> int:
        """Size of a contiguous piece of a granule."""
        return 1 << self.index_bits[0]

    @property
    def granules(self) -> int:
        return 1 << len(self.index_bits)

    def offsets(self, indices: Ints | None = None) -> Ints:
        """In-page address of the first byte of granules `indices` (None: all, in order)."""
        return self._spread(np.arange(self.granules) if indices is None else indices, self.index_bits)

    def pieces(self) -> Ints:
        """Offsets within a granule of its contiguous pieces, ascending, starting with 0."""
        bits = [bit for bit in self.inner_bits if bit > self.index_bits[0]]
        return np.sort(self._spread(np.arange(1 << len(bits)), bits))

    def index_of(self, offsets: Ints) -> Ints:
        """Index of the granule that holds each in-page address. MisuseError for an address outside a page."""
        offsets = np.asarray(offsets, np.int64)
        outside = offsets[(offsets < 0) | (offsets >= self.page_bytes)]
        if outside.size:
            raise MisuseError(
                f"Address {int(outside.flat[0]):#x} is outside a page; in-page addresses are 0 to {self.page_bytes - 1:#x}."
            )
        index = np.zeros(offsets.shape, np.int64)
        for position, bit in enumerate(self.index_bits):
            index |= ((offsets >> bit) & 1) << position
        return index

    def mask_to_address(self, mask: int) -> int:
        """A mask over granule index bits as a mask over address bits."""
        return sum(1 << bit for position, bit in enumerate(self.index_bits) if mask >> position & 1)

    @staticmethod
    def _spread(values: Ints, bits: Sequence[int]) -> Ints:
        out = np.zeros(np.shape(values), np.int64)
        for position, bit in enumerate(bits):
            out |= ((np.asarray(values, np.int64) >> position) & 1) << bit
        return out
