"""Where the registers of a function get their values: who defines them, and what memory their addresses can be of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from enum import StrEnum

from missile.compiler.ptx.syntax import (
    Address,
    Declaration,
    Function,
    Immediate,
    Instruction,
    Module,
    Name,
    Operand,
    Pair,
    Vector,
)

__all__ = ["Flow", "Origin", "destinations", "registers"]


class Origin(StrEnum):
    """What a value was computed from, as far as it matters for addresses."""

    PARAMETER = "parameter"  # an argument of the function
    MEMORY = "memory"  # loaded: what it is, only the data know
    SHARED = "shared"  # the address of memory of the block's own
    LOCAL = "local"
    CONST = "const"
    MODULE = "module"  # the address of a .global variable


_SPACES = {"shared": Origin.SHARED, "local": Origin.LOCAL, "const": Origin.CONST, "global": Origin.MODULE}
_LOADS = frozenset({"ld", "ldu", "atom", "ldmatrix", "wmma"})


def registers(operand: Operand) -> Iterator[str]:
    """Names in `operand`, registers and symbols, those inside brackets and braces among them."""
    match operand:
        case Name(text=text):
            yield text
        case Vector(items=items):
            for item in items:
                yield from registers(item)
        case Pair(first=first, second=second):
            yield from registers(first)
            yield from registers(second)
        case Address(base=base, extra=extra):
            if base is not None:
                yield base
            for item in extra:
                yield from registers(item)
        case Immediate():
            return


def destinations(instruction: Instruction) -> tuple[str, ...]:
    """Registers that `instruction` may write: those of its first operand, unless that is an address.

    Where the first operand is only read (`bar.sync`, `st`), it is named all the same: too many writes are safe to assume.
    """
    if not instruction.operands or isinstance(instruction.operands[0], Address):
        return ()
    return tuple(registers(instruction.operands[0]))


class Flow:
    """Definitions and origins of a function's registers, without regard to the order of its blocks.

    Names are taken as they stand: a name declared in two scopes has two definitions, so nothing is said about either.
    """

    def __init__(self, module: Module, function: Function) -> None:
        self._symbols: dict[str, Origin] = {}
        self._sizes: dict[str, int] = {}
        self._types: list[tuple[str, int, str]] = []
        for declaration in (*module.variables, *function.flat()):
            if isinstance(declaration, Declaration) and declaration.space in _SPACES:
                for name, _ in declaration.names:
                    self._symbols[name] = _SPACES[declaration.space]
                    self._sizes[name] = declaration.nbytes if len(declaration.names) == 1 else 0
            elif isinstance(declaration, Declaration) and declaration.space == "reg":
                self._types += [(name, count, declaration.type) for name, count in declaration.names]
        self.definitions: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in function.instructions():
            for name in destinations(instruction):
                self.definitions[name].append(instruction)
        self._origins: dict[str, frozenset[Origin]] = {}
        self._solve(function)

    def is_symbol(self, name: str) -> bool:
        """Whether `name` is a variable of the module or the function."""
        return name in self._symbols

    def type_of(self, name: str) -> str:
        """The type that register `name` was declared with ("b64", "pred"), "" when it was not."""
        for declared, count, kind in self._types:
            number = name.removeprefix(declared)
            if name == declared or (count and number != name and number.isdigit() and int(number) < count):
                return kind
        return ""

    def size_of(self, name: str) -> int:
        """Bytes of the variable `name`, 0 where the declaration does not say."""
        return self._sizes.get(name, 0)

    def table_of(self, name: str) -> str:
        """The module's variable that register `name` always points into, whatever the index; "" where that is not sure.

        Sure is what is that variable's address, or such a pointer plus something that is none, on every way to `name`.
        """
        found: set[str] = set()
        return found.pop() if self._points(name, found, set()) and len(found) == 1 else ""

    def _points(self, name: str, found: set[str], seen: set[str]) -> bool:
        if self._symbols.get(name) is Origin.MODULE:
            found.add(name)
            return True
        if name in seen:
            return True  # a loop: its other definitions decide
        seen.add(name)
        definitions = self.definitions.get(name, [])
        return bool(definitions) and all(self._points_by(instruction, found, seen) for instruction in definitions)

    def _points_by(self, instruction: Instruction, found: set[str], seen: set[str]) -> bool:
        sources = [operand for operand in instruction.operands[1:] if not isinstance(operand, Immediate)]
        names = [operand.text for operand in sources if isinstance(operand, Name)]
        if len(names) != len(sources):
            return False
        if instruction.root in ("mov", "cvta") and len(names) == 1:
            return self._points(names[0], found, seen)
        if instruction.root != "add":
            return False
        pointers = [name for name in names if Origin.MODULE in self.origins(name)]
        return len(pointers) == 1 and self._points(pointers[0], found, seen)

    def origins(self, name: str | None) -> frozenset[Origin]:
        """Everything that the value of `name` may have been computed from."""
        if name is None:
            return frozenset()
        if name in self._symbols:
            return frozenset({self._symbols[name]})
        return self._origins.get(name, frozenset())

    def only_definition(self, name: str) -> Instruction | None:
        """The one instruction that writes `name`, None when there are more or it is written under a condition."""
        found = self.definitions.get(name, [])
        return found[0] if len(found) == 1 and found[0].guard is None else None

    def _solve(self, function: Function) -> None:
        instructions = function.instructions()
        changed = True
        while changed:
            changed = False
            for instruction in instructions:
                origins = self._result(instruction)
                for name in destinations(instruction):
                    known = self._origins.get(name, frozenset())
                    if not origins <= known:
                        self._origins[name] = known | origins
                        changed = True

    def _result(self, instruction: Instruction) -> frozenset[Origin]:
        if instruction.root in _LOADS:
            return frozenset({Origin.PARAMETER if "param" in instruction.parts else Origin.MEMORY})
        found: set[Origin] = set()
        sources = [frozenset[Origin]().union(*map(self.origins, registers(o))) for o in instruction.operands[1:]]
        found.update(*sources)
        if instruction.root == "sub" and all(Origin.MODULE in source for source in sources):
            found.remove(Origin.MODULE)  # the distance of two pointers is none
        if instruction.root == "call":
            found.add(Origin.MEMORY)
        return frozenset(found)
