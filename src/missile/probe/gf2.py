"""Linear algebra over GF(2): vectors are Python ints, bit i is coordinate i."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["complement", "echelon", "parity"]


def parity(values: npt.NDArray[np.int64], mask: int) -> npt.NDArray[np.int64]:
    """Parity (0 or 1) of `values & mask`, elementwise."""
    return np.asarray(np.bitwise_count(np.asarray(values, np.int64) & mask) & 1, np.int64)


def echelon(vectors: Iterable[int]) -> tuple[int, ...]:
    """The reduced echelon basis of the span: every vector's highest bit is in no other vector; highest first."""
    basis: list[int] = []
    for vector in vectors:
        for row in basis:
            vector = min(vector, vector ^ row)
        if vector:
            basis = [min(row, row ^ vector) if row >> (vector.bit_length() - 1) & 1 else row for row in basis]
            basis.append(vector)
            basis.sort(reverse=True)
    return tuple(basis)


def complement(vectors: Iterable[int], width: int) -> tuple[int, ...]:
    """Echelon basis of all masks of `width` bits that have even parity with every one of `vectors`."""
    rows = echelon(vectors)
    pivots = [row.bit_length() - 1 for row in rows]
    masks = []
    for free in range(width):
        if free in pivots:
            continue
        # One solution per free coordinate: in echelon form each pivot coordinate depends on free ones only.
        masks.append((1 << free) | sum(1 << pivot for row, pivot in zip(rows, pivots, strict=True) if row >> free & 1))
    return echelon(masks)
