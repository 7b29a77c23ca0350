"""Windows: what they find, that they translate as the reference does, and that nothing leaves the tenant's memory."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_cases import INPUTS, PIECE, golden, parameters, source

from missile.coloring.shape import LOGICAL_BASE, Form, Shape
from missile.coloring.translation import PairTranslation
from missile.compiler.ptx.access import global_accesses
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.blocks import Blocks
from missile.compiler.ptx.interpret import Thread, Touch, run_thread
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.rewrite import Placement, rewrite
from missile.compiler.ptx.unrolling import MOST_STATEMENTS
from missile.compiler.ptx.windows import Advance, Window, find_windows

BASE, TABLE = 3 << 40, 1 << 44
SHAPES = {
    "pair": Shape(Form.PAIR, PIECE),
    "alike": Shape(Form.PAIR, PIECE, alike=True),
    "wide": Shape(Form.PAIR, PIECE, wide=True),
    "wide-alike": Shape(Form.PAIR, PIECE, wide=True, alike=True),
}
COUNT, STAGES = 12, 2
EARLY = {"placement": Placement.EARLY}
# A product's rows: pieces of 128 bytes of them, two iterations ahead; the last copies are of nothing.
LOOP = f""".version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 p, .param .u64 q, .param .u32 pitch)
{{
	.reg .b64 %rd<20>; .reg .b32 %r<20>; .reg .pred %p<4>;
	ld.param.u64 %rd1, [p];
	ld.param.u64 %rd2, [q];
	ld.param.u32 %r9, [pitch];
	mov.u32 %r1, %tid.x;
	mov.b32 %r8, smem;
	shr.u32 %r2, %r1, 3;
	and.b32 %r3, %r1, 7;
	mul.lo.s32 %r4, %r2, PITCH;
	shl.b32 %r5, %r3, 4;
	or.b32 %r6, %r4, %r5;
	cvt.u64.u32 %rd3, %r6;
	add.s64 %rd4, %rd1, %rd3;
	mov.b32 %r7, 16;
	cp.async.cg.shared.global [ %r8 + 0 ], [ %rd4 + 0 ], 0x10, %r7;
	add.s64 %rd5, %rd4, STEP;
	cp.async.cg.shared.global [ %r8 + 0 ], [ %rd5 + 0 ], 0x10, %r7;
	mul.wide.u32 %rd6, %r1, 64;
	add.s64 %rd7, %rd2, %rd6;
	add.s64 %rd8, %rd4, TWICE;
	mov.b32 %r10, 0;
	mov.b64 %rd9, 0;
again:
	bar.sync 0;
	setp.lt.s32 %p1, %r10, {COUNT - STAGES};
	selp.b32 %r11, 16, 0, %p1;
	add.s64 %rd10, %rd8, %rd9;
	cp.async.cg.shared.global [ %r8 + 0 ], [ %rd10 + 0 ], 0x10, %r11;
	ld.global.b32 %r12, [%rd7];
	ld.global.b32 %r13, [%rd7+4];
	add.s64 %rd7, %rd7, 4096;
	add.s64 %rd9, %rd9, STEP;
	add.s32 %r10, %r10, 1;
	setp.ne.s32 %p2, %r10, {COUNT};
	@%p2 bra again;
	st.global.b32 [%rd4], %r12;
	ret;
}}
"""


# A convolution of 3 by 3 over 8 by 8 pixels: above, below and beside the image it copies nothing.
CONVOLUTION = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 p, .param .u64 q)
{
	.reg .b64 %rd<20>; .reg .b32 %r<20>; .reg .b16 %rs<20>; .reg .pred %p<8>;
	ld.param.u64 %rd1, [p];
	mov.u32 %r1, %tid.x;
	mov.b32 %r8, smem;
	shr.u32 %r2, %r1, 3;
	and.b32 %r3, %r1, 7;
	add.s32 %r4, %r2, -1;
	add.s32 %r5, %r3, -1;
	prmt.b32 %r6, %r4, %r5, 0x5410U;
	mov.b32 %r10, 0;
again:
	cvt.u16.u32 %rs1, %r10;
	mul.lo.s16 %rs2, %rs1, 171;
	shr.u16 %rs3, %rs2, 9;
	mul.lo.s16 %rs4, %rs3, 3;
	sub.s16 %rs5, %rs1, %rs4;
	ADDRESS
	mad.wide.s32 %rd2, %r12, 2, %rd1;
	selp.b32 %r13, 16, 0, %p1;
	selp.b32 %r14, %r13, 0, %p2;
	cp.async.cg.shared.global [ %r8 + 0 ], [ %rd2 + 0 ], 0x10, %r14;
	add.s32 %r10, %r10, 1;
	setp.ne.s32 %p3, %r10, 9;
	@%p3 bra again;
	ret;
}
"""
NARROW = """mov.b32 %r11, {%rs3, %rs5};
	add.s16x2 %r11, %r11, %r6;
	mov.b32 {%rs6, %rs7}, %r11;
	mul.wide.s16 %r12, %rs7, COLUMN;
	mad.wide.s16 %r12, %rs6, ROW, %r12;
	max.u16 %rs8, %rs6, %rs7;
	setp.lt.u16 %p1, %rs8, 8;
	mov.pred %p2, %p1;"""
