"""Basic blocks of a function, and how early in its block a value can be had: what an address is computed from.

What can be computed again without anybody noticing (arithmetic on integers, no memory but parameters, no condition) can be
computed earlier under other names. The assembler drops the original where nobody uses it any more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from missile.compiler.ptx.flow import destinations, registers
from missile.compiler.ptx.syntax import Address, Function, Instruction, Label, Name, Operand, Pair, Scope, Vector

__all__ = ["Blocks", "Slice", "Unit", "is_repeatable"]

_REPEATABLE = frozenset(
    {
        "abs", "add", "and", "bfe", "bfi", "clz", "cvt", "cvta", "div", "lop3", "mad", "max", "min", "mov", "mul", "neg",
        "not", "or", "popc", "prmt", "rem", "selp", "setp", "shf", "shl", "shr", "sub", "xor",
    }
)  # fmt: skip
_FLOATS = frozenset({"f16", "f16x2", "bf16", "bf16x2", "f32", "f64", "tf32", "e4m3x2", "e5m2x2"})
_FIXED = ("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid")  # special registers that do not change
_LONGEST = 64  # units of a slice: more are not worth computing early


@dataclass(frozen=True, slots=True)
class Unit:
    """A statement of the body, an inner scope being one. start, end: its place in the source. block: which one it is in.

    writes: registers of the function that it may write. reads: names that it reads, with their places.
    repeatable: whether computing it again gives the same and does nothing else.
    """

    start: int
    end: int
    block: int
    writes: frozenset[str]
    reads: tuple[Name, ...]
    targets: tuple[Name, ...]
    repeatable: bool


@dataclass(frozen=True, slots=True)
class Slice:
    """What the value of a register is computed from. units: indices, ascending, to be computed anew.

    at: index of the unit of `block` before which they can stand: everything that they need is there then.
    """

    units: tuple[int, ...]
    at: int
    block: int


class Blocks:
    """The units of `function` in the order of the text, and the definitions that reach a place within its block."""

    def __init__(self, function: Function) -> None:
        self.units: list[Unit] = []
        self._first: list[int] = [0]
        labels: dict[str, int] = {}
        self._jumps: dict[int, set[str]] = {}
        for statement in function.body or ():
            match statement:
                case Label(name=name):
                    self._cut()
                    labels[name] = len(self._first) - 1
                case Instruction() | Scope():
                    inner = _instructions(statement)
                    self.units.append(_unit(statement, len(self._first) - 1, inner))
                    jumps = {o.text for i in inner if i.root == "bra" for o in i.operands if isinstance(o, Name)}
                    self._jumps.setdefault(len(self._first) - 1, set()).update(jumps)
                    if jumps or any(i.root in ("ret", "exit", "brx") for i in inner) or _has_label(statement):
                        self._cut()
        self._labels = labels
        self._starts = [unit.start for unit in self.units]
        self._writers: dict[str, list[int]] = {}
        for index, unit in enumerate(self.units):
            for name in unit.writes:
                self._writers.setdefault(name, []).append(index)

    def index_at(self, position: int) -> int:
        """Index of the unit that the source has at `position`."""
        return bisect_right(self._starts, position) - 1

    def first_of(self, block: int) -> int:
        """Index of the block's first unit."""
        return self._first[block]

    def repeats(self, block: int) -> bool:
        """Whether `block` is the whole body of a loop: it ends with a branch to its own start."""
        return any(self._labels.get(name) == block for name in self._jumps.get(block, ()))

    def is_in_loop(self, block: int) -> bool:
        """Whether a jump goes back from `block`, or from behind it, to there or in front of it."""
        return any(source >= block >= target for target in range(block + 1) for source in self.sources(target))

    @property
    def count(self) -> int:
        """Blocks."""
        return len(self._first)

    def units_of(self, block: int) -> Sequence[Unit]:
        """The units of `block`, in the order of the text."""
        end = self._first[block + 1] if block + 1 < len(self._first) else len(self.units)
        return self.units[self._first[block] : end]

    def sources(self, block: int) -> set[int]:
        """Blocks that jump to `block`."""
        return {source for source, names in self._jumps.items() if any(self._labels.get(n) == block for n in names)}

    def follows(self, later: int, earlier: int) -> bool:
        """Whether `later` is reached from `earlier` only, block by block in the order of the text."""
        return earlier <= later and all(self.sources(block) <= {block} for block in range(earlier + 1, later + 1))

    def definition(self, name: str, before: int, block: int) -> int | None:
        """Index of the last unit of `block` before unit `before` that writes `name`; None where it comes from outside."""
        found = self._writers.get(name, [])
        place = bisect_right(found, before - 1)
        return found[place - 1] if place and found[place - 1] >= self._first[block] else None

    def slice(self, name: str, before: int, block: int) -> Slice | None:
        """How the value that `name` has in `block` before unit `before` can be computed as early as possible in the block;
        None where it can't be. A unit that is not repeatable has to come first, with everything that it needs.
        """
        members: set[int] = set()
        leaves: set[tuple[str, int | None]] = set()
        pending = [(name, before)]
        while pending:
            wanted, place = pending.pop()
            found = self.definition(wanted, place, block)
            if found is None or not self.units[found].repeatable:
                leaves.add((wanted, found))
            elif found not in members:
                members.add(found)
                pending += [(read.text, found) for read in self.units[found].reads]
        at = max((found + 1 for _, found in leaves if found is not None), default=self._first[block])
        if len(members) > _LONGEST or any(self.definition(leaf, at, block) != found for leaf, found in leaves):
            return None
        return Slice(tuple(sorted(members)), at, block)

    def _cut(self) -> None:
        """A new block begins with the next unit."""
        if self._first[-1] == len(self.units):
            return
        self._first.append(len(self.units))


