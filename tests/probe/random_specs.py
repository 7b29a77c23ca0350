"""Random memories for the simulated GPU, and what the truth is about them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from missile.gpu.sim import SimulatedGpu
from missile.gpu.sim.spec import GpuSpec
from missile.probe.channel_map import ChannelMap
from missile.probe.gf2 import echelon

_HIGH_BITS = range(21, 34)


def gpu_with(memory: dict, *, sms: int = 24, gib: float = 1.0, seed: int = 0) -> SimulatedGpu:
    """A small simulated GPU with this `[memory]` table."""
    spec = GpuSpec.model_validate(
        {
            "name": "random",
            "compute_capability": [9, 0],
            "sm": {"count": sms, "clock_mhz": 1000, "operations_per_clock": 256, "tensor_operations_per_clock": 1024},
            "l2": {"mib": 4, "bandwidth_gb_s": 1000},
            "vram": {"gib": gib, "bandwidth_gb_s": 500},
            "link": {"h2d_gb_s": 10, "d2h_gb_s": 10},
            "memory": memory,
        }
    )
    return SimulatedGpu(spec, seed=seed)


@st.composite
def memories(draw: st.DrawFn) -> dict:
    """`[memory]` tables: a granule (with or without a hole), 2 to 5 masks, a digit of base 3, 5, 6 or 7, noise."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lowest = draw(st.integers(9, 11))
    hole = draw(st.booleans())
    bits = [bit for bit in range(lowest, 21) if not (hole and bit == lowest + 1)]
    count = draw(st.integers(2, 5 if len(bits) > 10 else 4))
    base = draw(st.sampled_from([3, 5, 6, 7]))
    most = len(bits) - count
    folds = draw(st.integers(min(7, most), most))
    vectors = _independent(rng, bits, count + folds)
    high = [sum(1 << bit for bit in _HIGH_BITS if rng.random() < 0.4) for _ in vectors]
    digit: dict = {"base": base, "folds": [v | h for v, h in zip(vectors[count:], high[count:], strict=True)]}
    if draw(st.booleans()):
        digit["weights"] = [int(w) for w in rng.integers(1, base, folds)]
    else:
        digit["table_seed"] = int(rng.integers(1 << 31))
    if draw(st.booleans()):
        digit["shifts"] = [1 << int(rng.integers(21, 30))]
    return {
        "hash": {"masks": [v | h for v, h in zip(vectors[:count], high[:count], strict=True)], "digits": [digit]},
        "latency": {
            "half": draw(st.sampled_from([0.0, 30.0])),
            "spread": draw(st.floats(4.0, 10.0)),
            "noise": draw(st.floats(0.1, 2.0)),
            "drift": draw(st.floats(0.0, 3.0)),
            "groups": draw(st.integers(2, 8)),
        },
    }


def truth_of(gpu: SimulatedGpu, addresses: np.ndarray) -> np.ndarray:
    """The slice that the simulated hash gives each device address."""
    physical = gpu._memory.physical(addresses.reshape(-1))
    return gpu._lab.hash.slice_of(physical).reshape(addresses.shape)


def kept_share(gpu: SimulatedGpu, found: ChannelMap, pages: int = 24) -> float:
    """Share of fresh pages that the map classifies."""
    range_ = gpu.reserve(pages * found.page_bytes)
    range_.map(0, [gpu.create_page() for _ in range(pages)])
    constants = found.classify(gpu, range_.address + np.arange(pages) * found.page_bytes)
    return float((constants[:, 2] >= 0).mean())


def wrong_granules(gpu: SimulatedGpu, found: ChannelMap, pages: int = 24, least_kept: float = 0.9) -> int:
    """How many granules of fresh pages the map puts on another slice than the hash does; unclassified pages don't count.

    least_kept: the share of the pages that it has to classify.

    Slices have no names of their own: the naming that the reference page gives must hold for every page.
    """
    page_bytes = found.page_bytes
    range_ = gpu.reserve(pages * page_bytes)
    range_.map(0, [gpu.create_page() for _ in range(pages)])
    addresses = range_.address + np.arange(pages) * page_bytes
    constants = found.classify(gpu, addresses)
    kept = constants[:, 2] >= 0
    assert kept.mean() > least_kept
    sectors = np.arange(0, page_bytes, 128)
    truth = truth_of(gpu, addresses[kept][:, None] + sectors)
    index = found.layout.index_of(sectors)
    said = found.page_slices(constants[kept])[:, index]
    pairs, counts = np.unique(np.stack([said.reshape(-1), truth.reshape(-1)]), axis=1, return_counts=True)
    wrong = 0
    for slice_ in np.unique(pairs[0]):
        mine = counts[pairs[0] == slice_]
        wrong += int(mine.sum() - mine.max())
    # Two slices under one name are wrong, too.
    best = {int(s): int(pairs[1][(pairs[0] == s)][counts[pairs[0] == s].argmax()]) for s in np.unique(pairs[0])}
    return wrong + (len(best) - len(set(best.values()))) + abs(len(np.unique(truth)) - found.slices)


def masks_in_page(masks: list[int], page_bytes: int) -> tuple[int, ...]:
    return echelon(mask & (page_bytes - 1) for mask in masks)


def _independent(rng: np.random.Generator, bits: list[int], count: int) -> list[int]:
    while True:
        vectors = [sum(1 << bit for bit in bits if rng.random() < 0.4) for _ in range(count)]
        used = 0
        for vector in vectors:
            used |= vector
        if len(echelon(vectors)) == count and all(used >> bit & 1 for bit in bits):
            return vectors
