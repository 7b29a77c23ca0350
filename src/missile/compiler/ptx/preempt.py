"""Rewriting a kernel's PTX so that its blocks leave, instead of starting, while a flag is up, and run in a later launch.

The code that is put in front of a kernel decides once for a block: one thread looks at the model's control block and the
others learn the outcome from a barrier, so a flag that changes meanwhile can't divide a block. `docs/design/preemption.md`
has the protocol; `gpu.interface.PreemptControl` says what it guarantees. Comes last: after colors, because what it touches
is not the tenant's memory.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from enum import StrEnum

from missile.compiler.ptx.flow import destinations, registers
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.syntax import Function, Instruction, Label, Name, Scope, Vector
from missile.compiler.ptx.tokens import tokenize
from missile.errors import InternalError, MisuseError, UnsupportedError

__all__ = ["PARAMETERS", "STEPS", "Look", "Place", "arguments", "make_preemptible"]

# The control block: u32 left, u32 stop (the flag), u32 resume (the step to resume, plus 1; 0: none), u32 request (its
# number), u64 address of a word of host memory. `left` says where blocks have left: request << 16 | step + 1, or 0.
STEPS = (1 << 16) - 2
"""The highest step that a launch can be."""

PARAMETERS = ("missile_preempt_control", "missile_preempt_marks", "missile_preempt_step")
"""Added to an entry's parameters: address of the control block, address of the launch's marks (a byte a block), step + 1."""

_PREFIX = "missile_preempt"


class Look(StrEnum):
    """How a block looks at the flag."""

    FRESH = "fresh"  # past L1: sees a flag as soon as it is up
    CACHED = "cached"  # through L1: cheaper, but a block may miss a flag that went up after its kernel had started


class Place(StrEnum):
    """Where in a kernel a block decides."""

    EARLY = "early"  # before its first access to memory: a block that leaves has cost nothing
    LATE = "late"  # behind its first loads, whose latency hides that of the look: for kernels that load little


def arguments(control: int, marks: int, step: int) -> tuple[bytes, bytes, bytes]:
    """What `PARAMETERS` take for a launch that is number `step` of its plan; `marks` has a zeroed byte for each block."""
    return struct.pack("<Q", control), struct.pack("<Q", marks), struct.pack("<I", step + 1)


def make_preemptible(source: str, *, name: str = "", look: Look = Look.FRESH, place: Place = Place.EARLY) -> str:
    """The PTX text `source` with every entry made preemptible. What is not added stays as it was, byte for byte.

    UnsupportedError naming the kernel where a block may wait for others (clusters, spinning on memory, dependent
    launches): some of them might have left. MisuseError for PTX that was made preemptible already.
    """
    module = parse(source, name)
    if _PREFIX in source:
        raise MisuseError(f"Kernel {name or module.entries[0]!r} is preemptible already.")
    inserts: list[tuple[int, str]] = []
    for function in module.functions:
        if function.body is None:
            continue
        _refuse_waiting(function)
        if function.entry:
            head = source[function.start : function.body_start]
            _refuse_clusters(function, head)
            inserts.append(_parameters(function, head))
            inserts.append((function.behind_declarations, _look(_is_line_of_threads(head), look)))
            where, copies = _decision(function, place)
            inserts.append((where, _decide(copies)))
            inserts.append((function.end - 1, _look_closer()))
    return _inserted(source, inserts)


def _parameters(function: Function, head: str) -> tuple[int, str]:
    """Where the parameters end, and the text to add there."""
    control, marks, step = PARAMETERS
    added = f"\n\t.param .u64 {control},\n\t.param .u64 {marks},\n\t.param .u32 {step}"
    tokens = tokenize(head, function.name)
    closing = next((number for number, token in enumerate(tokens) if token.text == ")"), None)
    if closing is None:  # an entry without a list
        behind = next(token.end for token in tokens if token.text == function.name)
        return function.start + behind, f"({added}\n)"
    last = tokens[closing - 1]
    return function.start + last.end, ("," if function.parameters else "") + added


def _is_line_of_threads(head: str) -> bool:
    """Whether blocks are known to have threads along x only."""
    required = re.search(r"\.reqntid\s+\d+((?:\s*,\s*\d+)*)", head)
    return required is not None and set(re.findall(r"\d+", required[1])) <= {"1"}


_P, _R, _D = (f"%{_PREFIX}_{kind}" for kind in "prd")
_AGREE, _CLOSER = f"${_PREFIX}_agree", f"${_PREFIX}_closer"


def _look(line: bool, look: Look) -> str:
    """The block's first thread (for which p0 is false) loads the control: r1 left, r2 stop, r3 resume, r4 request."""
    first = [f"mov.u32 {_R}0, %tid.x;"]
    for axis in () if line else "yz":
        first += [f"mov.u32 {_R}1, %tid.{axis};", f"or.b32 {_R}0, {_R}0, {_R}1;"]
    load = "ld.relaxed.gpu.global.v4.b32" if look is Look.FRESH else "ld.global.v4.b32"
    return _code(
        f".reg .pred {_P}<6>;",
        f".reg .b32 {_R}<10>;",
        f".reg .b64 {_D}<4>;",
        *first,
        f"setp.ne.u32 {_P}0, {_R}0, 0;",
        f"ld.param.b64 {_D}0, [{PARAMETERS[0]}];",
        *(f"mov.b32 {_R}{number}, 0;" for number in (1, 2, 3, 4)),
        f"@!{_P}0 {load} {{{_R}1, {_R}2, {_R}3, {_R}4}}, [{_D}0];",
    )


