"""Translation as arithmetic: one to one onto the tenant's frames, whatever the form, and the guard for everything else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.coloring.division import LIMIT, Divider
from missile.coloring.linear import linear_colors, lowest_form
from missile.coloring.shape import Escape, Field, Form, Shape, TableSpace
from missile.coloring.translation import (
    ArithmeticTranslation,
    InPageTranslation,
    PairTranslation,
    ShadowTranslation,
    StepTranslation,
    Translation,
)
from missile.errors import MisuseError
from missile.probe.layout import PageLayout

HALVES = PageLayout(1 << 16, (*range(8), 9))
PLAIN = PageLayout(1 << 18, tuple(range(12)))
PIECES = PageLayout(1 << 16, tuple(range(8)))
MASKS = (0x29000, 0x32000, 0x14000)  # over address bits; one of bits 12 to 14 in each


def translations(seed: int) -> list[Translation]:
    """One of each form, of random colors, pages and page constants."""
    rng = np.random.default_rng(seed)
    pages = int(rng.integers(1, 9))
    found: list[Translation] = []
    for layout in (HALVES, PLAIN):
        count = int(rng.integers(2, layout.granules + 1))
        places = rng.permutation(layout.granules)[:count]
        found.append(InPageTranslation(Shape(Form.IN_PAGE, layout), places, pages))
        shape = Shape(Form.IN_PAGE, layout, page_xors=True)
        found.append(InPageTranslation(shape, places, pages, rng.integers(0, layout.granules, pages)))
        parts = [rng.permutation(layout.granules)[: int(rng.integers(2, 9))] for _ in range(pages)]
        found.append(ShadowTranslation.from_pages(layout, parts))
    colors = rng.permutation(8)[: int(rng.integers(1, 9))].tolist()
    found.append(ArithmeticTranslation(Shape(Form.ARITHMETIC, PLAIN, masks=3), MASKS, colors, pages))
    shape = Shape(Form.ARITHMETIC, PLAIN, masks=3, page_xors=True)
    found.append(ArithmeticTranslation(shape, MASKS, colors, pages, rng.integers(0, 8, pages)))
    shape = Shape(Form.PAIR, PIECES)
    choices = rng.integers(0, 2, (pages, PIECES.granules // 2))
    found.append(PairTranslation(shape, choices))
    found.append(PairTranslation(Shape(Form.PAIR, PIECES, wide=True), 1 - choices))
    found += steps(seed)
    return found


def steps(seed: int) -> list[StepTranslation]:
    rng = np.random.default_rng(seed)
    choices = rng.integers(0, 2, (int(rng.integers(1, 9)), PIECES.granules // 4))
    alike = PairTranslation(Shape(Form.PAIR, PIECES, alike=True), np.repeat(choices, 2, axis=1))
    apart = PairTranslation(Shape(Form.PAIR, PIECES), np.concatenate([choices, 1 - choices], axis=1))
    wide = PairTranslation(Shape(Form.PAIR, PIECES, wide=True), np.concatenate([choices, choices], axis=1))
    return [StepTranslation.of(pairs) for pairs in (alike, apart, wide)]


def all_bytes_of(translation: Translation, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Physical offsets of the 64-byte words of `frames`."""
    bits = translation.shape.frame_bits
    words = (frames[:, None] << bits) + np.arange(0, 1 << bits, 64)
    return translation.physical(words.reshape(-1))


@given(st.integers(1, LIMIT - 1), st.integers(0, LIMIT - 1))
def test_division_by_multiplication_is_exact(divisor: int, dividend: int) -> None:
    divide = Divider(divisor)
    multiples = dividend // divisor * divisor
    for n in {dividend, multiples, max(multiples - 1, 0), LIMIT - 1, 0}:
        assert divide(np.array([n]))[0] == n // divisor
    assert divide.magic < 1 << 32
    assert divide.shift < 64


