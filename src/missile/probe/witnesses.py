"""Independent tests of a channel map on the GPU it was taken from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from missile.gpu.interface import Gpu
from missile.probe.channel_map import ChannelMap, Verdict, Witness
from missile.probe.contention import SliceMemory, unit_pair
from missile.probe.pairs import judge_pairs
from missile.probe.sampling import Floats, Sampler
from missile.probe.slices import Balls, spectral_strength

__all__ = ["MAX_WRONG", "contention_witness", "held_out_witness", "spectral_witness"]

Ints = npt.NDArray[np.int64]

MAX_WRONG = 0.001  # share of held-out granules that may be wrong
_HELD_OUT = 4096
_PASSES = 4
_MAX_PASSES = 16
_SECTOR = 32
_HEAVY = 20.0  # energy of a mask that stands out, over the median's
_TRIES = 24


def held_out_witness(
    sampler: Sampler, channel_map: ChannelMap, balls: Balls, sms: Sequence[int], pages: Ints, constants: Ints
) -> Witness:
    """Predict random sectors of random pages that nothing was fitted to, then measure them from all SMs.

    balls: of the reference page, from all `sms`. A sector counts as wrong when it answers like another slice.
    """
    known = np.flatnonzero(constants[:, 2] >= 0)
    rng = sampler.rng
    rows = rng.choice(known, _HELD_OUT)
    offsets = rng.integers(0, channel_map.page_bytes // _SECTOR, _HELD_OUT) * _SECTOR
    predicted = channel_map.model.labels(constants[rows], channel_map.layout.index_of(offsets)[:, None])[:, 0]
    expected = channel_map.metric.ball[predicted]
    seen = np.full(_HELD_OUT, -1, np.int64)
    passes = _PASSES
    while (seen < 0).any() and passes <= _MAX_PASSES:
        open_ = np.flatnonzero(seen < 0)
        seen[open_] = balls.nearest(
            sampler.fingerprints(pages[rows[open_]] + offsets[open_], sms, passes=passes).mean()
        )
        passes *= 2
    wrong, unsure = int(((seen >= 0) & (seen != expected)).sum()), int((seen < 0).sum())
    right = 1.0 - (wrong + unsure) / _HELD_OUT
    verdict = Verdict.DISAGREES if wrong > MAX_WRONG * _HELD_OUT else Verdict.AGREES
    if unsure > MAX_WRONG * _HELD_OUT:
        verdict = Verdict.UNSURE if verdict is Verdict.AGREES else verdict
    return Witness(
        "held-out granules",
        verdict,
        f"{_HELD_OUT - wrong - unsure} of {_HELD_OUT} sectors in {len(np.unique(rows))} pages answer as predicted, "
        f"{wrong} like another slice, {unsure} like none for sure.",
        {"right": right, "wrong": wrong, "unsure": unsure, "sectors": _HELD_OUT, "pages": len(np.unique(rows))},
    )


def spectral_witness(fingerprints: Floats, balls: Balls, masks: Sequence[int]) -> Witness:
    """The exact masks (over granule index bits) must show in the latencies themselves, before any clustering."""
    points = ((fingerprints - fingerprints.mean(axis=0)) @ balls.axes).astype(np.float64)
    strengths = spectral_strength(points, masks)
    weakest = min(strengths, default=0.0)
    verdict = Verdict.AGREES if weakest >= _HEAVY else Verdict.UNSURE if masks else Verdict.NOT_RUN
    says = (
        f"The weakest of {len(masks)} linear masks has {weakest:.0f} times the spectral floor's energy."
        if masks
        else "There is no linear mask to look for."
    )
    return Witness("spectrum", verdict, says, {f"strength_{i}": strength for i, strength in enumerate(strengths)})


def contention_witness(
    gpu: Gpu, channel_map: ChannelMap, memory: SliceMemory, rng: np.random.Generator, *, tries: int = _TRIES
) -> Witness:
    """Two granules on one slice must disturb each other, two on different slices must not.

    One unit each, so that a slice which in truth is two (that no latency tells apart) shows: pairs of its granules then do
    not disturb each other half of the time. Slices that only the relation of pages told apart, twins, are tested most, each
    against itself and against its twin.
    """
    ball = channel_map.metric.ball
    twins = np.flatnonzero(np.bincount(ball)[ball] > 1)
    count = min(len(twins) * 2, tries * 2 // 3)
    any_, close = (
        np.resize(rng.permutation(channel_map.slices), tries - count),
        np.resize(rng.permutation(twins), count),
    )
    chosen = [int(slice_) for slice_ in (*any_, *close)]
    others = [_elsewhere(ball, int(slice_), rng) for slice_ in any_] + [
        _twin(ball, int(slice_), rng) for slice_ in close
    ]
    found = judge_pairs(
        [unit_pair(gpu, memory, slice_, slice_) for slice_ in chosen],
        [unit_pair(gpu, memory, slice_, other) for slice_, other in zip(chosen, others, strict=True)],
        sure=tries - count,
    )
    same, apart = found.same, found.apart
    numbers = {"same_median": float(np.median(same)), "same_min": float(same.min())}
    numbers |= {"apart_median": float(np.median(apart)), "apart_max": float(apart.max())}
    numbers |= {"cut": found.cut, "pairs": tries, "again": found.again}
    says = (
        f"A reader beside one on the same slice takes x{np.median(same):.2f} (least x{same.min():.2f}), beside one on "
        f"another slice x{np.median(apart):.2f} (most x{apart.max():.2f}), in {tries} pairs each."
    )
    return Witness("contention", found.verdict, says, numbers)


def _elsewhere(ball: Ints, slice_: int, rng: np.random.Generator) -> int:
    """A slice that also latency tells apart, where there is one."""
    far = np.flatnonzero(ball != ball[slice_])
    return int(rng.choice(far)) if len(far) else _twin(ball, slice_, rng)


def _twin(ball: Ints, slice_: int, rng: np.random.Generator) -> int:
    return int(rng.choice([other for other in np.flatnonzero(ball == ball[slice_]) if other != slice_]))