def _decide(copies: bool) -> str:
    """All threads end, or all go on. p1: this thread has found that the block leaves; only the first one's is ever true.

    copies: asynchronous ones may be under way, into shared memory that the block must not lose before they end.
    """
    return (
        _code(
            f"setp.ne.u32 {_P}1, {_R}0, {_R}0;",
            f"or.b32 {_R}5, {_R}1, {_R}2;",
            f"or.b32 {_R}5, {_R}5, {_R}3;",
            f"setp.ne.u32 {_P}2, {_R}5, 0;",
            f"@{_P}2 bra {_CLOSER};",
        )
        + f"\n{_AGREE}:"
        + _code(
            f"bar.red.or.pred {_P}5, 0, {_P}1;",
            *([f"@{_P}5 cp.async.wait_all;"] if copies else []),
            f"@{_P}5 ret;",
        )
        + "\n\t"
    )


def _look_closer() -> str:
    """The first thread's decision where something is the matter: out of the way, so that others don't fetch its code."""
    return (
        f"\n{_CLOSER}:"
        + _code(
            # It leaves unless shown otherwise. Steps before the one to resume have run.
            f"setp.eq.u32 {_P}1, {_R}0, {_R}0;",
            f"ld.param.b32 {_R}5, [{PARAMETERS[2]}];",
            f"setp.lt.u32 {_P}2, {_R}5, {_R}3;",
            f"@{_P}2 bra {_AGREE};",
            # What was launched after a step of which blocks have left waits for it.
            f"shl.b32 {_R}4, {_R}4, 16;",
            f"or.b32 {_R}4, {_R}4, {_R}5;",
            f"setp.ne.u32 {_P}2, {_R}1, {_R}4;",
            f"setp.ne.and.u32 {_P}2, {_R}1, 0, {_P}2;",
            f"@{_P}2 bra {_AGREE};",
            # Of a step that is resumed, marked blocks are still to be run.
            f"mov.u32 {_R}6, %ctaid.z;",
            f"mov.u32 {_R}7, %nctaid.y;",
            f"mov.u32 {_R}8, %ctaid.y;",
            f"mad.lo.u32 {_R}6, {_R}6, {_R}7, {_R}8;",
            f"mov.u32 {_R}7, %nctaid.x;",
            f"mov.u32 {_R}8, %ctaid.x;",
            f"mad.lo.u32 {_R}6, {_R}6, {_R}7, {_R}8;",
            f"cvt.u64.u32 {_D}1, {_R}6;",
            f"ld.param.b64 {_D}2, [{PARAMETERS[1]}];",
            f"add.s64 {_D}1, {_D}2, {_D}1;",
            f"setp.eq.u32 {_P}3, {_R}5, {_R}3;",
            f"mov.b32 {_R}6, 1;",
            f"@{_P}3 ld.global.u8 {_R}6, [{_D}1];",
            f"setp.eq.u32 {_P}2, {_R}6, 0;",
            f"@{_P}2 bra {_AGREE};",
            # Flag down: it runs, and is not to be run again.
            f"mov.b32 {_R}7, 0;",
            f"setp.eq.u32 {_P}4, {_R}2, 0;",
            f"@{_P}4 st.global.u8 [{_D}1], {_R}7;",
            f"@{_P}4 setp.ne.u32 {_P}1, {_R}0, {_R}0;",
            f"@{_P}4 bra {_AGREE};",
            # Up: it is marked, and one block says where: the way to host memory is narrow.
            f"st.global.u8 [{_D}1], {_R}6;",
            f"setp.ne.u32 {_P}2, {_R}1, 0;",
            f"@{_P}2 bra {_AGREE};",
            f"atom.relaxed.gpu.global.cas.b32 {_R}6, [{_D}0], 0, {_R}4;",
            f"setp.ne.u32 {_P}2, {_R}6, 0;",
            f"@{_P}2 bra {_AGREE};",
            f"ld.global.b64 {_D}3, [{_D}0+16];",
            f"st.relaxed.sys.global.b32 [{_D}3], {_R}4;",
            f"bra {_AGREE};",
        )
        + "\n"
    )


def _code(*lines: str) -> str:
    return "".join(f"\n\t{line}" for line in lines)


def _refuse_clusters(function: Function, head: str) -> None:
    for directive in (".reqnctapercluster", ".explicitcluster", ".blocksareclusters"):
        if directive in head:
            raise _refusal(function, f"its blocks form clusters ({directive})")


