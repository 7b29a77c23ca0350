"""Two sets of colors that split neighbouring frames: of (nearly) every two that one address bit tells apart, each has one.

Where there are such halves, a tenant's memory is every other frame, and one bit says which of the two: what the pair form
translates by. In pairs of the same half the two tenants still get one frame each, so memory stays disjoint; these frames
are not of their tenant's colors, and how many there are is the residue. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from missile.coloring.palette import Palette
from missile.probe.channel_map import ChannelMap
from missile.probe.gf2 import parity
from missile.probe.layout import PageLayout

__all__ = ["Halves", "choices", "choices_of_pages", "find_halves", "piece_layout", "residue", "residues"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Halves:
    """bit: the address bit that tells neighbours apart. sets: the colors of each half, color 0 in the first.

    residue: share of a half's frames that are of the other half's colors, in the kind of page that has most of them.
    """

    bit: int
    sets: tuple[tuple[int, ...], tuple[int, ...]]
    residue: float


def find_halves(channel_map: ChannelMap) -> Halves | None:
    """The two halves of all colors with the least residue, None where there is but one color.

    Looked for with every address bit that numbers frames; of equal ones the lowest bit is taken. All kinds of pages that
    the map knows count (an XOR of the frame's index moves pairs as a whole, so those with one count once).
    """
    palette = Palette(channel_map)
    model = channel_map.model
    kinds = [(p, 0, q) for p in range(len(model.patterns)) for q in range(len(model.permutations))]
    patterns = np.unique(np.stack([palette.pattern(kind) for kind in kinds]), axis=0)
    best: Halves | None = None
    for position, bit in enumerate(palette.layout.index_bits):
        meetings = np.stack([_meetings(pattern, position, palette.colors) for pattern in patterns])
        for first in _first_halves(palette.colors):
            inside = np.isin(np.arange(palette.colors), first)
            # Of a pair inside one half, one of the two frames goes to the other tenant.
            both = meetings[:, inside][:, :, inside].sum(axis=(1, 2))
            neither = meetings[:, ~inside][:, :, ~inside].sum(axis=(1, 2))
            share = float(np.maximum(both, neither).max() / (palette.layout.granules // 2))
            if best is None or share < best.residue:
                rest = tuple(c for c in range(palette.colors) if c not in first)
                best = Halves(bit, (first, rest), share)
    return best


def piece_layout(layout: PageLayout) -> PageLayout:
    """`layout` with each contiguous piece of a granule as a frame of its own: what the pair form numbers."""
    return PageLayout(layout.page_bytes, tuple(range(layout.index_bits[0])))


def choices(palette: Palette, colors: Sequence[int], constants: Sequence[int] | Ints) -> Ints:
    """Which of every two neighbouring pieces of a page with `constants` a tenant of `colors` has: 0 or 1, shape (pairs,).

    Of two that are both or neither of `colors`, the tenant with color 0 has the lower one: two tenants whose colors are
    halves have every piece between them. Of all colors the tenant has one of two as well, now this one and now that.
    """
    chosen = _chosen(palette, colors, palette.owned(colors, constants), 0)
    return np.asarray(chosen[_pairs_of_pieces(palette.layout)], np.int64)


def choices_of_pages(palette: Palette, colors: Sequence[int], constants: Ints) -> npt.NDArray[np.uint8]:
    """`choices` of each page with `constants` (pages, 3), shape (pages, pairs).

    Pages that differ by the XOR of the index alone have the same choices in another order, turned round where the XOR has
    the pair's own bit: so there are few to find out.
    """
    spread = _pairs_of_pieces(palette.layout)
    shifts = palette.shifts(constants)
    if len(colors) == palette.colors:
        shifts = np.zeros_like(shifts)  # these go by the pair's number
    orders = {shift: spread ^ shift for shift in np.unique(shifts >> 1).tolist()}
    found: dict[tuple[int, int, int], npt.NDArray[np.uint8]] = {}
    out = np.empty((len(constants), len(spread)), np.uint8)
    keys = zip(constants[:, 0].tolist(), shifts.tolist(), constants[:, 2].tolist(), strict=True)
    for page, (pattern, shift, names) in enumerate(keys):
        key = (pattern, shift & 1, names)
        if key not in found:
            found[key] = _chosen(palette, colors, palette.owned(colors, (pattern, 0, names)), shift & 1)
        np.take(found[key], orders[shift >> 1], out=out[page], mode="clip")
    return out


def _chosen(palette: Palette, colors: Sequence[int], wanted: npt.NDArray[np.bool_], turned: int) -> Any:
    """Which of each pair of frames a tenant has, of those that it `wanted`. turned: their order in the page is the other."""
    if len(colors) == palette.colors:
        return np.asarray(parity(np.arange(len(wanted) // 2), -1), np.uint8)
    lower, upper = wanted[turned::2], wanted[1 - turned :: 2]
    return np.where(lower == upper, int(0 not in colors), upper).astype(np.uint8)


def residues(palette: Palette, colors: Sequence[int], constants: Ints) -> npt.NDArray[np.float64]:
    """`residue` of each page with `constants` (pages, 3): an XOR of the index changes nothing about it."""
    kinds, place = np.unique(constants[:, [0, 2]], axis=0, return_inverse=True)
    found = [residue(palette, colors, (pattern, 0, names)) for pattern, names in kinds.tolist()]
    return np.asarray(found, np.float64)[place.reshape(-1)]


def residue(palette: Palette, colors: Sequence[int], constants: Sequence[int] | Ints) -> float:
    """Share of a tenant's frames in a page with `constants` that are not of its `colors`."""
    wanted = palette.owned(colors, constants)
    lower, upper = wanted[0::2], wanted[1::2]
    taken = np.where(lower == upper, lower, True)
    return float(1 - taken.mean())


@cache
def _pairs_of_pieces(layout: PageLayout) -> Ints:
    """The pair of granules that each pair of neighbouring pieces belongs to."""
    return layout.index_of(piece_layout(layout).offsets()[0::2]) >> 1


def _meetings(pattern: Ints, position: int, colors: int) -> Ints:
    """How often each color has each other one as its neighbour, shape (colors, colors)."""
    index = np.arange(len(pattern))
    lower = index[index >> position & 1 == 0]
    pairs = pattern[lower] * colors + pattern[lower | 1 << position]
    return np.bincount(pairs, minlength=colors * colors).reshape(colors, colors)


def _first_halves(colors: int) -> list[tuple[int, ...]]:
    """Every set of colors with color 0 in it that leaves a rest."""
    others = range(1, colors)
    return [(0, *some) for size in range(colors - 1) for some in combinations(others, size)]
