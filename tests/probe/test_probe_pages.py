from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missile.errors import NoisyGpuError
from missile.probe.pages import NO_PAGE, PageModel, signature
from missile.probe.relation import relate


@given(st.integers(0, 2**32 - 1))
def test_a_signature_ignores_names_and_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    row = rng.integers(0, 9, 40)
    renamed = rng.permutation(9)[row]
    moved = row.copy()
    place = int(rng.integers(40))
    moved[place] = (moved[place] + 1) % 9
    first, second, third = signature(np.array([row, renamed, moved]))
    assert first == second
    same_cells = np.array_equal(np.equal.outer(row, row), np.equal.outer(moved, moved))
    assert (first == third) == same_cells


def _page(digits: np.ndarray, base: int, shift: int, rotate: int, flip: int) -> np.ndarray:
    """A parity and a digit, as on the H200: index bit 0 is the parity, the rest folds into a number modulo `base`."""
    index = np.arange(len(digits)) ^ shift
    return ((index & 1) ^ flip) + 2 * ((digits[index] + rotate) % base)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([11, 13, 23]))
def test_twins_that_latency_merges_are_told_apart_by_other_pages(seed: int, base: int) -> None:
    rng = np.random.default_rng(seed)
    index = np.arange(1024)
    digits = (index >> 1) % base
    constants = [
        (0, 0, 0),
        *((int(rng.integers(1024)), int(rng.integers(base)), int(rng.integers(2))) for _ in range(9)),
    ]
    truth = np.array([_page(digits, base, *given_) for given_ in constants])
    ball = np.arange(2 * base)
    ball[2] = ball[0]  # two slices of one parity answer alike
    ball = np.unique(ball, return_inverse=True)[1]
    try:
        related = relate(ball[truth])
    except NoisyGpuError:
        return  # these pages put the twins together every time
    assert related.model.slices == 2 * base
    for page, found in zip(truth, related.constants, strict=True):
        if found[2] == NO_PAGE:
            continue
        said = related.model.labels(found[None], index)[0]
        # The reference page names the slices: one name, one slice, on every page.
        names = dict(zip(related.model.patterns[0].tolist(), truth[0].tolist(), strict=True))
        assert [names[s] for s in said.tolist()] == page.tolist()


def test_merged_slices_that_no_page_separates_are_refused() -> None:
    labels = np.arange(1024) % 6
    merged = np.where(labels == 5, 4, labels)
    with pytest.raises(NoisyGpuError, match="could not be told apart"):
        relate(np.array([merged, merged]))


@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_permutations_are_closed_under_composition(slices: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = PageModel(slices, 64, [rng.integers(0, slices, 64)])
    model.add_permutation(np.roll(np.arange(slices), int(rng.integers(slices))))
    known = {item.tobytes() for item in model.permutations}
    assert all(a[b].tobytes() in known for a in model.permutations for b in model.permutations)
