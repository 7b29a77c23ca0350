"""Latency fingerprints of addresses: measured in random order, so that slow drift can't follow the address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import qr
from scipy.ndimage import uniform_filter1d

from missile.errors import UnsupportedError
from missile.gpu.interface import Gpu, Level

__all__ = ["Fingerprints", "Sampler", "choose_sms", "repeat_noise", "residual_drift"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TOGETHER = 16  # SMs that measure at once: more disturb each other, fewer cost time
_DRIFT_WINDOW = 129  # samples over which drift counts as constant
_BATCH = 1 << 18  # addresses per measurement


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """Repeated latency vectors of some addresses.

    cycles: float32, shape (passes, addresses, SMs), SM clock cycles.
    orders: int64, shape (passes, addresses): orders[p][i] is the address that pass p measured i-th.
    """

    cycles: Floats
    orders: Ints

    @property
    def median(self) -> Floats:
        """Median over the passes, shape (addresses, SMs)."""
        return np.asarray(np.median(self.cycles, axis=0), np.float32)

    def joined(self, more: Fingerprints) -> Fingerprints:
        """These passes and `more` of the same addresses."""
        return Fingerprints(np.concatenate([self.cycles, more.cycles]), np.concatenate([self.orders, more.orders]))


class Sampler:
    """Measures fingerprints on one GPU. Reads only.

    Raises UnsupportedError when the GPU can't measure latencies at chosen addresses and SMs.
    """

    def __init__(self, gpu: Gpu, *, seed: int = 0) -> None:
        if gpu.info.level < Level.MEMORY_LAB:
            raise UnsupportedError(
                f"{gpu.info.name} ({gpu.info.device}) can't measure latencies here, so it can't be probed."
            )
        self.gpu = gpu
        self.rng = np.random.default_rng(seed)
        self.samples = 0

    def fingerprints(self, addresses: Ints, sms: Sequence[int], *, passes: int) -> Fingerprints:
        """Measure every address from every SM, `passes` times, each time in a new random order."""
        cycles = np.empty((passes, len(addresses), len(sms)), np.float32)
        orders = np.empty((passes, len(addresses)), np.int64)
        for index in range(passes):
            orders[index] = self.rng.permutation(len(addresses))
            for start in range(0, len(addresses), _BATCH):
                part = orders[index, start : start + _BATCH]
                measured = self.gpu.measure_latency(addresses[part], sms, concurrent=min(TOGETHER, len(sms)))
                cycles[index, part] = measured.T
        self.samples += cycles.size
        return Fingerprints(cycles, orders)


def repeat_noise(cycles: Floats) -> tuple[float, float]:
    """Noise of one measurement from repeated passes, shape (passes >= 2, addresses, SMs).

    Returns its standard deviation in cycles (robust: from the median absolute difference between passes) and the share
    of measurements that differ from their median by more than 8 of those: what a Gaussian never does.
    """
    difference = np.abs(np.diff(cycles, axis=0))
    sigma = float(np.median(difference)) / (0.6745 * 2**0.5)
    away = np.abs(cycles - np.median(cycles, axis=0))
    return sigma, float((away > 8 * max(sigma, 0.1)).mean())


def choose_sms(fingerprint: Floats, sms: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` SMs whose latencies tell most about the slice.

    Principal components of a pilot over all SMs (shape (addresses, SMs)), then QR with column pivoting over their
    loadings: each SM taken is the one with most left to say after those before it.
    """
    centred = fingerprint - fingerprint.mean(axis=0)
    components = min(count, len(sms), len(fingerprint))
    _, scale, loadings = np.linalg.svd(centred, full_matrices=False)
    _, _, pivots = qr(scale[:components, None] * loadings[:components], pivoting=True, mode="economic")
    return tuple(sorted(sms[int(pivot)] for pivot in pivots[:count]))


def residual_drift(prints: Fingerprints, expected: Floats) -> Fingerprints:
    """`prints` with slow drift removed: what is left of each pass after `expected` (addresses, SMs), smoothed over time.

    The residuals, not the latencies, are smoothed: the slices' own differences would drown the drift.
    """
    cycles = prints.cycles.copy()
    for index, order in enumerate(prints.orders):
        residual = prints.cycles[index, order] - expected[order]
        limit = 4 * np.median(np.abs(residual), axis=0) + 1e-3
        drift = uniform_filter1d(np.clip(residual, -limit, limit), _DRIFT_WINDOW, axis=0, mode="nearest")
        cycles[index, order] -= drift
    return Fingerprints(cycles, prints.orders)
