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

__all__ = ["Fingerprints", "Sampler", "choose_sms"]

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
    def passes(self) -> int:
        return len(self.cycles)

    def mean(self) -> Floats:
        """One fingerprint per address, shape (addresses, SMs): the passes' mean, without the extremes from 4 passes on."""
        return _trimmed(self.cycles)

    def noise(self) -> float:
        """Standard deviation of one entry of `mean`, cycles, from the difference of the two halves of the passes."""
        if self.passes < 2:
            raise ValueError("noise needs two passes")
        halves = _trimmed(self.cycles[::2]), _trimmed(self.cycles[1::2])
        return float(np.median(np.abs(halves[0] - halves[1]))) / 0.6745 / 2.0

    def disturbed(self) -> float:
        """Share of the measurements that stand over their address's median by more than 8 sigma: no Gaussian does."""
        away = self.cycles - np.median(self.cycles, axis=0)
        sigma = max(float(np.median(np.abs(away))) / 0.6745, 0.1)
        return float((away > 8 * sigma).mean())

    def joined(self, more: Fingerprints) -> Fingerprints:
        """These passes and `more` of the same addresses."""
        return Fingerprints(np.concatenate([self.cycles, more.cycles]), np.concatenate([self.orders, more.orders]))

    def without_drift(self, expected: Floats) -> Fingerprints:
        """Slow drift removed: what is left of each pass after `expected` (addresses, SMs), smoothed over time.

        The residuals are smoothed, not the latencies: the slices' own differences would drown the drift.
        """
        cycles = self.cycles.copy()
        for index, order in enumerate(self.orders):
            residual = self.cycles[index, order] - expected[order]
            limit = 4 * np.median(np.abs(residual), axis=0) + 1e-3
            drift = uniform_filter1d(np.clip(residual, -limit, limit), _DRIFT_WINDOW, axis=0, mode="nearest")
            cycles[index, order] -= drift
        return Fingerprints(cycles, self.orders)


class Sampler:
    """Measures fingerprints on one GPU. Reads only.

    Raises UnsupportedError when the GPU can't measure latencies at chosen addresses and SMs.
    """

    def __init__(self, gpu: Gpu, *, seed: int = 0) -> None:
        if gpu.info.level < Level.MEMORY_LAB:
            raise UnsupportedError(
                f"{gpu.info.name} ({gpu.info.device}) can't measure latencies at chosen addresses, so it can't be probed."
            )
        self.gpu = gpu
        self.rng = np.random.default_rng(seed)
        self.samples = 0  # latencies measured so far

    def fingerprints(self, addresses: Ints, sms: Sequence[int], *, passes: int) -> Fingerprints:
        """Measure every address from every SM, `passes` times, each time in a new random order."""
        cycles = np.empty((passes, len(addresses), len(sms)), np.float32)
        orders = np.empty((passes, len(addresses)), np.int64)
        for index in range(passes):
            orders[index] = self.rng.permutation(len(addresses))
            cycles[index, orders[index]] = self.in_order(addresses[orders[index]], sms)
        return Fingerprints(cycles, orders)

    def in_order(self, addresses: Ints, sms: Sequence[int]) -> Floats:
        """Measure every address once, in the order given: float32, shape (addresses, SMs)."""
        out = np.empty((len(addresses), len(sms)), np.float32)
        for start in range(0, len(addresses), _BATCH):
            part = addresses[start : start + _BATCH]
            out[start : start + _BATCH] = self.gpu.measure_latency(part, sms, concurrent=min(TOGETHER, len(sms))).T
        self.samples += out.size
        return out


def choose_sms(fingerprints: Floats, sms: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` SMs whose latencies tell most about the slice, ascending.

    Principal components of fingerprints from all SMs (shape (n, SMs)), then QR with column pivoting over their loadings:
    each SM taken is the one with most left to say after those before it.
    """
    centred = fingerprints - fingerprints.mean(axis=0)
    _, scale, loadings = np.linalg.svd(centred, full_matrices=False)
    components = min(count, len(scale))
    _, _, pivots = qr(scale[:components, None] * loadings[:components], pivoting=True, mode="economic")
    return tuple(sorted(sms[int(pivot)] for pivot in pivots[:count]))


def _trimmed(cycles: Floats) -> Floats:
    if len(cycles) < 3:
        return np.asarray(cycles.mean(axis=0), np.float32)
    if len(cycles) == 3:
        return np.asarray(np.median(cycles, axis=0), np.float32)
    total = cycles.sum(axis=0) - cycles.max(axis=0) - cycles.min(axis=0)
    return np.asarray(total / (len(cycles) - 2), np.float32)
