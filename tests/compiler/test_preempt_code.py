"""Preemptible kernels as text: what is added, what is refused, golden files, and code that ptxas takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from missile.coloring.shape import Form, Shape
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.preempt import PARAMETERS, Look, Place, arguments, make_preemptible
from missile.compiler.ptx.rewrite import rewrite
from missile.errors import MisuseError, UnsupportedError
from missile.probe.layout import PageLayout

HERE = Path(__file__).parent
INPUTS = sorted((HERE.parent / "ptx" / "inputs").glob("*.ptx"))
SHAPE = Shape(Form.IN_PAGE, PageLayout(2 << 20, (*range(8), 9)))
WINDOWS = Shape(Form.PAIR, PageLayout(2 << 20, tuple(range(8))), alike=True)
HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"


def entry(body: str, *, parameters: str = ".param .u64 p", tuning: str = ".reqntid 128") -> str:
    registers = ".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<9>;"
    return f"{HEAD}.visible .entry k({parameters}) {tuning}\n{{\n{registers}\n{body}\nret;\n}}\n"


def names(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", INPUTS, ids=names)
def test_text_is_only_added(path: Path) -> None:
    before = path.read_text()
    after = make_preemptible(before, name=path.stem)
    function = parse(after).functions[-1]
    assert tuple(p.name for p in function.parameters[-3:]) == PARAMETERS
    assert [p.nbytes for p in function.parameters[-3:]] == [len(value) for value in arguments(1, 2, 3)]
    kept = [line.rstrip(",") for line in after.splitlines() if "missile_preempt" not in line and line.strip()]
    assert kept == [line.rstrip(",") for line in before.splitlines() if line.strip()]
    assert after.count("missile_preempt_agree:") == 1


@pytest.mark.parametrize("path", INPUTS, ids=names)
def test_the_decision_comes_before_anything_that_others_could_see(path: Path) -> None:
    function = parse(make_preemptible(path.read_text())).functions[-1]
    roots = []
    for instruction in function.instructions():
        if instruction.opcode.startswith("bar.red"):
            break
        own = any("missile_preempt" in str(operand) for operand in instruction.operands)
        roots += [] if own or "param" in instruction.parts else [instruction.root]
    else:
        pytest.fail("the block never decides")
    assert not {"ld", "st", "cp", "atom", "red", "bar", "bra", "ret", "mbarrier"} & set(roots)


@pytest.mark.parametrize(("look", "place"), [(Look.FRESH, Place.EARLY), (Look.CACHED, Place.LATE)])
@pytest.mark.parametrize("path", INPUTS, ids=names)
def test_kernels_assemble_plain_and_colored(path: Path, look: Look, place: Place) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    plain = path.read_text()
    for text in (plain, *(rewrite(plain, shape, name=path.stem, aligned=(512,) * 3).ptx for shape in (SHAPE, WINDOWS))):
        assert assemble(make_preemptible(text, look=look, place=place), arch="sm_90a", name=path.stem)[:4] == b"\x7fELF"


@pytest.mark.parametrize("place", Place)
def test_golden(place: Place) -> None:
    text = make_preemptible((HERE.parent / "ptx" / "inputs" / "add_relu.ptx").read_text(), place=place)
    path = HERE / "golden" / f"add_relu.preempt-{place}.ptx"
    if os.environ.get("MISSILE_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_a_late_decision_comes_behind_loads_but_not_behind_those_that_other_data_direct() -> None:
    body = """ld.param.u64 %rd1, [p];
    ld.global.b32 %r1, [%rd1];
    ld.global.b32 %r2, [%rd1+8];
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    ld.global.b32 %r3, [%rd2];
    st.global.b32 [%rd1], %r3;"""
    late = make_preemptible(entry(body), place=Place.LATE)
    assert late.index("[%rd1+8]") < late.index("bar.red") < late.index("mad.wide") < late.index("[%rd2]")
    copying = entry("cp.async.cg.shared.global [%r1], [%rd1], 16;\ncp.async.commit_group;\nbar.sync 0;")
    late = make_preemptible(copying, place=Place.LATE)
    assert late.index("commit_group") < late.index("bar.red") < late.index("wait_all") < late.index("bar.sync")
    assert "wait_all" not in make_preemptible(copying)


def test_entries_without_parameters_get_a_list() -> None:
    for text in (entry("", parameters=""), entry("").replace("(.param .u64 p)", "")):
        function = parse(make_preemptible(text)).functions[-1]
        assert tuple(p.name for p in function.parameters) == PARAMETERS


def test_threads_along_all_axes_elect_one() -> None:
    assert "%tid.y" not in make_preemptible(entry("", tuning=".reqntid 64, 1, 1"))
    for tuning in (".reqntid 8, 8", ".maxntid 64", ""):
        assert {"%tid.x", "%tid.y", "%tid.z"} <= set(
            make_preemptible(entry("", tuning=tuning)).replace(";", " ").split()
        )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (entry("", tuning=".reqntid 128 .reqnctapercluster 2"), "clusters"),
        (entry("barrier.cluster.arrive.aligned;"), "waits for others"),
        (entry("griddepcontrol.wait;"), "waits for others"),
        (
            entry("again: ld.acquire.gpu.global.b32 %r1, [%rd1]; setp.ne.u32 %p1, %r1, 7; @%p1 bra again;"),
            "watches memory",
        ),
        (
            entry("again: atom.global.cas.b32 %r1, [%rd1], 0, 1; and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0;"
                  "@%p1 bra done; bra again; done:"),
            "watches memory",
        ),
    ],
)  # fmt: skip
def test_kernels_that_wait_for_other_blocks_are_refused_by_name(text: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"'k' can't be preempted.*{why}"):
        make_preemptible(text)


def test_loops_and_atomics_that_nobody_waits_for_are_taken() -> None:
    counting = (
        "again: atom.global.add.u32 %r3, [%rd1], 1; add.s32 %r1, %r1, 1; setp.lt.s32 %p1, %r1, 7; @%p1 bra again;"
    )
    last_block = "atom.acq_rel.gpu.global.add.u32 %r1, [%rd1], 1; setp.ne.u32 %p1, %r1, 7; @%p1 ret;"
    for body in (counting, last_block):
        make_preemptible(entry(body))


def test_twice_is_misuse() -> None:
    with pytest.raises(MisuseError, match="'k' is preemptible already"):
        make_preemptible(make_preemptible(entry("")))
