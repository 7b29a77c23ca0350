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


def choose_colors(model: PageModel, layout: PageLayout, centres: Floats) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Colors and the size of the aligned frames that lie wholly in one, bytes.

    The largest frames with `COLORS` colors are best: the larger a frame, the cheaper its translation. Where no frame
    above a granule has as many, the slices are dealt out in `COLORS` parts, neighbours (by `centres`, shape (slices,
    SMs)) together, and a granule is the frame.
    """
    frame = _LARGEST_FRAME
    while frame > layout.granule_bytes:
        colors = frame_colors(model, layout, frame) if frame <= layout.page_bytes else ()
        if len(colors) >= COLORS:
            return colors, frame
        frame //= 2
    count = min(COLORS, model.slices)
    order = np.arange(model.slices, dtype=np.int64)
    if model.slices > 2:
        order = np.asarray(leaves_list(linkage(centres, "average", optimal_ordering=True)), np.int64)
    parts = np.array_split(order, count)
    return tuple(sorted(tuple(sorted(part.tolist())) for part in parts)), layout.granule_bytes
