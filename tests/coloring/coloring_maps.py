"""Channel maps of made-up GPUs with small pages: linear colors, colors from a table, pages that differ."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from missile.probe.channel_map import ChannelMap, Topology
from missile.probe.gf2 import parity
from missile.probe.layout import PageLayout
from missile.probe.matching import Metric
from missile.probe.pages import PageModel

Ints = npt.NDArray[np.int64]

HALVES = (*range(8), 9)  # a Hopper granule: two halves of 256 bytes, 512 bytes apart


def linear_map(rng: np.random.Generator, masks: int = 3, frame_bits: int = 12, page_bits: int = 21) -> ChannelMap:
    """2**masks slices that are parities of address bits from `frame_bits` on; each is a color."""
    frames = 1 << (page_bits - frame_bits)
    index = np.arange(frames)
    pattern = np.zeros(frames, np.int64)
    for bit in range(masks):
        high = int(rng.integers(0, frames >> masks)) << masks
        pattern |= parity(index, high | 1 << bit) << bit
    permutations = [np.arange(1 << masks) ^ flip for flip in range(1 << masks)]
    layout = PageLayout(1 << page_bits, tuple(range(frame_bits)))
    return _map(layout, [rng.permutation(1 << masks)[pattern]], permutations[:1], 1 << masks, 1 << frame_bits)


def table_map(rng: np.random.Generator, slices: int = 12, colors: int = 4, page_bits: int = 16) -> ChannelMap:
    """Slices dealt out at random over granules of two halves; colors of as many slices each; a second naming of slices."""
    layout = PageLayout(1 << page_bits, HALVES)
    pattern = rng.permutation(np.arange(layout.granules) % slices)
    other = rng.permutation(slices)
    return _map(layout, [pattern], [np.arange(slices), other], colors, layout.granule_bytes)


def pair_map(
    rng: np.random.Generator, same: int = 2, page_bits: int = 16
) -> tuple[ChannelMap, tuple[tuple[int, ...], ...]]:
    """Six colors of two slices whose halves, also given, split neighbouring granules, but for `same` pairs; two namings."""
    layout = PageLayout(1 << page_bits, HALVES)
    colors = rng.permutation(6)
    halves = (colors[:3], colors[3:])
    pairs = layout.granules // 2
    sides = rng.integers(0, 2, pairs)
    side = np.stack([sides, 1 - sides], axis=1)
    side[rng.permutation(pairs)[:same], 1] ^= 1
    pattern = rng.integers(0, 3, side.shape)
    pattern = np.stack(halves)[side, pattern] * 2 + rng.integers(0, 2, side.shape)
    swapped = np.repeat(rng.permutation(halves[0]), 2), np.repeat(rng.permutation(halves[1]), 2)
    other = np.empty(12, np.int64)
    for half, new in zip(halves, swapped, strict=True):
        other[np.repeat(half, 2) * 2 + np.tile([0, 1], 3)] = new * 2 + np.tile([0, 1], 3)
    found = tuple(sorted(tuple(sorted(half.tolist())) for half in halves))
    return _map(layout, [pattern.reshape(-1)], [np.arange(12), other], 6, layout.granule_bytes), found


def _map(layout: PageLayout, patterns: list[Ints], permutations: list[Ints], colors: int, frame: int) -> ChannelMap:
    slices = int(patterns[0].max()) + 1
    model = PageModel(slices, layout.granules, patterns, permutations)
    parts = tuple(tuple(p.tolist()) for p in np.array_split(np.arange(slices), colors))
    return ChannelMap(
        gpu="made up",
        uuid="",
        device="test",
        simulated=True,
        layout=layout,
        model=model,
        metric=Metric((0,), np.zeros((slices, 1), np.float32), np.zeros(slices, np.int64), 1.0, 1.0),
        linear_masks=(),
        digits=(),
        colors=parts,
        frame_bytes=frame,
        topology=Topology((0,), ((0,),), (0,), (0,) * slices, 0.0),
        confidence=1.0,
        seconds=0.0,
    )


def random_pages(channel_map: ChannelMap, count: int, rng: np.random.Generator, lost: int = 0) -> Ints:
    """Constants of `count` pages, `lost` of them not classified, shape (count, 3)."""
    model = channel_map.model
    # As many index XORs as there are would leave no two pages alike.
    shifts = rng.integers(0, model.granules, 4)
    constants = np.stack(
        [
            rng.integers(0, len(model.patterns), count),
            rng.choice(shifts, count),
            rng.integers(0, len(model.permutations), count),
        ],
        axis=1,
    )
    constants[rng.permutation(count)[:lost]] = -1
    return constants