def _refuse_waiting(function: Function) -> None:
    """Refuse what waits for other blocks or kernels: a block that has left would keep it waiting for ever."""
    for instruction in function.instructions():
        if instruction.opcode.startswith(("barrier.cluster", "griddepcontrol")):
            raise _refusal(function, f"{instruction.opcode} in line {instruction.line} waits for others")
    for loop in _loops(function):
        watched = _watched(loop)
        for instruction in loop:
            if instruction.guard is not None and instruction.guard.text in watched and instruction.root in _JUMPS:
                raise _refusal(
                    function, f"the loop that {instruction.opcode} in line {instruction.line} leaves watches memory"
                )


_JUMPS = frozenset({"bra", "ret", "exit"})
_STRONG = frozenset({"volatile", "acquire", "relaxed", "mmio"})
_OWN = frozenset({"shared", "shared::cta", "local", "param", "const"})


def _loops(function: Function) -> Iterator[tuple[Instruction, ...]]:
    """The text between a label and each branch back to it."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    for statement in function.flat():
        if isinstance(statement, Label):
            labels[statement.name] = len(code)
        elif isinstance(statement, Instruction):
            code.append(statement)
            target = statement.operands[0] if statement.root == "bra" else None
            if isinstance(target, Name) and target.text in labels:
                yield tuple(code[labels[target.text] :])


def _watched(loop: Iterable[Instruction]) -> frozenset[str]:
    """Registers whose values come, by computation, from memory that `loop` reads as other blocks may write it meanwhile."""
    found: set[str] = set()
    before = -1
    while len(found) != before:
        before = len(found)
        for instruction in loop:
            parts = set(instruction.parts)
            if instruction.root in ("atom", "ld"):
                strong = not parts & _OWN and (instruction.root == "atom" or bool(parts & _STRONG))
            else:
                sources = {name for operand in instruction.operands[1:] for name in registers(operand)}
                strong = bool(sources & found) and instruction.root != "st"
            if strong:
                found.update(destinations(instruction))
    return frozenset(found)


def _refusal(function: Function, why: str) -> UnsupportedError:
    return UnsupportedError(f"Kernel {function.name!r} can't be preempted: {why}.")


def _decision(function: Function, place: Place) -> tuple[int, bool]:
    """Where in the text's straight beginning to decide, and whether asynchronous copies have been started there.

    The beginning ends where anything happens but arithmetic and loads. What comes before the decision overlaps with the
    load of the control.
    """
    targets = {
        operand.text
        for instruction in function.instructions()
        for operand in instruction.operands
        if instruction.root == "bra" and isinstance(operand, Name)
    }
    behind_loads = 0
    copies = False
    loaded: set[str] = set()
    for statement in function.body or ():
        ends = isinstance(statement, Scope) or (isinstance(statement, Label) and statement.name in targets)
        if isinstance(statement, Instruction):
            if not _only_computes(statement):
                # A load from where other data say could go anywhere, while those data are not there yet.
                ends = place is Place.EARLY or not _only_loads(statement) or bool(loaded & _decides(statement))
                if not ends:
                    behind_loads = statement.end
                    copies = copies or statement.root == "cp"
                    loaded.update(destinations(statement))
            elif loaded & _read(statement):
                loaded.update(destinations(statement))
        if ends:
            return behind_loads or statement.start, copies
    raise InternalError(f"Kernel {function.name!r} never ends.")


def _read(instruction: Instruction) -> set[str]:
    """Registers that `instruction` reads, its guard among them."""
    found = {name for operand in instruction.operands[1:] for name in registers(operand)}
    return found if instruction.guard is None else found | {instruction.guard.text}


def _decides(instruction: Instruction) -> set[str]:
    """Registers that say where `instruction` reads, and whether."""
    found = {name for operand in instruction.operands if not isinstance(operand, Vector) for name in registers(operand)}
    return found - set(destinations(instruction)) | ({instruction.guard.text} if instruction.guard else set())


def _only_loads(instruction: Instruction) -> bool:
    parts = instruction.parts
    if parts[:2] == ("cp", "async"):
        return "bulk" not in parts and parts[2] in ("ca", "cg", "commit_group")
    return instruction.root == "ld" and "global" in parts and not set(parts) & _STRONG


_ARITHMETIC = frozenset(
    {
        "abs", "add", "and", "bfe", "bfi", "clz", "createpolicy", "cvt", "cvta", "div", "fma", "lop3", "mad", "max", "min",
        "mov", "mul", "neg", "not", "or", "popc", "prmt", "rem", "selp", "setp", "shf", "shl", "shr", "sub", "xor",
    }
)  # fmt: skip


def _only_computes(instruction: Instruction) -> bool:
    return instruction.root in _ARITHMETIC or instruction.opcode.startswith("ld.param")


def _inserted(source: str, inserts: list[tuple[int, str]]) -> str:
    out: list[str] = []
    position = 0
    for at, text in sorted(inserts, key=lambda insert: insert[0]):
        out += [source[position:at], text]
        position = at
    return "".join([*out, source[position:]])
