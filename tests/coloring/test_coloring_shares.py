"""Shares of a pool: the right colors of the right pages, and a clear word where they don't suffice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from coloring_maps import linear_map, pair_map, random_pages, table_map
from hypothesis import given, settings
from hypothesis import strategies as st

from missile.coloring.halves import choices, choices_of_pages, find_halves, residue, residues
from missile.coloring.palette import Palette
from missile.coloring.shape import Form
from missile.coloring.shares import Demand, Share, plan_shares
from missile.errors import MisuseError, OutOfMemoryError, UnsupportedError
from missile.probe.channel_map import ChannelMap
from missile.probe.map_file import read_map


def places_of(share: Share) -> np.ndarray:
    """(pool page, address in it) of every piece of `share`, those of the guard among them, shape (pieces, 2)."""
    layout = share.translation.shape.layout
    starts = share.translation.locate(np.arange(share.translation.frames + share.translation.shape.guards))
    page, within = np.divmod((starts[:, None] + layout.pieces()).reshape(-1), layout.page_bytes)
    return np.stack([np.array(share.pages)[page], within], axis=1)


def check(channel_map: ChannelMap, constants: np.ndarray, shares: tuple[Share, ...]) -> None:
    palette = Palette(channel_map)
    taken: set[tuple[int, int]] = set()
    for share in shares:
        found = places_of(share)
        for page, at in found[:: max(1, len(found) // 97)]:
            assert palette.pattern(constants[page])[palette.layout.index_of(at)] in share.colors
        mine = set(map(tuple, found.tolist()))
        assert len(mine) == len(found)
        assert not mine & taken
        taken |= mine


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([None, Form.SHADOW]))
def test_shares_have_their_colors_and_never_meet(seed: int, form: Form | None) -> None:
    rng = np.random.default_rng(seed)
    channel_map = linear_map(rng) if seed % 2 else table_map(rng)
    constants = random_pages(channel_map, 24, rng, lost=3)
    colors = rng.permutation(len(channel_map.colors)).tolist()
    cut = int(rng.integers(1, len(colors)))
    size = channel_map.page_bytes // 8
    demands = [
        Demand("ls", tuple(colors[:cut]), int(rng.integers(1, size * cut))),
        Demand("be", tuple(colors[cut:]), int(rng.integers(1, size))),
    ]
    shares = plan_shares(channel_map, constants, demands, form=form)
    check(channel_map, constants, shares)
    for share, demand in zip(shares, demands, strict=True):
        assert share.nbytes >= demand.nbytes
        assert not any(constants[page, 2] == -1 for page in share.pages)


@settings(max_examples=10)
@given(st.integers(0, 10_000))
def test_all_forms_own_the_same_frames_of_linear_colors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    channel_map = linear_map(rng)
    constants = random_pages(channel_map, 6, rng)
    demand = [Demand("t", (1, 4, 6), 100)]
    owned = []
    for form in (Form.ARITHMETIC, Form.IN_PAGE, Form.SHADOW):
        (share,) = plan_shares(channel_map, constants, demand, form=form)
        assert share.translation.shape.form is form
        owned.append({tuple(p) for p in places_of(share).tolist() if p[0] == share.pages[0]})
        check(channel_map, constants, (share,))
    assert owned[0] == owned[1]


def test_pages_whose_constants_vanish_come_first() -> None:
    channel_map = table_map(np.random.default_rng(1))
    constants = np.zeros((6, 3), np.int64)
    constants[[0, 3], 1] = 5
    (share,) = plan_shares(channel_map, constants, [Demand("t", (0, 1), channel_map.page_bytes * 5 // 4)])
    assert share.pages == (1, 2, 4)
    assert share.translation.shape.page_xors == 0
    (more,) = plan_shares(channel_map, constants, [Demand("t", (0, 1), channel_map.page_bytes * 5 // 2)])
    assert set(more.pages[-1:]) <= {0, 3}
    assert more.translation.shape.page_xors > 0
    check(channel_map, constants, (more,))


def test_pages_that_have_nothing_in_common_get_a_shadow_table() -> None:
    channel_map = table_map(np.random.default_rng(2))
    constants = np.array([[0, 0, 0], [0, 0, 1], [0, 3, 1], [0, 9, 0]])
    wanted = channel_map.page_bytes * 3 // 4
    (share,) = plan_shares(channel_map, constants, [Demand("t", (0,), wanted)])
    assert share.translation.shape.form is Form.SHADOW
    check(channel_map, constants, (share,))
    with pytest.raises(UnsupportedError, match="arithmetic"):
        plan_shares(channel_map, constants, [Demand("t", (0,), 100)], form=Form.ARITHMETIC)


@pytest.mark.parametrize(
    ("demands", "says"),
    [
        ([Demand("a", (), 1)], "empty set"),
        ([Demand("a", (4,), 1)], "color 4"),
        ([Demand("a", (1, 1), 1)], "twice"),
        ([Demand("a", (0, 1), 1), Demand("b", (1, 2), 1)], "'a' and 'b'"),
        ([Demand("a", (0,), 1), Demand("a", (1,), 1)], "'a'"),
        ([Demand("a", (0,), 0)], "0 bytes"),
    ],
)
def test_color_sets_that_make_no_sense_are_refused(demands: list[Demand], says: str) -> None:
    channel_map = table_map(np.random.default_rng(3))
    with pytest.raises(MisuseError, match=says):
        plan_shares(channel_map, np.zeros((4, 3), np.int64), demands)


def test_a_set_that_is_too_small_says_how_much_is_missing() -> None:
    channel_map = table_map(np.random.default_rng(4))
    wanted = 10 * channel_map.page_bytes
    with pytest.raises(OutOfMemoryError, match="are missing") as caught:
        plan_shares(channel_map, np.zeros((4, 3), np.int64), [Demand("big", (0, 2), wanted)])
    assert caught.value.tenant == "big"
    per_page = len(Palette(channel_map).frames((0, 2), (0, 0, 0)))
    assert caught.value.available == 4 * per_page * channel_map.granule_bytes - 256
    for form in (Form.SHADOW, Form.IN_PAGE):
        with pytest.raises(OutOfMemoryError) as caught:
            plan_shares(channel_map, np.zeros((4, 3), np.int64), [Demand("big", (0, 2), wanted)], form=form)
        demand = Demand("big", (0, 2), caught.value.available or 0)
        (largest,) = plan_shares(channel_map, np.zeros((4, 3), np.int64), [demand], form=form)
        assert largest.nbytes == caught.value.available
        assert largest.translation.shape.form is form


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_halves_are_found_and_shared_by_two_groups_of_tenants(seed: int, same: int) -> None:
    rng = np.random.default_rng(seed)
    channel_map, halves = pair_map(rng, same)
    constants = random_pages(channel_map, 12, rng, lost=1)
    found = find_halves(channel_map)
    assert found is not None
    palette = Palette(channel_map)
    assert (found.bit, found.sets) == (8, halves)
    assert found.residue == pytest.approx(max(residue(palette, half, (0, 0, 0)) for half in halves))
    size = channel_map.page_bytes
    demands = [Demand("a", halves[0], size), Demand("b", halves[0], size // 3), Demand("c", halves[1], 2 * size)]
    shares = plan_shares(channel_map, constants, demands)
    taken: set[tuple[int, int]] = set()
    for share, demand in zip(shares, demands, strict=True):
        assert share.translation.shape.form is Form.PAIR
        assert share.nbytes >= demand.nbytes
        places = places_of(share)
        mine = set(map(tuple, places.tolist()))
        assert len(mine) == len(places)
        assert not mine & taken
        taken |= mine
        foreign = [int(channel_map.color_of(at, constants[page])) not in share.colors for page, at in places]
        assert np.mean(foreign) == pytest.approx(share.residue)
        # Both pieces of a granule are the tenant's: no half of a granule is used by anyone else.
        assert {(page, at ^ 512) for page, at in mine} == mine
    assert not set(shares[0].pages) & set(shares[1].pages)
    assert shares[0].pages[0] == shares[2].pages[0]
    with pytest.raises(UnsupportedError, match="pair form"):
        plan_shares(channel_map, constants, [Demand("t", halves[0][:2], 100)], form=Form.PAIR)
    with pytest.raises(OutOfMemoryError, match="are missing"):
        plan_shares(channel_map, constants, [Demand("t", halves[0], 11 * size // 2)])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["halves", "all", "linear"]))
def test_choices_of_many_pages_are_those_of_each(seed: int, what: str) -> None:
    rng = np.random.default_rng(seed)
    channel_map, sets = (linear_map(rng), ((0, 1), (2, 3))) if what == "linear" else pair_map(rng, 3)
    palette, constants = Palette(channel_map), random_pages(channel_map, 9, rng)
    everything = tuple(range(palette.colors))
    for colors in (everything,) if what == "all" else sets:
        each = np.stack([choices(palette, colors, page) for page in constants])
        assert np.array_equal(choices_of_pages(palette, colors, constants), each)
        assert residues(palette, colors, constants).tolist() == [residue(palette, colors, page) for page in constants]


def test_colors_that_split_too_few_pairs_are_no_halves() -> None:
    rng = np.random.default_rng(8)
    channel_map, halves = pair_map(rng, same=20)
    constants = random_pages(channel_map, 4, rng)
    (share,) = plan_shares(channel_map, constants, [Demand("t", halves[0], 100)])
    assert share.translation.shape.form is not Form.PAIR
    (alone,) = plan_shares(channel_map, constants, [Demand("t", tuple(range(6)), 100)])
    assert alone.translation.shape.form is Form.PAIR
    assert (alone.residue, alone.nbytes) == (0.0, channel_map.page_bytes // 2 - 256)


def test_linear_colors_have_halves_without_a_residue() -> None:
    found = find_halves(linear_map(np.random.default_rng(9)))
    assert found is not None
    assert found.residue == 0.0


def test_the_measured_map_of_an_h200_has_halves() -> None:
    """The map in benchmarks/results: S = {0, 2, 5} and T = {1, 3, 4}, told apart by address bit 8."""
    channel_map = read_map(Path(__file__).parents[2] / "benchmarks" / "results" / "probe-h200" / "map1.json")
    found = find_halves(channel_map)
    assert found is not None
    assert (found.bit, found.sets) == (8, ((0, 2, 5), (1, 3, 4)))
    assert found.residue < 0.03
