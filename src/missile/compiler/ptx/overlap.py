"""Rewriting a kernel's PTX so that it may be launched while the launch before it still runs: it waits itself, on the device.

Two instructions are added. `griddepcontrol.wait` stands at the latest place that every thread passes before it touches
global memory: until there a kernel computes addresses, loads parameters and uses shared memory, all of which is its own.
`griddepcontrol.launch_dependents` allows the next launch to start; where it stands decides about speed only.
`docs/design/overlapped-launches.md` says why the results are the same. Comes last: after colors, whose lookups read what
nobody writes while the plan runs, and so may stand before the wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from missile.coloring.shape import CONSTANTS, Field
from missile.compiler.ptx.edits import Edit, apply
from missile.compiler.ptx.flow import Flow, destinations
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.syntax import Address, Function, Immediate, Instruction, Label, Name
from missile.errors import MisuseError, UnsupportedError

__all__ = ["Dependents", "Overlap", "check_waits", "is_lookup", "make_overlapping"]

_FIRST_VERSION = (7, 8)
_FIRST_TARGET = 90
_WAIT, _LAUNCH = "griddepcontrol.wait", "griddepcontrol.launch_dependents"


class Dependents(StrEnum):
    """When the next launch may start: once every block of this one has come here, or has ended."""

    START = "start"  # as soon as it runs: the next launch's start is hidden whole
    LATE = "late"  # before its first store: blocks of the next launch don't take issue slots from its loops
    NEVER = "never"  # when it has ended, but for its memory operations


@dataclass(frozen=True, slots=True)
class Overlap:
    """How kernels overlap. lookups_first: loads from a translation's table may be made before the wait."""

    dependents: Dependents = Dependents.START
    lookups_first: bool = True

    @property
    def name(self) -> str:
        """Different for code that may differ."""
        return str(self.dependents) + ("" if self.lookups_first else "-lookups-last")


def make_overlapping(source: str, overlap: Overlap = Overlap(), *, name: str = "") -> str:
    """The PTX text `source` with every entry waiting for the launches before it. What is not added stays, byte for byte, but
    for `.nc`: memory that the launch before writes is not constant while the kernel runs.

    UnsupportedError for a GPU or a PTX version without dependent launches; MisuseError for PTX that has them already.
    """
    module = parse(source, name)
    called = name or (module.entries[0] if module.entries else "")
    target = "".join(c for c in module.target.removeprefix("sm_") if c.isdigit())
    if module.version < _FIRST_VERSION or int(target or 0) < _FIRST_TARGET:
        raise UnsupportedError(
            f"Kernel {called!r} is for {module.target}, PTX {module.version}: no launch can overlap."
        )
    if "griddepcontrol" in source:
        raise MisuseError(f"Kernel {called!r} waits for launches before it already.")
    edits: list[Edit] = []
    for function in module.functions:
        if function.body is None:
            continue
        flow = Flow(module, function)
        edits += _coherent(source, function, flow)
        if not function.entry:
            continue
        code = _code(function)
        edits.append(_before(code[_latest(code, flow, overlap.lookups_first)], f"{_WAIT};"))
        if overlap.dependents is Dependents.START:
            edits.append(_before(code[0], f"{_LAUNCH};"))
        elif overlap.dependents is Dependents.LATE and (store := _first_store(code)) is not None:
            edits.append(_before(store, f"{_LAUNCH};"))
    return apply(source, sorted(edits, key=lambda edit: (edit.start, _WAIT in edit.text)))


def check_waits(source: str, *, name: str = "", lookups_first: bool = True) -> None:
    """Prove of PTX text that every thread of an entry waits, on every way, before it touches global memory or ends.

    Knows nothing of how the text was made. UnsupportedError naming the kernel and the line where a thread may not have
    waited; of which only loads from a translation's table are allowed, if `lookups_first`.
    """
    module = parse(source, name)
    for function in module.functions:
        if not function.entry or function.body is None:
            continue
        flow = Flow(module, function)
        for statement in _reached_without_waiting(function):
            if statement is None:
                raise UnsupportedError(f"Kernel {function.name!r} can end without having waited.")
            if not _is_private(statement, flow, lookups_first):
                what = f"{statement.opcode} in line {statement.line}"
                raise UnsupportedError(f"Kernel {function.name!r} may come to {what} without having waited.")


def is_lookup(instruction: Instruction, flow: Flow) -> bool:
    """Whether `instruction` loads from its translation's table, and is nothing else than that.

    Its address is an index times a constant, plus the table's address, which comes from the tenant's constants: both only
    ever. Only registers that a translation declares get what it loads.
    """
    if instruction.root != "ld" or "global" not in instruction.parts or len(instruction.operands) != 2:
        return False
    address = instruction.operands[1]
    if not isinstance(address, Address) or address.base is None or address.extra:
        return False
    written = destinations(instruction)
    entry = flow.only_definition(address.base)
    if not written or not all(map(_of_translation, (*written, address.base))) or entry is None:
        return False
    if entry.opcode != "mad.wide.u32" or len(entry.operands) != 4 or not isinstance(entry.operands[2], Immediate):
        return False
    table = entry.operands[3]
    start = flow.only_definition(table.text) if isinstance(table, Name) and _of_translation(table.text) else None
    if start is None or start.opcode != "ld.param.u64" or len(start.operands) != 2:
        return False
    field = start.operands[1]
    return isinstance(field, Address) and field.base == CONSTANTS and field.offset in _TABLES


