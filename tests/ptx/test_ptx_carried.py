"""Bits that launches carry: kernels translate with them as the reference does, and nothing leaves the tenant's memory."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_cases import INPUTS, parameters, source
from test_ptx_windows import BASE, COUNT, FULL, NARROW, SHAPES, TABLE, are_own, convolution, loop, pairs, run

from missile.coloring.carried import GRANULE, MOST_BYTES, Carried, Range, plan_carried, range_of
from missile.coloring.shape import LOGICAL_BASE, Field, Form, Shape
from missile.coloring.translation import PairTranslation
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.interpret import Thread, Touch, run_thread
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.rewrite import Placement, rewrite
from missile.compiler.ptx.unrolling import MOST_STATEMENTS
from missile.errors import InternalError

LOOKUP = "evict_last"  # in the table


def carrying(
    text: str, shape: Shape, carried: Carried | None, aligned: tuple[int, ...], unroll: int = MOST_STATEMENTS
) -> str:
    return rewrite(text, shape, placement=Placement.CARRIED, aligned=aligned, carried=carried, unroll=unroll).ptx


def run_carried(
    text: str, arguments: list[bytes], bound: PairTranslation, carried: Carried, ranges: list[Range], like: Thread
) -> tuple[Touch, ...]:
    constants = carried.constants(bound.constants(BASE, table=TABLE), bound, BASE, ranges)
    module = parse(text)
    like = replace(like, table=bound.table().tobytes(), table_address=TABLE, parameters=[*arguments, constants])
    return run_thread(module, module.functions[-1], like)


def check(text: str, shape: Shape, rng: np.random.Generator, aligned: int, scalars: int) -> None:
    """One thread of a kernel with two pointers, into buffers of 1 MiB that lie anywhere."""
    bound = pairs(shape, rng)
    size = 1 << 20
    carried = plan_carried(shape, (size + GRANULE,) * 2)
    assert carried is not None
    new = carrying(text, shape, carried, (aligned, aligned))
    places = rng.integers(shape.head_bytes, bound.logical_bytes - size - GRANULE, 2) // aligned * aligned
    pointers = [LOGICAL_BASE + int(place) for place in places]
    ranges = [range_of(pointer, pointer + size) for pointer in pointers]
    arguments = [*(pointer.to_bytes(8, "little") for pointer in pointers), *[bytes(4)] * scalars]
    thread = Thread([], thread=(int(rng.integers(64)), 0, 0))
    before = run(text, arguments, None, thread)
    after = run_carried(new, arguments, bound, carried, ranges, thread)
    logical = np.array([t.address - LOGICAL_BASE for t in before], np.int64)
    wanted = BASE + bound.physical(logical)
    assert [(t.kind, t.made) for t in before] == [(t.kind, t.made) for t in after]
    reached = [any(p <= t.address < p + size for p in pointers) for t in before]
    made = [(t.address, int(w)) for t, w, inside in zip(after, wanted, reached, strict=True) if t.made and inside]
    assert made
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
def test_carried_bits_translate_as_the_reference(form: str, step: int, pitch: int, aligned: int, seed: int) -> None:
    check(loop(step, pitch), SHAPES[form], np.random.default_rng(seed), aligned, 1)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)), st.sampled_from((NARROW, FULL)), st.sampled_from((24, 32, 128, 256)),
    st.sampled_from((16, 512)), st.integers(0, 10_000),
)  # fmt: skip
def test_windows_that_begin_before_their_buffer(form: str, address: str, column: int, aligned: int, seed: int) -> None:
    """Convolutions count from the pixel that is above and beside the first one."""
    rng = np.random.default_rng(seed)
    for _ in range(3):
        check(convolution(address, column), SHAPES[form], rng, aligned, 0)


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
    """Pointers to anywhere, aligned worse than was said, in a loop that runs longer than was found."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[form]
    bound = pairs(shape, rng)
    carried = plan_carried(shape, (1 << 20, 1 << 16))
    assert carried is not None
    new = carrying(loop(step, 2048), shape, carried, (512, 512), unroll=0)
    new = new.replace(f"setp.ne.s32 %p2, %r10, {COUNT};", "setp.ne.s32 %p2, %r10, 200;")
    # Buffers at either end of the tenant's memory, and some longer or shorter than the longest.
    first, last = LOGICAL_BASE + shape.head_bytes, LOGICAL_BASE + bound.logical_bytes // GRANULE * GRANULE
    ranges = [Range(first, GRANULE * int(rng.integers(2048))), Range(last - (1 << 16), 1 << 16)]
    near = rng.integers(-20_000, 20_000, 2) + rng.choice([0, bound.logical_bytes], 2)
    for places in (pointers, [LOGICAL_BASE + int(place) for place in near]):
        arguments = [(place & (1 << 64) - 16).to_bytes(8, "little") for place in places]
        thread = Thread([], thread=(int(rng.integers(64)), 0, 0))
        after = run_carried(new, [*arguments, bytes(4)], bound, carried, ranges, thread)
        assert len(after) > 200
        assert are_own(bound, after)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("name", [name for name in INPUTS if name != "convolution"])
