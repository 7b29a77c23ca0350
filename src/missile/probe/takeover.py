"""What one chip's map says about another chip of the same kind: the hash, but no latency. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.probe.channel_map import ChannelMap
from missile.probe.learning import Reference
from missile.probe.pages import PageModel
from missile.probe.structure import Digit

__all__ = ["PageHash", "fitting_shift", "taken_over"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PageHash:
    """model: how pages relate. ball: latency class of each slice on this chip, int64, shape (slices,).

    masks: the linear ones, over granule index bits. digits: the others, as in the map. taken: over from another chip's map.
    """

    model: PageModel
    ball: Ints
    masks: tuple[int, ...]
    digits: tuple[Digit, ...]
    taken: bool = False


def taken_over(known: ChannelMap, reference: Reference) -> PageHash | None:
    """`known`'s hash with the latency classes of the reference page; None where it does not fit that page.

    It fits when, under some XOR of the granule index, all granules of each slice are in one latency class.
    """
    if known.layout != reference.layout:
        return None
    labels = reference.balls.labels
    index = np.arange(known.granules)
    for pattern in known.model.patterns:
        shift = fitting_shift(pattern, labels)
        if shift is None:
            continue
        ball = np.empty(known.slices, np.int64)
        sure = labels >= 0
        ball[pattern[index ^ shift][sure]] = labels[sure]
        masks = tuple(
            sum(1 << place for place, bit in enumerate(known.layout.index_bits) if mask >> bit & 1)
            for mask in known.linear_masks
        )
        # A copy: what this chip's pages teach is no part of the other chip's map.
        model = PageModel(known.slices, known.granules, known.model.patterns, known.model.permutations)
        return PageHash(model, ball, masks, known.digits, taken=True)
    return None


def fitting_shift(pattern: Ints, labels: Ints) -> int | None:
    """The least x so that granules which `pattern[index ^ x]` puts on one slice have one label; None where there is none.

    pattern, labels: int64, shape (granules,); granules labelled -1 say nothing. Every label must occur.
    """
    index = np.arange(len(pattern))
    first = np.flatnonzero(pattern == pattern[0])
    # The granules of one slice rule nearly all shifts out.
    seen = labels[first[None, :] ^ index[:, None]]
    top = seen.max(axis=1)
    for shift in np.flatnonzero(((seen == top[:, None]) | (seen < 0)).all(axis=1)):
        slices = pattern[index ^ shift]
        sure = labels >= 0
        pairs = np.unique(slices[sure] * (int(labels.max()) + 1) + labels[sure])
        if len(pairs) == len(np.unique(pattern)):
            return int(shift)
    return None