FULL = """cvt.u32.u16 %r15, %rs3;
	cvt.u32.u16 %r16, %rs5;
	add.s32 %r15, %r15, %r4;
	add.s32 %r16, %r16, %r5;
	mul.lo.s32 %r12, %r16, COLUMN;
	mad.lo.s32 %r12, %r15, ROW, %r12;
	setp.lt.u32 %p1, %r15, 8;
	setp.lt.u32 %p2, %r16, 8;"""


def convolution(address: str, column: int) -> str:
    """column: values of 2 bytes from one pixel to the next."""
    return CONVOLUTION.replace("ADDRESS", address).replace("COLUMN", str(column)).replace("ROW", str(8 * column))


def loop(step: int, pitch: int) -> str:
    return LOOP.replace("TWICE", str(2 * step)).replace("STEP", str(step)).replace("PITCH", str(pitch))


def windows_of(text: str, aligned: int, units: tuple[int, ...] = (256, 512)) -> tuple[list[Window], int]:
    module = parse(text)
    function = module.functions[-1]
    accesses = global_accesses(module, function)
    names = {p.name: aligned for p in function.parameters}
    windows, never = find_windows(function, Blocks(function), accesses, names, units)
    return windows, len(never)


def pairs(shape: Shape, rng: np.random.Generator, pages: int = 6) -> PairTranslation:
    taken = rng.integers(0, 2, (pages, PIECE.granules // 4, 2))
    if shape.alike:
        taken[..., 1] = taken[..., 0]
    return PairTranslation(shape, taken.reshape(pages, -1))


def run(text: str, arguments: list[bytes], bound: PairTranslation | None, like: Thread) -> tuple[Touch, ...]:
    module = parse(text)
    if bound is not None:
        constants = bound.constants(BASE, table=TABLE)
        like = replace(like, table=bound.table().tobytes(), table_address=TABLE)
        arguments = [*arguments, constants]
    return run_thread(module, module.functions[-1], replace(like, parameters=arguments))


def are_own(bound: PairTranslation, touched: tuple[Touch, ...]) -> bool:
    frames = np.array([touch.address - BASE for touch in touched]) >> 8
    whole = np.arange(bound.frames + bound.shape.guards)
    return bool(np.isin(frames << 8, bound.locate(whole)).all())


def test_an_address_that_advances_evenly_has_a_window_with_those_before_the_loop() -> None:
    windows, never = windows_of(loop(128, 2048), 512)
    assert never == 0
    (window,) = windows
    # Rows start at multiples of 512 bytes and columns are 16 bytes apart: the same unit for all threads.
    assert (window.unit, window.low, window.block, window.offset) == (512, 0x70, None, 0)
    # A unit of 512 bytes, of which rows may begin in the middle, is not.
    assert [(w.unit, w.low) for w in windows_of(loop(128, 2048), 256)[0]] == [(256, 0x70)]
    assert [(m.start, m.advance.step, m.block is None) for m in window.members] == [
        (0, 0, True), (128, 0, True), (256, 128, False), (0, 0, True),
    ]  # fmt: skip
    assert window.last == 128 * (COUNT - 1)  # copies of nothing do not count
    # Rows of 2064 bytes begin anywhere in a piece, and so do those of a matrix that does.
    assert [w.low for w in windows_of(loop(128, 2064), 512)[0]] == [None]
    assert [w.low for w in windows_of(loop(128, 2048), 16)[0]] == [None]


def test_a_window_is_as_long_as_its_bits_reach() -> None:
    assert [w.unit for w in windows_of(loop(512, 8192), 512, (256,))[0]] == [256]
    assert [w.unit for w in windows_of(loop(1024, 16384), 512)[0]] == [512]
    # Too far for the loop: those before it share one.
    assert [len(w.members) for w in windows_of(loop(1024, 16384), 512, (256,))[0]] == [3]
    assert windows_of(loop(1 << 20, 16384), 512)[0][0].last == 0


def test_loops_of_unknown_length_are_left_alone() -> None:
    text = loop(128, 2048).replace(f"setp.ne.s32 %p2, %r10, {COUNT};", "setp.ne.s32 %p2, %r10, %r9;")
    assert all(m.block is None for w in windows_of(text, 512)[0] for m in w.members)


def test_copies_of_nothing_are_known() -> None:
    text = loop(128, 2048).replace(f"setp.lt.s32 %p1, %r10, {COUNT - STAGES};", "setp.lt.s32 %p1, %r10, 0;")
    assert windows_of(text, 512)[1] == 1


def test_a_window_may_begin_in_front_of_its_loop() -> None:
    """An address that nothing before the loop has."""
    text = (
        loop(128, 2048)
        .replace("mul.wide.u32 %rd6, %r1, 64;", "mul.wide.u32 %rd6, %r1, 4096;")
        .replace("add.s64 %rd7, %rd7, 4096;", "add.s64 %rd7, %rd7, 256;")
    )
    (other,) = (w for w in windows_of(text, 512)[0] if w.block is not None)
    assert [(m.start, m.advance.step) for m in other.members] == [(0, 256), (4, 256)]
    check_loop(text, SHAPES["alike"], np.random.default_rng(1), 512)


@pytest.mark.parametrize("address", [NARROW, FULL])
def test_conditions_say_that_an_address_does_not_wrap(address: str) -> None:
    (window,) = windows_of(convolution(address, 128), 512)[0]
    (member,) = window.members
    # Behind the third tap and every three from there the next row begins.
    assert member.advance == Advance(256, 8 * 256 - 2 * 256, 2, 3)
    assert (window.block, window.last) == (member.block, 2 * 8 * 256 + 2 * 256)
    # Other conditions say nothing.
    assert not windows_of(convolution(address, 128).replace("setp.lt.u", "setp.ne.u"), 512)[0]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)), st.sampled_from((NARROW, FULL)), st.sampled_from((24, 32, 128, 256)),
    st.sampled_from((16, 512)), st.integers(0, 10_000),
)  # fmt: skip
def test_windows_of_convolutions_translate_as_the_reference(
    form: str, address: str, column: int, aligned: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(3):
        check_loop(convolution(address, column), SHAPES[form], rng, aligned, scalars=0)


def check_loop(text: str, shape: Shape, rng: np.random.Generator, aligned: int, scalars: int = 1) -> None:
    """As a loop and written out."""
    for unroll in (0, MOST_STATEMENTS):
        check_code(text, shape, rng, aligned, scalars, unroll)


def check_code(text: str, shape: Shape, rng: np.random.Generator, aligned: int, scalars: int, unroll: int) -> None:
    bound = pairs(shape, rng)
    end = bound.logical_bytes
    new = rewrite(text, shape, placement=Placement.WINDOWS, aligned=(aligned, aligned), unroll=unroll).ptx
    places = rng.integers(shape.head_bytes, end - (1 << 20), 2) // aligned * aligned
    arguments = [*(int(LOGICAL_BASE + place).to_bytes(8, "little") for place in places), *[bytes(4)] * scalars]
    thread = Thread([], thread=(int(rng.integers(64)), 0, 0))
    before, after = run(text, arguments, None, thread), run(new, arguments, bound, thread)
    wanted = BASE + bound.physical(np.array([t.address - LOGICAL_BASE for t in before], np.int64))
    assert [(t.kind, t.made) for t in before] == [(t.kind, t.made) for t in after]
    made = [(t.address, int(where)) for b, t, where in zip(before, after, wanted, strict=True) if b.made]
    assert [address for address, _ in made] == [where for _, where in made]
    assert are_own(bound, after)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from((16, 48, 64, 128, 192, 256, 384, 512, 640, 1024, 1040, 4096)),
    st.sampled_from((1024, 2048, 2064, 2304, 8192)),
    st.sampled_from((16, 256, 512)),
    st.integers(0, 10_000),
)
def test_windows_translate_as_the_reference(form: str, step: int, pitch: int, aligned: int, seed: int) -> None:
    check_loop(loop(step, pitch), SHAPES[form], np.random.default_rng(seed), aligned)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from((64, 128, 512, 1024)),
    st.lists(st.integers(0, (1 << 64) - 1), min_size=2, max_size=2),
    st.integers(0, 10_000),
)
def test_whatever_is_computed_it_lands_in_the_tenants_memory(
    form: str, step: int, pointers: list[int], seed: int
) -> None:
    """Pointers to anywhere, aligned worse than was said, in a loop that runs longer than was found, or is written out."""
    rng = np.random.default_rng(seed)
    bound = pairs(SHAPES[form], rng)
    unroll = int(rng.choice([0, MOST_STATEMENTS]))
    new = rewrite(
        loop(step, 2048 + 16 * int(rng.integers(2))),
        SHAPES[form],
        placement=Placement.WINDOWS,
        aligned=(512, 512),
        unroll=unroll,
    ).ptx
    new = new.replace(f"setp.ne.s32 %p2, %r10, {COUNT};", "setp.ne.s32 %p2, %r10, 200;")
    near = rng.integers(-20_000, 20_000, 2) + rng.choice([0, bound.logical_bytes], 2)
    for places in (pointers, [LOGICAL_BASE + int(place) for place in near]):
        # What lies at multiples of 16 only: an access that is not aligned to its size faults.
        arguments = [(place & (1 << 64) - 16).to_bytes(8, "little") for place in places]
        after = run(new, [*arguments, bytes(4)], bound, Thread([], thread=(int(rng.integers(64)), 0, 0)))
        assert len(after) > (3 * COUNT if unroll else 200)
        assert are_own(bound, after)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("name", [name for name in INPUTS if name != "convolution"])
