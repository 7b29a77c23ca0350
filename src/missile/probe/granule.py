"""Which address bits lie inside a granule: those whose flip never moves an address to another slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.errors import NoisyGpuError
from missile.probe.layout import PageLayout
from missile.probe.sampling import Floats, Sampler

__all__ = ["BitFlips", "find_layout", "measure_flips"]

Ints = npt.NDArray[np.int64]

SECTOR_BITS = 5  # a sector of 32 bytes is what memory moves at least: no hash splits it
FRAME_BITS = 12  # bits that don't matter above this one are no granule's: its pieces would be too far apart to use
_BASES = 64
_APART = 2.5  # times the distance between two measurements of one address


@dataclass(frozen=True, slots=True)
class BitFlips:
    """moved: share of the tried addresses that a flip of each address bit moved to another slice, by bit.

    disturbed: see `Fingerprints.disturbed`.
    """

    moved: dict[int, float]
    disturbed: float


def measure_flips(sampler: Sampler, page: int, page_bytes: int, sms: Sequence[int]) -> BitFlips:
    """Flip every bit of `_BASES` random addresses of the page at `page`; a second look at those that seem to move."""
    bits = range(SECTOR_BITS, page_bytes.bit_length() - 1)
    bases = sampler.rng.integers(0, page_bytes >> SECTOR_BITS, _BASES) << SECTOR_BITS
    flipped = np.concatenate([bases, *(bases ^ (1 << bit) for bit in bits)])
    prints = sampler.fingerprints(page + flipped, sms, passes=4)
    # What the difference of two measurements of one address comes to, over all SMs.
    limit = _APART * max(prints.noise(), 0.05) * (2 * len(sms)) ** 0.5
    apart = _distance(prints.mean(), len(bits))
    suspects = apart > limit
    rare = suspects & (suspects.mean(axis=1, keepdims=True) < 0.1)
    if rare.any():
        # One disturbed measurement must not split a granule: look again where a bit moves next to nothing.
        again = sampler.fingerprints(page + flipped, sms, passes=5)
        suspects &= ~rare | (_distance(again.mean(), len(bits)) > limit)
    moved = {bit: float(share) for bit, share in zip(bits, suspects.mean(axis=1), strict=True)}
    return BitFlips(moved, prints.disturbed())


def find_layout(flips: BitFlips, page_bytes: int) -> PageLayout:
    """The granule that `flips` show. NoisyGpuError where no bit or every bit seems to matter."""
    outer = [bit for bit, share in flips.moved.items() if share > 0]
    if not outer:
        raise NoisyGpuError("No address bit changes the latency: either the GPU has one slice or noise hides them all.")
    lowest = min(outer)
    inner = [*range(SECTOR_BITS), *(bit for bit in flips.moved if bit not in outer and bit < max(lowest, FRAME_BITS))]
    if lowest == SECTOR_BITS:
        raise NoisyGpuError(
            "Neighbouring sectors of 32 bytes seem to lie on different slices: the latencies are too noisy to tell."
        )
    return PageLayout(page_bytes, tuple(inner))


def _distance(median: Floats, bits: int) -> npt.NDArray[np.float64]:
    """Distance between each base's fingerprint and that with each bit flipped, shape (bits, bases)."""
    rows = median.reshape(bits + 1, _BASES, -1)
    return np.asarray(np.linalg.norm(rows[1:] - rows[:1], axis=2), np.float64)