def _unit(statement: Instruction | Scope, block: int, inner: tuple[Instruction, ...]) -> Unit:
    local = {name for declared in _declared(statement) for name in declared}
    writes = frozenset(name for i in inner for name in destinations(i) if name not in local)
    reads: list[Name] = []
    targets: list[Name] = []
    for instruction in inner:
        operands = instruction.operands
        targets += [name for o in operands[:1] for name in _names(o) if name.text in writes]
        reads += [
            name for o in operands[1:] for name in _names(o) if name.text.startswith("%") and name.text not in local
        ]
    repeatable = bool(inner) and not _has_label(statement) and all(map(is_repeatable, inner))
    if isinstance(statement, Scope) and any(name.text in writes for name in reads):
        repeatable = False  # it reads what it wrote itself
    return Unit(statement.start, statement.end, block, writes, tuple(reads), tuple(targets), repeatable)


def is_repeatable(instruction: Instruction, *, guarded: bool = False) -> bool:
    """Whether computing it again gives the same and does nothing else. guarded: also under a condition."""
    if (instruction.guard is not None and not guarded) or not instruction.operands:
        return False
    if instruction.root == "ld":
        return "param" in instruction.parts
    if instruction.root not in _REPEATABLE or any(part in _FLOATS for part in instruction.parts):
        return False
    if any(isinstance(operand, Address) for operand in instruction.operands):
        return False
    read = [name for operand in instruction.operands[1:] for name in registers(operand)]
    # A register that changes by itself (%clock) is not written %NAME followed by a number.
    return all(not name.startswith("%") or name[-1:].isdigit() or name.startswith(_FIXED) for name in read)


def _names(operand: Operand) -> Iterator[Name]:
    """The names in `operand` that can be replaced; what stands in brackets is no register of a repeatable unit."""
    match operand:
        case Name():
            yield operand
        case Vector(items=items):
            for item in items:
                yield from _names(item)
        case Pair(first=first, second=second):
            yield from _names(first)
            yield from _names(second)


def _instructions(statement: Instruction | Scope) -> tuple[Instruction, ...]:
    if isinstance(statement, Instruction):
        return (statement,)
    return tuple(i for s in statement.statements if isinstance(s, Instruction | Scope) for i in _instructions(s))


def _has_label(statement: Instruction | Scope) -> bool:
    if isinstance(statement, Instruction):
        return False
    return any(isinstance(s, Label) or (isinstance(s, Scope) and _has_label(s)) for s in statement.statements)


def _declared(statement: Instruction | Scope) -> Iterator[list[str]]:
    """Names that an inner scope declares for itself."""
    if isinstance(statement, Scope):
        for inner in statement.statements:
            if isinstance(inner, Scope):
                yield from _declared(inner)
            elif not isinstance(inner, Instruction | Label) and hasattr(inner, "names"):
                yield [name for name, _ in inner.names]