def test_kernels_with_windows_touch_what_the_reference_says(name: str, form: str) -> None:
    rng = np.random.default_rng(len(name))
    pointers, _, threads, blocks = INPUTS[name]
    new = rewrite(source(name), SHAPES[form], name=name, placement=Placement.WINDOWS, aligned=(512,) * pointers).ptx
    bound = pairs(SHAPES[form], rng, 40)
    thread = Thread(
        [],
        thread=(int(rng.integers(threads)), 0, 0),
        block=(int(rng.integers(min(blocks, 64))), 0, 0),
        threads=(threads, 1, 1),
        data=lambda n: n * 7919 % 1000,
    )
    arguments = parameters(name, LOGICAL_BASE + (1 << 16), 5 << 20)
    before, after = run(source(name), arguments, None, thread), run(new, arguments, bound, thread)
    wanted = BASE + bound.physical(np.array([t.address - LOGICAL_BASE for t in before], np.int64))
    assert [t.address for t in after if t.made] == [int(w) for t, w in zip(before, wanted, strict=True) if t.made]
    assert are_own(bound, after)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("name", INPUTS)
def test_kernels_with_windows_assemble(name: str, form: str) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    text = rewrite(source(name), SHAPES[form], name=name, placement=Placement.WINDOWS, aligned=(512,) * 3).ptx
    assert assemble(text, arch="sm_90a", name=name)[:4] == b"\x7fELF"


