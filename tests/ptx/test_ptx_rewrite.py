"""Rewritten kernels: the addresses that the reference says, golden text, and code that ptxas takes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from ptx_cases import INPUTS, SHAPES, golden, kernels, parameters, source, translation

from missile.coloring.shape import CONSTANTS, LOGICAL_BASE, Escape, Field, Form, Shape
from missile.coloring.translation import InPageTranslation, Translation
from missile.compiler.ptx.access import AccessKind
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.interpret import Thread, Touch, Trapped, run_thread
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.rewrite import Placement, rewrite
from missile.compiler.ptx.transfer import GATHER, SCATTER, THREADS, transfer_ptx
from missile.errors import MisuseError, UnsupportedError

BASE, TABLE, COUNTER = 0x7F12_0000_0000, 0x7E00_0000_0000, 0x7D00_0000_0000


parsed = lru_cache(maxsize=8)(parse)


def touches(text: str, thread: Thread) -> tuple[Touch, ...]:
    module = parsed(text)
    return run_thread(module, module.functions[-1], thread)


def thread_of(name: str, rng: np.random.Generator, base: int, stride: int) -> Thread:
    _, _, threads, blocks = INPUTS[name]
    seed = int(rng.integers(1 << 30))
    return Thread(
        parameters=parameters(name, base, stride),
        thread=(int(rng.integers(threads)), 0, 0),
        block=(int(rng.integers(blocks)), 0, 0),
        threads=(threads, 1, 1),
        data=lambda n: random.Random(seed + n).randrange(1 << 17),
    )


def colored(thread: Thread, bound: Translation, escapes: int = 0) -> Thread:
    return Thread(
        [*thread.parameters, bound.constants(BASE, table=TABLE, escapes=escapes)],
        thread.thread,
        thread.block,
        thread.threads,
        thread.blocks,
        bound.table().tobytes(),
        TABLE,
        thread.data,
    )


def plain_access(bound: Translation, touched: tuple[Touch, ...]) -> list[Touch]:
    """`touched` as the reference translates it."""
    logical = np.array([t.address - LOGICAL_BASE for t in touched], np.int64)
    physical = BASE + bound.physical(logical)
    return [replace(t, address=int(where)) for t, where in zip(touched, physical, strict=True)]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("form", SHAPES)
def test_rewritten_kernels_touch_what_the_reference_says(name: str, form: str) -> None:
    rng = np.random.default_rng(len(name) * 1009 + len(form))
    seen = 0
    # Windows send what is outside elsewhere in the tenant's memory: they have tests of their own.
    for placement in set(Placement) - {Placement.WINDOWS, Placement.CARRIED}:
        result = rewrite(source(name), SHAPES[form], name=name, placement=placement)
        for _ in range(1 if name == "convolution" else 3):  # it takes long
            bound = translation(SHAPES[form], rng)
            # Buffers may well reach beyond a small tenant's memory: those accesses go to the guard frame.
            base = LOGICAL_BASE + int(rng.integers(0, 1 + bound.logical_bytes // 2)) // 512 * 512
            thread = thread_of(name, rng, base, 3 << 19)
            original = touches(source(name), thread)
            assert list(touches(result.ptx, colored(thread, bound))) == plain_access(bound, original)
            seen += len(original)
    assert seen > 0


def test_everything_but_addresses_stays_as_it_was() -> None:
    for name in INPUTS:
        before = source(name)
        after = rewrite(before, SHAPES["in-page-shared"], name=name, placement=Placement.ACCESS)
        assert sum(after.accesses.values()) == after.translations
        kept = [line for line in after.ptx.splitlines() if "missile_" not in line]
        missing = [line for line in before.splitlines() if line not in set(kept)]
        assert len(missing) == after.translations
        assert all(".global" in line for line in missing)


def test_an_address_is_translated_once_for_all_its_accesses() -> None:
    text = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 p, .param .u32 n)
{
	.reg .b64 %rd<4>; .reg .b32 %r<4>; .reg .pred %p<2>;
	ld.param.u64 %rd1, [p];
	ld.param.u32 %r3, [n];
	cvta.to.global.u64 %rd2, %rd1;
again:
	ld.global.b32 %r1, [%rd2];
	ld.global.b32 %r2, [%rd2+4];
	st.global.b32 [%rd2], %r1;
	add.s32 %r3, %r3, -1;
	setp.ne.s32 %p1, %r3, 0;
	@%p1 bra again;
	ret;
}
"""
    shape = SHAPES["in-page-shared"]
    early = rewrite(text, shape, placement=Placement.EARLY)
    assert (early.translations, early.accesses) == (2, {AccessKind.LOAD: 2, AccessKind.STORE: 1})
    # Computed before the loop, so translated before the loop.
    assert "missile" not in early.ptx[early.ptx.index("again:") :].replace("%missile_d", "%")
    assert rewrite(text, shape, placement=Placement.ACCESS).translations == 3
    bound = translation(shape, np.random.default_rng(0))
    thread = Thread([(LOGICAL_BASE + 4096).to_bytes(8, "little"), (3).to_bytes(4, "little")])
    assert list(touches(early.ptx, colored(thread, bound))) == plain_access(bound, touches(text, thread))
    # A register that is written in the loop can only be translated in the loop.
    moving = text.replace("add.s32 %r3", "add.s64 %rd2, %rd2, 512;\n\tadd.s32 %r3")
    late = rewrite(moving, shape, placement=Placement.EARLY)
    assert late.translations == 2
    assert list(touches(late.ptx, colored(thread, bound))) == plain_access(bound, touches(moving, thread))


