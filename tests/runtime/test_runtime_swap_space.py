"""Where weights from the host go on the device: inside the budget, and beside each other as far as there is room."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.errors import MisuseError
from missile.runtime.swap_space import SwapSpace, choose_place

MIB = 1 << 20


@given(st.lists(st.integers(1, 12 * MIB), max_size=8), st.integers(12, 40))
def test_places_displace_as_little_as_any_would(sizes: list[int], mib: int) -> None:
    budget = mib * MIB
    taken: list[tuple[int, int]] = []

    def displaced(at: int, size: int) -> int:
        return sum(other for start, other in taken if at < start + other and start < at + size)

    for size in sizes:
        at = choose_place(taken, size, budget)
        assert at % MIB == 0
        anywhere = range(0, budget - size + 1, MIB)
        assert at in anywhere
        assert displaced(at, size) == min(displaced(other, size) for other in anywhere)
        taken.append((at, size))
    if sum(-(-size // MIB) for size in sizes) <= mib:
        assert all(one + size <= other for (one, size), (other, _) in pairwise(sorted(taken)))


def test_who_fits_beside_two_that_displace_each_other_anyway_does() -> None:
    assert choose_place([(0, 60 * MIB)], 60 * MIB, 100 * MIB) == 0
    assert choose_place([(0, 60 * MIB), (0, 60 * MIB)], 30 * MIB, 100 * MIB) == 60 * MIB


def test_the_memory_is_held_while_somebody_is_in_it(gpu: Any) -> None:
    free = gpu.memory_free()
    space = SwapSpace(gpu, 64 * MIB, setting="swap_mb")
    assert gpu.memory_free() == free
    first, second = ExitStack(), ExitStack()
    one, two = space.take(40 * MIB, "one", first), space.take(20 * MIB, "two", second)
    assert two == one + 40 * MIB
    assert gpu.memory_free() == free - 64 * MIB
    first.close()
    assert space.take(30 * MIB, "three", second) == one
    with pytest.raises(MisuseError, match="'four' has 65 MiB of weights on the host and swap_mb is 64"):
        space.take(64 * MIB + 1, "four", second)
    second.close()
    assert gpu.memory_free() == free
    with ExitStack() as undo, pytest.raises(MisuseError, match="'one': residency = host needs swap_mb"):
        SwapSpace(gpu, 0, setting="swap_mb").take(1, "one", undo)
