"""Physical address to slice and channel, on a simulated GPU. Pure arithmetic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from missile.gpu.sim.memory_spec import DigitSpec, MemorySpec

__all__ = ["AddressHash"]

Ints = npt.NDArray[np.int64]


class AddressHash:
    """The hash that `spec` describes."""

    def __init__(self, spec: MemorySpec) -> None:
        self._masks = spec.hash.masks
        self._digits = [_Digit(digit) for digit in spec.hash.digits]
        self._slices_per_channel = spec.slices_per_channel
        self.slices = spec.slices

    def slice_of(self, physical: Ints) -> Ints:
        """Slice of each physical address: int64 in 0..slices-1, the shape of `physical`."""
        physical = np.asarray(physical, np.int64)
        number = np.zeros(physical.shape, np.int64)
        for bit, mask in enumerate(self._masks):
            number |= _parity(physical, mask) << bit
        scale = 1 << len(self._masks)
        for digit in self._digits:
            number += scale * digit(physical)
            scale *= digit.base
        return number

    def channel_of(self, slices: Ints) -> Ints:
        """Channel behind each slice."""
        return np.asarray(slices, np.int64) // self._slices_per_channel


class _Digit:
    def __init__(self, spec: DigitSpec) -> None:
        self.base = spec.base
        self._folds = spec.folds
        self._shifts = spec.shifts
        values = np.arange(1 << len(spec.folds), dtype=np.int64)
        if spec.weights is not None:
            table = sum(((values >> i) & 1) * weight for i, weight in enumerate(spec.weights)) % spec.base
        else:
            table = values % spec.base
            np.random.default_rng(spec.table_seed).shuffle(table)
        self._table = np.asarray(table, np.int64)

    def __call__(self, physical: Ints) -> Ints:
        value = np.zeros(physical.shape, np.int64)
        for bit, mask in enumerate(self._folds):
            value |= _parity(physical, mask) << bit
        digit = self._table[value]
        for mask in self._shifts:
            digit = digit + _parity(physical, mask)
        return digit % self.base


def _parity(addresses: Ints, mask: int) -> Ints:
    return np.asarray(np.bitwise_count(addresses & mask) & 1, np.int64)