_TABLES = (
    Field.TABLE,
    Field.COARSE,
)  # in other shapes than pairs there are masks at the second, and no u64 is read from it


def _of_translation(register: str) -> bool:
    return register.startswith("%missile_")


# --- what may come before the wait
_COMPUTES = frozenset(
    {
        "abs", "activemask", "add", "addc", "and", "bar", "barrier", "bfe", "bfi", "bfind", "bra", "brev", "clz", "copysign",
        "cos", "createpolicy", "cvt", "cvta", "div", "dp2a", "dp4a", "elect", "ex2", "fma", "fns", "lg2", "lop3", "mad",
        "mad24", "madc", "match", "max", "min", "mov", "mul", "mul24", "neg", "nop", "not", "or", "popc", "prmt", "rcp",
        "redux", "rem", "rsqrt", "sad", "selp", "set", "setp", "shf", "shfl", "shl", "shr", "sin", "slct", "sqrt", "sub",
        "subc", "szext", "tanh", "testp", "vote", "xor", "griddepcontrol",
    }
)  # fmt: skip
_MOVES = frozenset({"ld", "st", "ldmatrix", "stmatrix", "mbarrier", "atom", "red"})
_OWN = frozenset({"shared", "shared::cta", "local", "param", "param::entry", "param::func", "const"})


def _is_private(instruction: Instruction, flow: Flow, lookups_first: bool) -> bool:
    """Whether `instruction` touches nothing that other launches see, nor ends the thread. What is not known does."""
    if not any(isinstance(operand, Address) for operand in instruction.operands):
        cluster = instruction.opcode.startswith("barrier.cluster")
        computes = instruction.root in _COMPUTES or (instruction.root == "mbarrier" and "shared" in instruction.opcode)
        return computes and not cluster and not instruction.opcode.startswith("createpolicy.range")
    if instruction.root in _MOVES and any(part in _OWN for part in instruction.parts[1:]):
        return "global" not in instruction.parts
    return lookups_first and is_lookup(instruction, flow)


# --- places
_Line = Instruction | Label


def _code(function: Function) -> tuple[_Line, ...]:
    return tuple(s for s in function.flat() if isinstance(s, Instruction | Label))


def _targets(instruction: Instruction) -> tuple[str, ...]:
    """Labels that `instruction` may go to."""
    if instruction.root != "bra":
        return ()
    return tuple(operand.text for operand in instruction.operands if isinstance(operand, Name))


def _latest(code: Sequence[_Line], flow: Flow, lookups_first: bool) -> int:
    """Index in `code` of what the wait has to come before: the last that every thread comes to, and only once.

    No jump leads across such a place, and nothing before it touches global memory or ends.
    """
    places = {line.name: index for index, line in enumerate(code) if isinstance(line, Label)}
    shared = (
        index
        for index, line in enumerate(code)
        if isinstance(line, Instruction) and not _is_private(line, flow, lookups_first)
    )
    end = next(shared, 0)
    jumps = [
        (index, places.get(label, len(code)))
        for index, line in enumerate(code)
        if isinstance(line, Instruction)
        for label in _targets(line)
    ]
    # A jump forward to the very place goes past the wait, which stands before the label; one back to it comes behind it.
    crossed = [(min(jump), max(jump)) for jump in jumps]
    return next(place for place in range(end, -1, -1) if not any(low < place <= high for low, high in crossed))


def _first_store(code: Sequence[_Line]) -> Instruction | None:
    """The first instruction in the text that writes what the next launch may read."""
    writes = ("st", "red", "atom")
    return next((i for i in code if isinstance(i, Instruction) and i.root in writes and _may_be_global(i)), None)


def _may_be_global(instruction: Instruction) -> bool:
    return not any(part in _OWN for part in instruction.parts[1:])


def _before(line: _Line, text: str) -> Edit:
    return Edit(line.start, line.start, f"{text}\n\t")


def _coherent(source: str, function: Function, flow: Flow) -> Iterator[Edit]:
    """Loads of data without `.nc`."""
    for instruction in function.instructions():
        if instruction.root == "ld" and "nc" in instruction.parts and not is_lookup(instruction, flow):
            start = source.index(instruction.opcode, instruction.start)
            opcode = ".".join(part for part in instruction.parts if part != "nc")
            yield Edit(start, start + len(instruction.opcode), opcode)


# --- the proof
def _reached_without_waiting(function: Function) -> Iterator[Instruction | None]:
    """Every instruction that a thread may come to before it has waited for good; None for the end of the text."""
    code = _code(function)
    places = {line.name: index for index, line in enumerate(code) if isinstance(line, Label)}
    seen: set[int] = set()
    pending = [0]
    while pending:
        index = pending.pop()
        if index in seen:
            continue
        seen.add(index)
        if index >= len(code):
            yield None
            continue
        line = code[index]
        if isinstance(line, Label):
            pending.append(index + 1)
            continue
        if line.opcode == _WAIT and line.guard is None:
            continue
        yield line
        targets = _targets(line)
        pending += [places[label] for label in targets if label in places]
        if not targets or line.guard is not None:
            pending.append(index + 1)
