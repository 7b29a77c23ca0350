"""Colors as parities of address bits: whether a pattern of colors is linear, and the masks in the form that kernels want."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.coloring.shape import MAX_MASKS
from missile.probe.gf2 import complement, parity

__all__ = ["LinearColors", "linear_colors", "lowest_form"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LinearColors:
    """masks: over frame indices, mask i with bit i alone among the lowest `len(masks)`. parities: of each color."""

    masks: tuple[int, ...]
    parities: tuple[int, ...]


def linear_colors(pattern: Ints) -> LinearColors | None:
    """The parities that name the colors of `pattern` (color of each frame of a page, shape (frames,)).

    None where they do not: the colors are not linear in the frame's index, are too many, or leave parities unused.
    """
    colors = int(pattern.max()) + 1
    order = np.argsort(pattern, kind="stable")
    same = np.diff(pattern[order]) == 0
    differences = np.unique((order[1:] ^ order[:-1])[same])
    masks = complement((int(d) for d in differences), len(pattern).bit_length() - 1)
    if not masks or len(masks) > MAX_MASKS or 1 << len(masks) != colors:
        return None
    lowest = lowest_form(masks)
    if lowest is None:
        return None
    index = np.arange(len(pattern))
    values = sum((parity(index, mask) << i for i, mask in enumerate(lowest)), np.zeros(len(pattern), np.int64))
    parities = np.zeros(colors, np.int64)
    parities[pattern] = values
    return LinearColors(lowest, tuple(parities.tolist()))


def lowest_form(masks: Sequence[int]) -> tuple[int, ...] | None:
    """Masks of the same span where mask i has bit i alone among the lowest `len(masks)` bits; None where there are none."""
    rows = list(masks)
    for bit in range(len(rows)):
        pivot = next((i for i in range(bit, len(rows)) if rows[i] >> bit & 1), None)
        if pivot is None:
            return None
        rows[bit], rows[pivot] = rows[pivot], rows[bit]
        rows = [row ^ rows[bit] if i != bit and row >> bit & 1 else row for i, row in enumerate(rows)]
    return tuple(rows)
