"""Loops that are written out: which, and what their copies look like. That they touch what the reference says, and nothing
else's memory, is tested with windows."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptx_cases import golden
from test_ptx_windows import COUNT, SHAPES, STAGES, loop, windows_of

from missile.compiler.ptx.access import global_accesses
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.blocks import Blocks
from missile.compiler.ptx.interpret import Thread, run_thread
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.pointers import trace_of
from missile.compiler.ptx.rewrite import Placement, rewrite
from missile.compiler.ptx.unrolling import MOST_STATEMENTS, unrolled
from missile.compiler.ptx.windows import Advance


def written(text: str, form: str = "alike", unroll: int = MOST_STATEMENTS) -> str:
    return rewrite(text, SHAPES[form], placement=Placement.WINDOWS, aligned=(512, 512), unroll=unroll).ptx


@given(
    st.integers(-4096, 4096), st.integers(-4096, 4096), st.integers(0, 6), st.integers(0, 6), st.integers(1, 40)
)  # fmt: skip
def test_how_far_an_access_has_gone_is_the_sum_of_its_steps(
    step: int, jump: int, first: int, period: int, count: int
) -> None:
    steps = [jump if period and i >= first and (i - first) % period == 0 else step for i in range(count)]
    assert Advance(step, jump, first, period).after(count) == sum(steps)


def test_a_copy_for_each_iteration_and_no_jump() -> None:
    text = loop(128, 2048)
    new = written(text)
    assert "bra" not in new
    assert new.count("bar.sync 0;") == COUNT
    # What the original text has behind the loop, and in front of it, stands there once.
    assert new.count("ret;") == new.count("mul.lo.s32 %r4") == 1
    assert "bra again" in written(text, unroll=0)


def test_copies_of_nothing_have_an_address_that_nothing_is_computed_for() -> None:
    copies = written(loop(128, 2048)).split("bar.sync 0;")[1:]
    addresses = [re.findall(r"cp\.async\S+ \[ %r8 \+ 0 \], \[(%\w+)\+(\d+)\]", copy) for copy in copies]
    assert [len(found) for found in addresses] == [1] * COUNT
    assert len({found[0] for found in addresses[-STAGES:]}) == 1
    assert all(re.findall("shf|add.s32 %missile", copy.split("cp.async")[0]) == [] for copy in copies[-STAGES:])


def test_copies_in_one_unit_share_an_address() -> None:
    copies = written(loop(128, 2048)).split("bar.sync 0;")[1 : 1 + COUNT - STAGES]
    found = [re.search(r"\[(%\w+)\+(\d+)\], 0x10", copy) for copy in copies]
    names = [match[1] for match in found if match]
    # Rows begin at multiples of 512 bytes, and the loop two copies of 128 behind that.
    assert [names.index(name) for name in names] == [0, 0, 2, 2, 2, 2, 6, 6, 6, 6]


def test_which_loops_are_written_out() -> None:
    def found(text: str, most: int) -> list[int]:
        module = parse(text)
        function, blocks = module.functions[-1], Blocks(module.functions[-1])
        traced = trace_of(function, blocks, global_accesses(module, function), {})
        return [u.loop.count for u in unrolled(function, blocks, traced.trace.loops, most).values()]

    text = loop(128, 2048)
    size = COUNT * 12
    assert found(text, size) == [COUNT]
    assert found(text, size - 1) == []
    unknown = text.replace(f"setp.ne.s32 %p2, %r10, {COUNT};", "setp.ne.s32 %p2, %r10, %r9;")
    assert found(unknown, 1 << 20) == []
    # What declares something could not stand there twice; in braces it can.
    assert found(text.replace("bar.sync 0;", "bar.sync 0; .reg .b32 %z;"), size) == []
    assert found(text.replace("bar.sync 0;", "{ .reg .b32 %z; bar.sync 0; }"), size) == [COUNT]
    # A loop that touches no memory is the assembler's.
    idle = re.sub(r"(again:.*)cp\.async\.cg[^;]*;", r"\1", text, flags=re.DOTALL)
    assert found(re.sub(r"ld\.global[^;]*;", "", idle), size) == []


def test_loops_in_loops_are_written_out_in_their_place() -> None:
    text = loop(128, 2048).replace("mov.b32 %r10, 0;\n", "mov.b32 %r15, 0;\nouter:\n\tmov.b32 %r10, 0;\n")
    text = text.replace(
        "st.global", "add.s32 %r15, %r15, 1;\n\tsetp.ne.s32 %p3, %r15, 3;\n\t@%p3 bra outer;\n\tst.global"
    )
    arguments = [bytes(8), bytes(8), bytes(4)]
    module = parse(text)
    before = run_thread(module, module.functions[-1], Thread(arguments))
    new = written(text)
    assert new.count("bar.sync 0;") == COUNT
    assert "bra outer" in new
    assert [touch.kind for touch in before][:4] != []
    after = run_thread(parse(new), parse(new).functions[-1], Thread([*arguments, bytes(64)]))
    assert [t.kind for t in after if "load" not in t.kind] == [t.kind for t in before if "load" not in t.kind]


def test_copies_where_a_window_starts_anywhere_take_two_instructions() -> None:
    """Those that are whole units from others; what they have in common is computed for the first of them."""
    text = loop(64, 2064)
    (window,) = windows_of(text, 512)[0]
    assert (window.low, window.unit) == (None, 256)
    copies = written(text).split("bar.sync 0;")[1 : 1 + COUNT - STAGES]
    # Behind two copies in front of the loop, at 0 and 64 bytes.
    turns = [copy.split("cp.async")[0].count("shf") for copy in copies]
    assert turns == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("form", ["alike", "wide-alike"])
def test_golden(form: str) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    text = written(loop(128, 2048), form)
    assert text == golden(f"loop.unrolled-{form}.ptx", text)
    assert assemble(text, arch="sm_90a", name="k")[:4] == b"\x7fELF"
