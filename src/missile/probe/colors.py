"""Candidate colors: which slices are given away as a unit. Pure arithmetic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import leaves_list, linkage

from missile.probe.layout import PageLayout
from missile.probe.pages import PageModel
from missile.probe.structure import frame_colors

__all__ = ["COLORS", "choose_colors"]

Floats = npt.NDArray[np.float32]

COLORS = 8  # a tenant's least share is an eighth of the memory
_LARGEST_FRAME = 64 << 10
_FEWEST, _MOST = 4, 32

Groups = tuple[tuple[int, ...], ...]


def choose_colors(model: PageModel, layout: PageLayout, centres: Floats, channels: Groups) -> tuple[Groups, int]:
    """Colors and the size of the aligned frames that lie wholly in one, bytes.

    The largest frames with `COLORS` colors are best: the larger a frame, the cheaper its translation. Where no frame
    above a granule has as many, a granule is the frame and `channels` are the colors, if slices were found to share some;
    else the slices are dealt out in `COLORS` parts, neighbours (by `centres`, shape (slices, SMs)) together.
    """
    frame = _LARGEST_FRAME
    while frame > layout.granule_bytes:
        colors = frame_colors(model, layout, frame) if frame <= layout.page_bytes else ()
        if len(colors) >= COLORS:
            return colors, frame
        frame //= 2
    if _FEWEST <= len(channels) <= _MOST and len(channels) < model.slices:
        return channels, layout.granule_bytes
    count = min(COLORS, model.slices)
    order = np.arange(model.slices, dtype=np.int64)
    if model.slices > 2:
        order = np.asarray(leaves_list(linkage(centres, "average", optimal_ordering=True)), np.int64)
    parts = np.array_split(order, count)
    return tuple(sorted(tuple(sorted(part.tolist())) for part in parts)), layout.granule_bytes