def test_kernels_touch_what_the_reference_says(name: str, form: str) -> None:
    rng = np.random.default_rng(len(name))
    pointers, _, threads, blocks = INPUTS[name]
    first, apart = LOGICAL_BASE + (1 << 16), 5 << 20
    carried = plan_carried(SHAPES[form], (apart,) * pointers)
    assert carried is not None
    new = carrying(source(name), SHAPES[form], carried, (512,) * pointers)
    bound = pairs(SHAPES[form], rng, 40)
    thread = Thread(
        [],
        thread=(int(rng.integers(threads)), 0, 0),
        block=(int(rng.integers(min(blocks, 64))), 0, 0),
        threads=(threads, 1, 1),
        data=lambda n: n * 7919 % 1000,
    )
    arguments = parameters(name, first, apart)
    ranges = [Range(first + index * apart, apart) for index in range(pointers)]
    before = run(source(name), arguments, None, thread)
    after = run_carried(new, arguments, bound, carried, ranges, thread)
    wanted = BASE + bound.physical(np.array([t.address - LOGICAL_BASE for t in before], np.int64))
    assert [t.address for t in after if t.made] == [int(w) for t, w in zip(before, wanted, strict=True) if t.made]
    assert are_own(bound, after)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("name", INPUTS)
def test_kernels_assemble(name: str, form: str) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    carried = plan_carried(SHAPES[form], (1 << 20,) * INPUTS[name][0])
    text = carrying(source(name), SHAPES[form], carried, (512,) * 3)
    assert assemble(text, arch="sm_90a", name=name)[:4] == b"\x7fELF"


def test_kernels_without_loops_look_nothing_up_in_memory() -> None:
    shape = SHAPES["alike"]
    text = source("add_relu")
    assert LOOKUP in rewrite(text, shape, placement=Placement.WINDOWS, aligned=(512,) * 3).ptx
    carried = plan_carried(shape, (1 << 20,) * 3)
    assert carried is not None
    new = carrying(text, shape, carried, (512,) * 3)
    assert LOOKUP not in new
    assert f"missile_color[{carried.nbytes}]" in new
    # The address itself is computed no more: what is added to the pointer is enough, where that is the range's start.
    assert not re.search(r"cvt\.u32\.u64 %missile_w\d+, %rd", new)
    assert "sub.s32 %missile_w" in carrying(text, shape, carried, (16,) * 3)


def test_what_nobody_carries_is_looked_up_in_memory() -> None:
    shape = SHAPES["alike"]
    usual = rewrite(source("add_relu"), shape, placement=Placement.WINDOWS, aligned=(512,) * 3).ptx
    assert carrying(source("add_relu"), shape, None, (512,) * 3) == usual
    only = plan_carried(shape, (1 << 20, 0, 0))
    assert only is not None
    assert carrying(source("add_relu"), shape, only, (512,) * 3).count(LOOKUP) == usual.count(LOOKUP) - 1


def test_the_longest_ranges_are_left_out_where_not_all_fit() -> None:
    alike = SHAPES["alike"]
    small = plan_carried(alike, (1 << 20, 0, 4096))
    assert small is not None
    assert [(s.argument, [unit for unit, _ in s.words]) for s in small.slots] == [(0, [256, 512]), (2, [256, 512])]
    large = plan_carried(alike, (32 << 20, 0, 4096))
    assert large is not None
    assert [(s.argument, [unit for unit, _ in s.words]) for s in large.slots] == [(0, [512]), (2, [512])]
    assert large.nbytes <= MOST_BYTES
    (kept,) = plan_carried(alike, (1 << 30, 0, 4096)).slots  # type: ignore[union-attr]
    assert kept.argument == 2
    assert plan_carried(alike, (1 << 30, 0)) is None
    assert plan_carried(alike, ()) is None
    assert plan_carried(replace(alike, form=Form.STEP), (4096,)) is None
    ends = [slot.header for slot in small.slots]
    assert ends[0] == Field.BYTES
    assert all(at >= ends[-1] + 16 for slot in small.slots for _, at in slot.words)


def test_a_range_of_other_memory_is_an_error_of_ours() -> None:
    shape = SHAPES["alike"]
    bound = pairs(shape, np.random.default_rng(0))
    carried = plan_carried(shape, (4096,))
    assert carried is not None
    own = bound.constants(BASE, table=TABLE)
    for start in (0, shape.head_bytes - GRANULE, bound.logical_bytes // GRANULE * GRANULE - 4096 + GRANULE):
        with pytest.raises(InternalError, match="not its tenant's"):
            carried.constants(own, bound, BASE, [Range(LOGICAL_BASE + start, 4096)])


def test_ranges_are_cut_where_buffers_are() -> None:
    assert range_of(LOGICAL_BASE + 1040, LOGICAL_BASE + 5000) == Range(LOGICAL_BASE + 1024, 4096)
    assert range_of(LOGICAL_BASE + 1024, LOGICAL_BASE + 2048) == Range(LOGICAL_BASE + 1024, 1024)
