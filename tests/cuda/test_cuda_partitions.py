"""How SMs are cut and shared out: the arithmetic, without a GPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.errors import MisuseError
from missile.gpu.cuda.lab import choose_sms
from missile.gpu.cuda.partitions import SmLimits, groups_for
from missile.gpu.interface import Traffic

HOPPER = SmLimits(total=132, minimum=8, granularity=8)


AMPERE = SmLimits(total=108, minimum=4, granularity=2)


@given(st.lists(st.integers(1, 132), min_size=1, max_size=20), st.sampled_from([HOPPER, AMPERE]))
def test_parts_are_at_least_as_asked_and_sms_are_conserved(counts: list[int], limits: SmLimits) -> None:
    step = max(limits.minimum, limits.granularity)
    try:
        size, shares = groups_for(counts, limits)
    except MisuseError as error:
        assert sum(-(-count // step) * step for count in counts) > limits.total
        assert str(limits.total) in str(error)  # noqa: PT017
        return
    parts = [size * share for share in shares]
    assert size >= limits.minimum
    assert sum(parts) <= limits.total
    for count, part in zip(counts, parts, strict=True):
        assert count <= part < count + step
        assert part % limits.granularity == 0


@pytest.mark.parametrize("counts", [[], [0], [-8, 16], [133], [64, 64, 8]])
def test_a_split_that_makes_no_sense_is_refused(counts: list[int]) -> None:
    with pytest.raises(MisuseError):
        groups_for(counts, HOPPER)


def traffic(sms: int | tuple[int, ...]) -> Traffic:
    import numpy as np

    return Traffic(np.zeros(1, np.int64), sms)


@given(st.integers(1, 132), st.integers(1, 132))
def test_counts_give_disjoint_sms(ours: int, theirs: int) -> None:
    ids = tuple(range(132))
    try:
        victim, aggressor = choose_sms(traffic(ours), traffic(theirs), ids)
    except MisuseError:
        assert ours + theirs > 132
        return
    assert (len(victim), len(aggressor)) == (ours, theirs)
    assert not set(victim) & set(aggressor)
    assert set(victim) | set(aggressor) <= set(ids)


def test_exact_ids_are_kept_and_counts_fill_around_them() -> None:
    victim, aggressor = choose_sms(traffic(2), traffic((0, 1, 5)), tuple(range(6)))
    assert aggressor == [0, 1, 5]
    assert set(victim) < {2, 3, 4}
    assert len(victim) == 2


@pytest.mark.parametrize(
    ("victim", "aggressor", "says"),
    [
        ((6,), None, "no SM 6"),
        ((1, 1), None, "twice"),
        ((1,), (1, 2), "can't be both"),
        (4, 3, "2 are left"),
        (0, None, "0 SMs"),
    ],
)
def test_impossible_sides_are_named(victim: object, aggressor: object, says: str) -> None:
    sides = [None if side is None else traffic(side) for side in (victim, aggressor)]  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match=says):
        choose_sms(sides[0], sides[1], tuple(range(6)))