@pytest.mark.parametrize("form", ["in-page-shared", "shadow", "arithmetic-xors", "step-alike"])
@pytest.mark.parametrize("name", ["add_relu", "gather"])
def test_golden(name: str, form: str) -> None:
    text = rewrite(source(name), SHAPES[form], name=name).ptx
    assert text == golden(f"{name}.{form}.ptx", text)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("name", INPUTS)
def test_rewritten_kernels_assemble_and_take_constants_last(name: str, form: str) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    text = rewrite(source(name), SHAPES[form], name=name).ptx
    assert assemble(text, arch="sm_90a", name=name)[:4] == b"\x7fELF"
    before, after = (parse(t).functions[0].parameters for t in (source(name), text))
    assert after[:-1] == before
    assert (after[-1].name, after[-1].nbytes) == (CONSTANTS, Field.BYTES)


@pytest.mark.slow
def test_kernels_of_this_triton_are_colored_too() -> None:
    pytest.importorskip("triton")
    module = kernels()
    for name, kernel in module.KERNELS.items():
        text = module.compile_kernel(kernel).asm["ptx"]
        for shape in SHAPES.values():
            assemble(rewrite(text, shape, name=name).ptx, arch="sm_90a", name=name)


@pytest.mark.parametrize("form", SHAPES)
def test_transfers_move_every_byte_to_its_place(form: str) -> None:
    shape = SHAPES[form]
    bound = translation(shape, np.random.default_rng(2))
    module = parse(transfer_ptx(shape))
    size, plain = 40_007, 0x5000_0000
    arguments = [v.to_bytes(8, "little") for v in (plain, LOGICAL_BASE + 8192, size)]
    for function in module.functions:
        kinds = (AccessKind.STORE, AccessKind.LOAD) if function.name == SCATTER else (AccessKind.LOAD, AccessKind.STORE)
        for index in (0, 1, THREADS - 1, size // 16 - 1, size // 16, size // 16 + 1):
            block, lane = divmod(index, THREADS)
            thread = colored(Thread(arguments, (lane, 0, 0), (block, 0, 0), (THREADS, 1, 1)), bound)
            touched = run_thread(module, function, thread)
            left = min(16, size - 16 * index)
            # 16 bytes at once, or the last ones one by one; none beyond the end.
            offsets = [16 * index] if left == 16 else [16 * index + i for i in range(max(left, 0))]
            where = (BASE + bound.physical(8192 + np.array(offsets, np.int64))).tolist()
            assert [t.address for t in touched if t.kind is kinds[0]] == where
            assert [t.address for t in touched if t.kind is kinds[1]] == [plain + o for o in offsets]
    assert {f.name for f in module.functions} == {SCATTER, GATHER}


def escaping(escape: Escape, placement: Placement) -> tuple[Shape, InPageTranslation, str]:
    shape = Shape(Form.IN_PAGE, SHAPES["in-page-shared"].layout, escape=escape, wide=True)
    return shape, InPageTranslation(shape, [3, 7, 11], 4), rewrite(source("gather"), shape, placement=placement).ptx


@pytest.mark.parametrize("placement", Placement)
def test_accesses_that_are_made_and_escape_are_counted(placement: Placement) -> None:
    _, bound, text = escaping(Escape.COUNT, placement)
    rng = np.random.default_rng(5)
    counted = 0
    for _ in range(10):
        thread = thread_of("gather", rng, LOGICAL_BASE, 1536)
        original = touches(source("gather"), thread)
        made = touches(text, colored(thread, bound, escapes=COUNTER))
        rest = [t for t in made if t.address != COUNTER]
        assert rest == plain_access(bound, original)
        outside = sum(not 0 <= t.address - LOGICAL_BASE < bound.logical_bytes for t in original)
        assert len(made) - len(rest) == outside
        counted += outside
    assert counted > 0


SINE = """.version 8.7
.target sm_90a
.address_size 64
.global .align 4 .b8 bits[24] = {65, 144, 67, 60, 153, 149, 98, 219, 192, 221, 52, 245, 209, 87, 39, 252, 41, 21, 68, 78, 110, 131, 249, 162};
.visible .entry k(.param .u64 p, .param .u64 index)
{
	.reg .b64 %rd<9>; .reg .b32 %r<4>; .reg .pred %p<2>;
	ld.param.u64 %rd1, [p];
	ld.param.u64 %rd2, [index];
	mov.u64 %rd3, bits;
	shl.b64 %rd4, %rd2, 2;
	add.s64 %rd5, %rd3, %rd4;
	mov.u64 %rd6, %rd5;
	mov.b32 %r2, 2;
again:
	ld.global.nc.b32 %r1, [%rd6+4];
	st.global.b32 [%rd1], %r1;
	add.s64 %rd6, %rd6, 4;
	add.s32 %r2, %r2, -1;
	setp.ne.s32 %p1, %r2, 0;
	@%p1 bra again;
	ret;
}
"""  # noqa: E501 - one line, as compilers write it


@pytest.mark.parametrize("index", [0, 2, 3, 5, 6, 1 << 40, (1 << 62) - 4, (1 << 64) - 5])
def test_tables_of_the_module_are_read_where_they_are_and_never_left(index: int) -> None:
    shape = SHAPES["shadow"]
    result = rewrite(SINE, shape)
    assert result.accesses == {AccessKind.STORE: 1}
    bound = translation(shape, np.random.default_rng(3))
    thread = Thread([LOGICAL_BASE.to_bytes(8, "little"), index.to_bytes(8, "little")])
    before = [t.address for t in touches(SINE, Thread([*thread.parameters[:1], bytes(8)])) if t.kind is AccessKind.LOAD]
    after = [t for t in touches(result.ptx, colored(thread, bound)) if t.kind is AccessKind.LOAD]
    # The interpreter places variables one after another, from the same address on.
    start = before[0] - 4
    assert len(after) == 2
    for step, touch in enumerate(after):
        offset = (4 * (index + step) + 4) % (1 << 64)
        assert touch.address == start + min(offset, 20)


@pytest.mark.parametrize(
    "change",
    [
        ("ld.global.nc.b32 %r1, [%rd6+4]", "st.global.b32 [%rd6+4], %r1"),
        ("add.s64 %rd6, %rd6, 4", "add.s64 %rd6, %rd6, %rd1; mov.u64 %rd6, %rd1"),
        ("add.s64 %rd5, %rd3, %rd4", "add.s64 %rd5, %rd3, %rd3"),
        ("mov.u64 %rd6, %rd5", "selp.b64 %rd6, %rd5, %rd1, %p1"),
        ("b8 bits[24]", "b8 other[24], bits[24]"),
    ],
)
def test_what_may_leave_a_table_of_the_module_is_refused(change: tuple[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="module's own memory"):
        rewrite(SINE.replace(*change), SHAPES["in-page-shared"])


def test_a_trap_is_an_option() -> None:
    _, bound, text = escaping(Escape.TRAP, Placement.DEFINITION)
    rng = np.random.default_rng(6)
    with pytest.raises(Trapped):
        touches(text, colored(thread_of("gather", rng, LOGICAL_BASE + bound.logical_bytes, 512), bound))


def test_copies_of_nothing_do_not_count_as_escapes() -> None:
    shape = Shape(Form.IN_PAGE, SHAPES["in-page-shared"].layout, escape=Escape.COUNT, wide=True)
    text = rewrite(source("matmul_64x64x32"), shape).ptx
    assert re.search(r"setp\.ne\.and\.b32\s+%missile_q\d+, %r\d+, 0, %missile_q\d+;", text)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: rewrite(rewrite(source("gather"), SHAPES["shadow"]).ptx, SHAPES["shadow"]), MisuseError, "already"),
        (
            lambda: rewrite(source("gather").replace("%p1", "%missile_p"), SHAPES["shadow"]),
            UnsupportedError,
            "missile_",
        ),
        (
            lambda: rewrite(source("gather").replace(".visible .entry", ".func"), SHAPES["shadow"]),
            UnsupportedError,
            "function that kernels call",
        ),
    ],
)
def test_misuse_is_refused(make: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("parameters", ["", "()"])
def test_a_kernel_without_parameters_gets_one(parameters: str) -> None:
    text = f".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k{parameters}\n{{ ret; }}\n"
    (function,) = parse(rewrite(text, SHAPES["shadow"]).ptx).functions
    assert [parameter.name for parameter in function.parameters] == [CONSTANTS]


def test_what_the_assembler_says_is_told() -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    with pytest.raises(UnsupportedError, match="'broken' can't be assembled"):
        assemble(source("add_relu").replace("add.s64", "add.s65"), arch="sm_90a", name="broken")
