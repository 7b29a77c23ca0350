"""The shapes of translation that tenants on one GPU can come to have: what a package is colored for ahead of time."""

from __future__ import annotations

import numpy as np

from missile.coloring.halves import find_halves
from missile.coloring.shape import Shape
from missile.coloring.shares import Demand, plan_shares
from missile.errors import OutOfMemoryError
from missile.probe.channel_map import ChannelMap

__all__ = ["usual_shapes"]

_MOST_KINDS = 512


def usual_shapes(channel_map: ChannelMap) -> tuple[Shape, ...]:
    """What `plan_shares` gives by itself: to two tenants on halves of the colors, and to one on a single color, with pages
    all alike and with pages of every kind that the map knows. Most wanted first.
    """
    model = channel_map.model
    kinds = [(p, x, q) for q in range(len(model.permutations)) for p in range(len(model.patterns)) for x in (0, 1)]
    every = np.asarray(kinds[:_MOST_KINDS], np.int64)
    alike = np.tile(every[:1], (len(every), 1))
    halves = find_halves(channel_map)
    groups: list[tuple[tuple[int, ...], ...]] = [tuple((color,) for color in range(len(channel_map.colors)))]
    if halves is not None:
        groups.insert(0, halves.sets)
    found: dict[Shape, None] = {}
    for group in groups:
        least = min(sum(len(channel_map.colors[c]) for c in colors) for colors in group)
        most = len(every) * channel_map.page_bytes * least // channel_map.slices
        for constants in (every, alike):
            demands = [Demand(str(index), colors, most * 3 // 4) for index, colors in enumerate(group)]
            try:
                shares = plan_shares(channel_map, constants, demands)
            except OutOfMemoryError:  # pages that differ much in how many frames they have of a color
                continue
            found |= dict.fromkeys(share.translation.shape for share in shares)
    return tuple(found)
