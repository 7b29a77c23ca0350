from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.errors import MisuseError
from missile.probe.layout import PageLayout

HOPPER = PageLayout(1 << 21, (0, 1, 2, 3, 4, 5, 6, 7, 9))


def test_a_hopper_granule_is_two_pieces_512_bytes_apart() -> None:
    assert (HOPPER.granule_bytes, HOPPER.piece_bytes, HOPPER.granules) == (512, 256, 4096)
    assert HOPPER.pieces().tolist() == [0, 512]


@given(st.sets(st.integers(0, 15), min_size=1, max_size=15))
def test_every_byte_belongs_to_one_granule(inner: set[int]) -> None:
    layout = PageLayout(1 << 16, tuple(sorted(inner)))
    index = layout.index_of(np.arange(1 << 16))
    assert (np.bincount(index, minlength=layout.granules) == layout.granule_bytes).all()
    assert (index[layout.offsets()] == np.arange(layout.granules)).all()
    starts = layout.offsets()[:, None] + layout.pieces()
    assert (layout.index_of(starts) == np.arange(layout.granules)[:, None]).all()


@given(st.integers(0, 4095))
def test_a_mask_over_indices_is_the_same_mask_over_addresses(mask: int) -> None:
    address_mask = HOPPER.mask_to_address(mask)
    index = np.arange(4096)
    over_index = np.bitwise_count(index & mask) & 1
    over_address = np.bitwise_count(HOPPER.offsets() & address_mask) & 1
    assert (over_index == over_address).all()


@pytest.mark.parametrize("address", [-1, 1 << 21, 1 << 40])
def test_an_address_outside_a_page_is_misuse(address: int) -> None:
    with pytest.raises(MisuseError, match="outside a page"):
        HOPPER.index_of(np.array([0, address]))
