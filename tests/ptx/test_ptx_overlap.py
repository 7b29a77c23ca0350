"""Kernels that wait themselves for the launch before: where the wait stands, what is refused, golden files, ptxas."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptx_cases import HERE, INPUTS, SHAPES, WRITE

from missile.coloring.shape import Shape
from missile.compiler.ptx.access import global_accesses
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.fill import fill_entry
from missile.compiler.ptx.flow import Flow
from missile.compiler.ptx.overlap import Dependents, Overlap, check_waits, is_lookup, make_overlapping
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.preempt import make_preemptible
from missile.compiler.ptx.rewrite import Placement, rewrite
from missile.compiler.ptx.transfer import transfer_ptx
from missile.errors import MisuseError, UnsupportedError

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"
WAIT, LAUNCH = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
LOOKUPS = [Overlap(), Overlap(lookups_first=False)]


def read(name: str) -> str:
    return (HERE / "inputs" / f"{name}.ptx").read_text()


def entry(body: str) -> str:
    registers = ".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<9>;"
    return f"{HEAD}.visible .entry k(.param .u64 p) .reqntid 128\n{{\n{registers}\n{body}\nret;\n}}\n"


def waiting(body: str) -> list[str]:
    """The instructions of a kernel with `body` in order, as they stand when it is made to overlap."""
    text = make_overlapping(entry(body), Overlap(Dependents.NEVER))
    check_waits(text)
    return [line.strip() for line in text.split("%p<9>;")[1].splitlines() if line.strip(" \t}")]


@pytest.mark.parametrize("overlap", [Overlap(place) for place in Dependents], ids=lambda o: o.name)
@pytest.mark.parametrize("name", INPUTS)
def test_text_is_only_added(name: str, overlap: Overlap) -> None:
    before = read(name)
    after = make_overlapping(before, overlap, name=name)
    assert after.count(WAIT) == 1
    assert after.count(LAUNCH) == (overlap.dependents is not Dependents.NEVER)
    assert re.sub(r"griddepcontrol\.\w+;\n\t", "", after) == before


@pytest.mark.parametrize("overlap", LOOKUPS, ids=lambda o: o.name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", INPUTS)
def test_colored_kernels_wait_on_every_way(name: str, shape: Shape, overlap: Overlap) -> None:
    for placement in Placement:
        colored = rewrite(read(name), shape, name=name, placement=placement).ptx
        check_waits(make_overlapping(colored, overlap), lookups_first=overlap.lookups_first)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", INPUTS)
def test_only_loads_from_the_table_are_lookups(name: str, shape: Shape) -> None:
    """Counted apart from how they are recognized: accesses of the colored text, less those of the plain one."""
    plain = parse(read(name))
    made = rewrite(read(name), shape, name=name)
    colored = parse(made.ptx)
    function = colored.functions[-1]
    flow = Flow(colored, function)
    found = [i for i in function.instructions() if is_lookup(i, flow)]
    accesses = global_accesses(colored, function)
    assert len(accesses) - len(found) == len(global_accesses(plain, plain.functions[-1]))
    assert not [i for i in plain.functions[-1].instructions() if is_lookup(i, Flow(plain, plain.functions[-1]))]


@pytest.mark.parametrize("name", ["pair", "shadow", "in-page-shared"])
def test_lookups_stand_before_the_wait_only_if_allowed(name: str) -> None:
    colored = rewrite(read("add_relu"), SHAPES[name]).ptx
    early, late = (make_overlapping(colored, overlap) for overlap in LOOKUPS)
    loads = "ld.global.nc" if name == "in-page-shared" else "ld.global.L1::evict_last"
    assert loads in early.split(WAIT)[0]
    assert loads not in late.split(WAIT)[0]
    with pytest.raises(UnsupportedError, match=r"may come to ld\.global.* without having waited"):
        check_waits(early, lookups_first=False)


@pytest.mark.parametrize("overlap", [Overlap(), Overlap(Dependents.LATE, lookups_first=False)], ids=lambda o: o.name)
@pytest.mark.parametrize("name", INPUTS)
def test_kernels_assemble_plain_and_colored(name: str, overlap: Overlap) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    for text in (read(name), rewrite(read(name), SHAPES["pair"], name=name).ptx):
        assert assemble(make_overlapping(text, overlap), arch="sm_90a", name=name)[:4] == b"\x7fELF"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_that_move_data_overlap(shape: Shape) -> None:
    text = make_overlapping(transfer_ptx(shape, "sm_90a") + fill_entry(shape))
    check_waits(text)
    assert text.count(WAIT) == text.count(LAUNCH) == 3


@pytest.mark.parametrize("case", ["plain-start", "plain-late", "pair-start", "pair-start-lookups-last"])
def test_golden(case: str) -> None:
    form, _, how = case.partition("-")
    overlap = next(o for o in (*LOOKUPS, Overlap(Dependents.LATE)) if o.name == how)
    text = read("add_relu")
    text = make_overlapping(text if form == "plain" else rewrite(text, SHAPES[form]).ptx, overlap)
    path = Path(HERE / "golden" / f"add_relu.overlap-{case}.ptx")
    if WRITE:
        path.write_text(text)
    assert text == path.read_text()


# --- the place of the wait
def test_the_wait_comes_behind_what_is_the_kernels_own() -> None:
    lines = waiting("ld.param.u64 %rd1, [p];\nst.shared.b32 [%r1], %r2;\nbar.sync 0;\nld.global.b32 %r1, [%rd1];")
    assert lines[2:5] == ["bar.sync 0;", WAIT, "ld.global.b32 %r1, [%rd1];"]


def test_code_that_is_jumped_over_has_the_wait_before_the_jump() -> None:
    lines = waiting(
        "setp.eq.u32 %p1, %r1, 0;\n@%p1 bra over;\nld.global.b32 %r1, [%rd1];\nover:\nst.global.b32 [%rd1], %r1;"
    )
    assert lines[:3] == ["setp.eq.u32 %p1, %r1, 0;", WAIT, "@%p1 bra over;"]


def test_the_wait_stands_behind_ways_that_meet_again() -> None:
    lines = waiting("@%p1 bra over;\nmov.u32 %r1, 1;\nover:\nmov.u32 %r2, 2;\nld.global.b32 %r1, [%rd1];")
    assert lines[3:6] == ["mov.u32 %r2, 2;", WAIT, "ld.global.b32 %r1, [%rd1];"]


def test_the_wait_stands_before_a_loop_and_not_in_it() -> None:
    lines = waiting("mov.u32 %r1, 9;\nagain:\nld.global.b32 %r1, [%rd1];\n@%p1 bra again;")
    assert lines[:3] == ["mov.u32 %r1, 9;", WAIT, "again:"]
    behind = waiting("again:\nadd.u32 %r1, %r1, 1;\n@%p1 bra again;\nst.global.b32 [%rd1], %r1;")
    assert behind[2:4] == ["@%p1 bra again;", WAIT]


@pytest.mark.parametrize("end", ["@%p1 ret;", "@%p1 exit;", "@%p1 trap;", "call.uni f, ();", "ld.b32 %r1, [%rd1];"])
def test_nothing_that_ends_or_may_touch_memory_comes_before_the_wait(end: str) -> None:
    lines = waiting(f"mov.u32 %r1, 9;\n{end}")
    assert lines[:3] == ["mov.u32 %r1, 9;", WAIT, end]


@pytest.mark.parametrize(
    "access",
    [
        "ld.global.b32 %r1, [%rd1];",
        "st.global.b32 [%rd1], %r1;",
        "atom.global.add.u32 %r1, [%rd1], 1;",
        "red.global.add.u32 [%rd1], 1;",
        "prefetch.global.L2 [%rd1];",
        "cp.async.cg.shared.global [%r1], [%rd1], 16;",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 16, [%r2];",
        "ld.global.nc.L1::evict_last.b32 %r1, [%rd1];",
        "st.b32 [%rd1], %r1;",
    ],
)
def test_the_proof_finds_every_access_that_comes_too_early(access: str) -> None:
    with pytest.raises(UnsupportedError, match=r"'k' may come to .* in line \d+ without having waited"):
        check_waits(entry(f"{access}\n{WAIT}"))
    check_waits(entry(f"{WAIT}\n{access}"))
    with pytest.raises(UnsupportedError, match="without having waited"):
        check_waits(entry(f"@%p1 bra over;\n{WAIT}\nover:\n{access}"))
    with pytest.raises(UnsupportedError, match="without having waited"):
        check_waits(entry(f"@%p1 {WAIT}\n{access}"))


def test_the_proof_finds_a_way_to_the_end() -> None:
    for body in ("@%p1 ret;\n" + WAIT, f"@%p1 bra over;\n{WAIT}\nover:", ""):
        with pytest.raises(UnsupportedError, match="without having waited"):
            check_waits(entry(body))
    with pytest.raises(UnsupportedError, match="can end without having waited"):
        check_waits(entry("").replace("ret;", ""))


_STATEMENTS = st.sampled_from(
    [
        "mov.u32 %r1, 9;", "@%p1 bra a;", "bra b;", "@%p2 bra c;", "@%p1 ret;", "ld.global.b32 %r1, [%rd1];",
        "st.shared.b32 [%r1], %r2;", "@%p3 st.global.b32 [%rd1], %r1;", "bar.sync 0;",
    ]
)  # fmt: skip


@given(st.lists(_STATEMENTS, max_size=12), st.tuples(*[st.integers(0, 12)] * 3))
def test_any_order_of_jumps_is_made_to_wait(statements: list[str], places: tuple[int, int, int]) -> None:
    """Labels anywhere: whatever ways there are, all of them wait."""
    lines = list(statements)
    for label, place in zip("abc", places, strict=True):
        lines.insert(min(place, len(lines)), f"{label}:")
    waiting("\n".join(lines))


# --- what is changed and what is refused
def test_loads_of_data_lose_the_promise_that_nobody_writes() -> None:
    text = make_overlapping(entry("ld.global.nc.L1::no_allocate.v2.b32 {%r1, %r2}, [%rd1];"))
    assert "ld.global.L1::no_allocate.v2.b32 {%r1, %r2}, [%rd1];" in text
    table = make_overlapping(rewrite(read("add_relu"), SHAPES["in-page-shared"]).ptx)
    assert "ld.global.nc.v4.u32 {%missile_v0" in table


@pytest.mark.parametrize(("old", "new"), [("sm_90a", "sm_80"), ("8.7", "7.7")])
def test_what_has_no_dependent_launches_is_refused(old: str, new: str) -> None:
    with pytest.raises(UnsupportedError, match="no launch can overlap"):
        make_overlapping(entry("").replace(old, new))


def test_twice_is_misuse_and_preemption_does_not_mix_with_it() -> None:
    once = make_overlapping(entry("st.global.b32 [%rd1], %r1;"))
    with pytest.raises(MisuseError, match="'k' waits for launches before it already"):
        make_overlapping(once)
    with pytest.raises(UnsupportedError, match="'k' can't be preempted"):
        make_preemptible(once)