@given(st.integers(0, 10_000))
def test_every_form_is_one_to_one_and_keeps_frames_whole(seed: int) -> None:
    for translation in translations(seed):
        layout = translation.shape.layout
        frames = np.arange(translation.frames + 1)
        starts = translation.locate(frames)
        within = starts % layout.page_bytes
        assert (starts >= 0).all()
        assert (starts < translation.pages * layout.page_bytes).all()
        assert (layout.offsets(layout.index_of(within)) == within).all()
        some = frames[:: max(1, len(frames) // 64)]
        touched = all_bytes_of(translation, np.setdiff1d(some, [translation.frames]))
        assert len(np.unique(touched)) == len(touched)
        assert len(np.unique(starts)) == len(starts)


@given(st.integers(0, 10_000))
def test_addresses_outside_go_to_the_guard_frame(seed: int) -> None:
    for translation in translations(seed):
        guard = translation.locate(translation.frames)
        size = translation.shape.layout.granule_bytes
        far = -1 << 35 if translation.shape.wide else -1 << 31
        outside = np.array([translation.logical_bytes, translation.logical_bytes + (1 << 30), -size, far])
        assert (translation.physical(outside) == guard).all()
        own = translation.locate(np.arange(translation.frames))
        assert guard not in own


@given(st.integers(0, 10_000))
def test_a_shadow_table_of_any_translation_translates_as_it_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for translation in translations(seed):
        shadow = ShadowTranslation.of(translation)
        offsets = rng.integers(-translation.logical_bytes, 2 * translation.logical_bytes, 200)
        if isinstance(translation, StepTranslation):  # elsewhere in the guard frame, what is outside
            offsets %= translation.logical_bytes
        assert np.array_equal(shadow.physical(offsets), translation.physical(offsets))
        assert shadow.logical_bytes == translation.logical_bytes


@given(st.integers(0, 10_000))
def test_arithmetic_and_table_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pages = int(rng.integers(1, 9))
    colors = rng.permutation(8)[: int(rng.integers(1, 9))].tolist()
    xors = rng.integers(0, 8, pages)
    shape = Shape(Form.ARITHMETIC, PLAIN, masks=3, page_xors=True)
    arithmetic = ArithmeticTranslation(shape, MASKS, colors, pages, xors)
    table = InPageTranslation(Shape(Form.IN_PAGE, PLAIN, page_xors=True), arithmetic.places(), pages, xors)
    frames = np.arange(arithmetic.frames + 1)
    assert np.array_equal(arithmetic.locate(frames), table.locate(frames))


@given(st.integers(0, 10_000))
def test_tenants_with_disjoint_colors_never_meet(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cut = np.sort(rng.integers(1, 8, 2))
    order = rng.permutation(8).tolist()
    shape = Shape(Form.ARITHMETIC, PLAIN, masks=3)
    parts = [part for part in (order[: cut[0]], order[cut[0] : cut[1]], order[cut[1] :]) if part]
    tenants = [ArithmeticTranslation(shape, MASKS, part, 4) for part in parts]
    owned = [set(t.locate(np.arange(t.frames + t.shape.guards)).tolist()) for t in tenants]
    assert sum(map(len, owned)) == len(set().union(*owned)) == 4 * PLAIN.granules


@given(st.integers(0, 10_000))
def test_two_tenants_of_pairs_have_every_frame_between_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = Shape(Form.PAIR, PIECES)
    choices = rng.integers(0, 2, (int(rng.integers(1, 9)), PIECES.granules // 2))
    one, other = (PairTranslation(shape, taken) for taken in (choices, 1 - choices))
    frames = np.arange(one.frames + one.shape.guards)
    assert (one.locate(frames) ^ other.locate(frames) == 256).all()
    assert len(set(one.locate(frames).tolist()) | set(other.locate(frames).tolist())) == 2 * len(frames)
    assert one.table().nbytes == -(-len(frames) // 32) * 4


@given(st.integers(0, 10_000))
def test_steps_of_pairs_translate_as_they_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    alike, pages = bool(rng.integers(2)), int(rng.integers(1, 9))
    choices = rng.integers(0, 2, (pages, PIECES.granules // 4, 1 if alike else 2))
    taken = np.broadcast_to(choices, (*choices.shape[:2], 2)).reshape(pages, -1)
    pairs = PairTranslation(Shape(Form.PAIR, PIECES, alike=alike, wide=bool(rng.integers(2))), taken)
    same = StepTranslation.of(pairs)
    assert np.array_equal(
        same.physical(np.arange(0, pairs.logical_bytes, 32)), pairs.physical(np.arange(0, pairs.logical_bytes, 32))
    )
    outside = rng.integers(pairs.logical_bytes, 1 << 31, 50)
    guard = pairs.locate(pairs.frames)
    assert (same.physical(outside) & ~255 == guard).all()
    # Tables of 2 bytes for each piece, or for two of them.
    assert same.table().nbytes == (pairs.frames + pairs.shape.guards) * (1 if alike else 2)


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_linear_colors_are_recognised(seed: int, masks: int) -> None:
    rng = np.random.default_rng(seed)
    index = np.arange(256)
    rows = [int(rng.integers(0, 256 >> masks)) << masks | 1 << bit for bit in range(masks)]
    value = sum((np.bitwise_count(index & row) & 1).astype(np.int64) << bit for bit, row in enumerate(rows))
    pattern = rng.permutation(1 << masks)[value]
    found = linear_colors(pattern)
    assert found is not None
    assert found.masks == tuple(rows)
    again = sum((np.bitwise_count(index & m) & 1).astype(np.int64) << bit for bit, m in enumerate(found.masks))
    assert np.array_equal(np.array(found.parities)[pattern], again)


def test_colors_that_are_not_linear_are_not_taken_for_it() -> None:
    assert linear_colors(np.random.default_rng(0).permutation(np.arange(256) % 4)) is None
    assert linear_colors(np.arange(256) % 256) is None  # 8 masks
    assert lowest_form((0b1100, 0b0100)) is None  # no mask has bit 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: InPageTranslation(Shape(Form.IN_PAGE, HALVES), [], 4), "needs memory"),
        (lambda: InPageTranslation(Shape(Form.IN_PAGE, HALVES), [3, 3], 4), "twice"),
        (lambda: InPageTranslation(Shape(Form.IN_PAGE, HALVES), [0, 128], 4), "0 to 127"),
        (lambda: InPageTranslation(Shape(Form.SHADOW, HALVES), [0], 4), "shadow"),
        (lambda: InPageTranslation(Shape(Form.IN_PAGE, HALVES), [0, 1], 2, [0, 5]), "leaves out"),
        (lambda: InPageTranslation(Shape(Form.IN_PAGE, HALVES, page_xors=True), [0, 1], 2, [0, 128]), "0 to 127"),
        (lambda: ArithmeticTranslation(Shape(Form.ARITHMETIC, PLAIN, masks=3), MASKS, [], 4), "at least one"),
        (lambda: ArithmeticTranslation(Shape(Form.ARITHMETIC, PLAIN, masks=3), MASKS, [8], 4), "0 to 7"),
        (lambda: ArithmeticTranslation(Shape(Form.ARITHMETIC, PLAIN, masks=2), (0x3000, 0x2000), [0], 4), "lowest"),
        (lambda: ShadowTranslation(Shape(Form.SHADOW, HALVES), [0, 0], 1), "twice"),
        (lambda: ShadowTranslation(Shape(Form.SHADOW, HALVES), [0, 2], 1), "no start"),
        (lambda: ShadowTranslation(Shape(Form.SHADOW, HALVES), [0, 256], 1), "outside"),
        (lambda: Shape(Form.ARITHMETIC, HALVES, masks=2), "contiguous"),
        (lambda: Shape(Form.ARITHMETIC, PLAIN), "1 to 4 masks"),
        (lambda: Shape(Form.PAIR, HALVES), "contiguous"),
        (lambda: Shape(Form.PAIR, PIECES, page_xors=True), "no constants"),
        (lambda: PairTranslation(Shape(Form.SHADOW, PIECES), [[0] * 128]), "shadow"),
        (lambda: PairTranslation(Shape(Form.PAIR, PIECES), [[0] * 127]), "128 choices"),
        (lambda: PairTranslation(Shape(Form.PAIR, PIECES, alike=True), [[0, 1] * 64]), "choose differently"),
        (lambda: StepTranslation(Shape(Form.PAIR, PIECES), np.zeros(4, np.int64), 1), "pair"),
        (lambda: Shape(Form.SHADOW, PIECES, alike=True), "choose alike"),
        (lambda: PairTranslation(Shape(Form.PAIR, PIECES), [[2] * 128]), "0 or 1"),
        (lambda: Shape(Form.PAIR, PIECES, escape=Escape.COUNT), "wide"),
        (lambda: InPageTranslation(Shape(Form.IN_PAGE, HALVES), [5, 9], 1 << 17), "more than 4 GiB"),
        (lambda: Divider(0), "by 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, says: str) -> None:
    with pytest.raises(MisuseError, match=says):
        make()  # type: ignore[operator]


def test_constants_hold_base_table_and_limits() -> None:
    shape = Shape(Form.IN_PAGE, HALVES, space=TableSpace.GLOBAL, escape=Escape.COUNT, wide=True)
    translation = InPageTranslation(shape, [5, 9, 1], 2)
    with pytest.raises(MisuseError, match="multiple of 4 GiB"):
        InPageTranslation(Shape(Form.IN_PAGE, HALVES), [5, 9, 1], 2).constants(0x1000, table=0x2000)
    with pytest.raises(MisuseError, match="counter"):
        translation.constants(0x1000, table=0x2000)
    with pytest.raises(MisuseError, match="global memory"):
        translation.constants(0x1000, escapes=0x3000)
    constants = translation.constants(0x1000, table=0x2000, escapes=0x3000)
    assert len(constants) == Field.BYTES
    assert int.from_bytes(constants[Field.FRAMES : Field.FRAMES + 4], "little") == 5
    assert int.from_bytes(constants[Field.MINUS_DIVISOR : Field.MINUS_DIVISOR + 4], "little", signed=True) == -3
    # Granule 5 is bits 8 and 11 of the address (index bits are 8, 10, 11, ...), in units of 256 bytes.
    assert translation.table()[:3].tolist() == [0x900 >> 8, 0x1100 >> 8, 0x100 >> 8]
