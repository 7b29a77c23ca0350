from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from missile.probe.gf2 import complement, echelon, parity

WIDTH = 14
vectors = st.lists(st.integers(0, 2**WIDTH - 1), max_size=12)


def _span(basis: tuple[int, ...]) -> set[int]:
    out = {0}
    for vector in basis:
        out |= {vector ^ other for other in out}
    return out


@given(vectors)
def test_echelon_spans_what_it_was_given_and_nothing_else(given_vectors: list[int]) -> None:
    basis = echelon(given_vectors)
    assert _span(basis) == _span(tuple(given_vectors))
    assert len(_span(basis)) == 2 ** len(basis)


@given(vectors)
def test_echelon_is_reduced_and_unique(given_vectors: list[int]) -> None:
    basis = echelon(given_vectors)
    assert list(basis) == sorted(basis, reverse=True)
    for row in basis:
        pivot = 1 << (row.bit_length() - 1)
        assert [other for other in basis if other & pivot] == [row]
    assert echelon(reversed(basis)) == basis


@given(vectors)
def test_complement_is_all_masks_of_even_parity(given_vectors: list[int]) -> None:
    masks = complement(given_vectors, WIDTH)
    everything = np.arange(2**WIDTH)
    even = np.ones(2**WIDTH, bool)
    for vector in given_vectors:
        even &= parity(everything, vector) == 0
    assert _span(masks) == set(np.flatnonzero(even).tolist())
