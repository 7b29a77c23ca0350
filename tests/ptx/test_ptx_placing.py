"""Where translations stand: as early in their block as what they need is there, once for all accesses of a value."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx_cases import INPUTS, SHAPES, source, translation

from missile.coloring.shape import LOGICAL_BASE
from missile.compiler.ptx.blocks import Blocks, Slice
from missile.compiler.ptx.interpret import Thread, run_thread
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.rewrite import Placement, rewrite

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
LOOP = (
    HEAD
    + """.visible .entry k(.param .u64 p, .param .u32 n)
{
	.reg .b64 %rd<9>; .reg .b32 %r<9>; .reg .b16 %rs<4>; .reg .pred %p<3>;
	ld.param.u64 %rd1, [p];
	ld.param.u32 %r1, [n];
	mov.b32 %r7, smem;
again:
	bar.sync 0;
	ld.shared.b32 %r2, [%r7];
	add.s64 %rd2, %rd1, 64;
	and.b32 %r3, %r2, 4080;
	{ .reg .b16 low; mov.b32 {low, %rs1}, %r3; }
	cvt.u64.u32 %rd3, %r3;
	add.s64 %rd4, %rd1, %rd3;
	bar.sync 0;
	ld.global.b32 %r4, [%rd2];
	ld.global.b32 %r5, [%rd4];
	ld.global.b32 %r5, [%rd4+16];
	add.s64 %rd1, %rd1, 1024;
	st.global.b32 [%rd1], %r4;
	st.global.b32 [%rd1+0], %r5;
	add.s32 %r1, %r1, -1;
	setp.ne.s32 %p1, %r1, 0;
	@%p1 bra again;
	ret;
}
"""
)


def unit_of(blocks: Blocks, text: str, piece: str) -> int:
    return blocks.index_at(text.index(piece))


def test_a_value_is_computed_from_what_its_block_has() -> None:
    blocks = Blocks(parse(LOOP).functions[0])
    bar, shared = unit_of(blocks, LOOP, "bar.sync"), unit_of(blocks, LOOP, "ld.shared")
    block = blocks.units[bar].block
    assert blocks.first_of(block) == bar
    plain, gathered = (
        unit_of(blocks, LOOP, f"ld.global.b32 {r}, [{a}]") for r, a in (("%r4", "%rd2"), ("%r5", "%rd4"))
    )
    # Needs nothing but what comes from before the loop: the start of the body.
    assert blocks.slice("%rd2", plain, block) == Slice((unit_of(blocks, LOOP, "add.s64 %rd2"),), bar, block)
    # Needs a load from shared memory: behind that.
    found = blocks.slice("%rd4", gathered, block)
    wanted = tuple(unit_of(blocks, LOOP, piece) for piece in ("and.b32 %r3", "cvt.u64", "add.s64 %rd4"))
    assert found == Slice(wanted, shared + 1, block)
    assert blocks.definition("%rd1", gathered, block) is None
    scope = unit_of(blocks, LOOP, "{ .reg .b16 low")
    assert blocks.units[scope].writes == {"%rs1"}
    assert blocks.units[scope].repeatable


def test_what_was_written_over_meanwhile_is_not_computed_from() -> None:
    text = LOOP.replace("and.b32 %r3, %r2, 4080;", "add.s64 %rd5, %rd1, %rd3;\n\tand.b32 %r3, %r2, 4080;").replace(
        "ld.global.b32 %r5, [%rd4+16];",
        "add.s64 %rd6, %rd5, %rd4; ld.shared.b64 %rd1, [%r7]; ld.global.b32 %r5, [%rd6];",
    )
    blocks = Blocks(parse(text).functions[0])
    place = unit_of(blocks, text, "ld.global.b32 %r5, [%rd6]")
    # %rd5 wants the old %rd3 and %rd4 the new one: both are there behind the load from shared memory.
    assert blocks.slice("%rd6", place, blocks.units[place].block) is not None
    late = text.replace("add.s64 %rd6, %rd5, %rd4; ld.shared.b64 %rd1", "ld.shared.b64 %rd1").replace(
        "ld.global.b32 %r5, [%rd6]", "ld.shared.b64 %rd7, [%r7]; add.s64 %rd6, %rd2, %rd7; ld.global.b32 %r5, [%rd6]"
    )
    blocks = Blocks(parse(late).functions[0])
    place = unit_of(blocks, late, "ld.global.b32 %r5, [%rd6]")
    # %rd2 is computed from a %rd1 that is gone when the load has brought %rd7.
    assert blocks.slice("%rd6", place, blocks.units[place].block) is None


@pytest.mark.parametrize("form", ["pair", "pair-wide", "step-alike", "step-wide", "in-page-shared", "shadow"])
@pytest.mark.parametrize(
    "text", [LOOP, LOOP.replace("add.s64 %rd2, %rd1, 64;", "ld.shared.b64 %rd1, [%r7]; add.s64 %rd2, %rd1, 64;")]
)
def test_every_placement_touches_the_same(form: str, text: str) -> None:
    shape = SHAPES[form]
    bound = translation(shape, np.random.default_rng(11))
    constants = bound.constants(1 << 40, table=1 << 41)
    arguments = [(LOGICAL_BASE + 4096).to_bytes(8, "little"), (5).to_bytes(4, "little")]
    original = run_thread(
        parse(text), parse(text).functions[0], Thread(arguments, data=lambda n: n * 912_559 % (1 << 22))
    )
    wanted = (1 << 40) + bound.physical(np.array([t.address - LOGICAL_BASE for t in original], np.int64))
    for placement in Placement:
        module = parse(rewrite(text, shape, placement=placement).ptx)
        thread = Thread(
            [*arguments, constants], table=bound.table().tobytes(), table_address=1 << 41,
            data=lambda n: n * 912_559 % (1 << 22),
        )  # fmt: skip
        made = run_thread(module, module.functions[0], thread)
        assert [t.address for t in made] == wanted.tolist()
        assert [t.kind for t in made] == [t.kind for t in original]


def test_lookups_stand_at_the_start_of_a_loops_body() -> None:
    early = rewrite(LOOP, SHAPES["pair"], placement=Placement.EARLY)
    assert early.translations == 4  # two accesses of the moved %rd1 find one value
    body = early.ptx[early.ptx.index("again:") :]
    lookups = [m.start() for m in re.finditer(r"ld\.global\.L1::evict_last", body)]
    assert lookups[0] < body.index("bar.sync")
    assert all(place < body.rindex("bar.sync") for place in lookups[1:3])
    late = rewrite(LOOP, SHAPES["pair"], placement=Placement.DEFINITION)
    assert late.translations == 4
    assert late.ptx.index("bar.sync") < late.ptx.index("ld.global.L1::evict_last")


@pytest.mark.parametrize("name", [name for name in INPUTS if name.startswith(("matmul", "convolution"))])
def test_no_lookup_is_left_between_copies(name: str) -> None:
    """In the body of a pipelined loop all lookups come before the barriers that the copies come behind."""
    text = rewrite(source(name), SHAPES["pair"], name=name, placement=Placement.EARLY).ptx
    body = text[text.index("Loop Header") :]
    body = body[: body.index("bra \t")]
    assert body.rindex("evict_last") < body.index("wgmma")
    assert body.index("wgmma") < body.index("cp.async.cg")


def test_what_was_looked_up_is_kept_while_it_is_the_same() -> None:
    """Five iterations 1 KiB apart lie in two words of the pair form's table: looked up again only where one is another."""
    bound = translation(SHAPES["pair"], np.random.default_rng(3))
    text = LOOP.replace("add.s64 %rd4, %rd1, %rd3", "add.s64 %rd4, %rd1, 32")
    constants = bound.constants(1 << 40, table=1 << 41)
    arguments = [(LOGICAL_BASE + 4096).to_bytes(8, "little"), (5).to_bytes(4, "little"), constants]
    table = bound.table().tobytes()
    counts = {}
    for placement in (Placement.EARLY, Placement.KEPT):
        module = parse(rewrite(text, SHAPES["pair"], placement=placement).ptx)
        # A table that is not known to be one: then its lookups are seen among the accesses.
        seen = run_thread(module, module.functions[0], Thread(arguments, data=lambda n: table[n % 8]))
        counts[placement] = sum(touch.address >> 40 == 2 for touch in seen)
    assert counts[Placement.EARLY] == 5 * 4
    # At first, when the store comes to the second word, and when the loads do: all four each time.
    assert counts[Placement.KEPT] == 3 * 4