def test_a_loop_with_a_window_looks_nothing_up() -> None:
    text = source("matmul_64x64x32")
    # As a kernel whose inner dimension is known when it is compiled.
    assert "evict_last" in rewrite(text, SHAPES["alike"], placement=Placement.EARLY).ptx
    new = rewrite(loop(128, 2048), SHAPES["alike"], placement=Placement.WINDOWS, aligned=(512, 512), unroll=0).ptx
    body = new[new.index("again:") : new.index("bra again")]
    assert len(re.findall("evict_last", body)) == 2  # of the address that goes too far in each iteration


@pytest.mark.parametrize("form", SHAPES)
def test_windows_are_the_usual_code(form: str) -> None:
    usual, early = (rewrite(loop(128, 2048), SHAPES[form], aligned=(512, 512), **how).ptx for how in ({}, EARLY))
    assert usual == rewrite(loop(128, 2048), SHAPES[form], placement=Placement.WINDOWS, aligned=(512, 512)).ptx
    assert usual != early


@pytest.mark.parametrize(
    "shape",
    [
        Shape(Form.STEP, PIECE, alike=True),
        Shape(Form.SHADOW, PIECE),
        Shape(Form.PAIR, replace(PIECE, inner_bits=tuple(range(9)))),
    ],
    ids=["steps", "shadow", "pairs of 512 bytes"],
)
def test_forms_without_windows_are_translated_early(shape: Shape) -> None:
    texts = {rewrite(loop(128, 2048), shape, aligned=(512, 512), **how).ptx for how in ({}, EARLY)}
    assert len(texts) == 1


@pytest.mark.parametrize("name", ["softmax", "matmul_64x64x32"])
def test_golden_of_kernels(name: str) -> None:
    text = rewrite(source(name), SHAPES["alike"], name=name, aligned=(512,) * 3).ptx
    assert text == golden(f"{name}.pair-alike.ptx", text)


@pytest.mark.parametrize("form", ["alike", "wide-alike"])
def test_golden(form: str) -> None:
    text = rewrite(loop(128, 2048), SHAPES[form], placement=Placement.WINDOWS, aligned=(512, 512), unroll=0).ptx
    assert text == golden(f"loop.windows-{form}.ptx", text)
