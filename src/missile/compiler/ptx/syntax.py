"""What PTX text consists of, as far as Missile has to know: functions, instructions, operands.

Every piece carries its place in the source. Rewriting edits the source at such places; nothing is printed from the tree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "Address",
    "Declaration",
    "Function",
    "Immediate",
    "Instruction",
    "Label",
    "Module",
    "Name",
    "Operand",
    "Other",
    "Pair",
    "Parameter",
    "Scope",
    "Statement",
    "Vector",
]


@dataclass(frozen=True, slots=True)
class Name:
    """A register, a special register (`%tid.x`), a label or a symbol. negated: `!%p1`."""

    text: str
    start: int
    end: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Immediate:
    """A number as written. value: the integer, None for a floating-point constant. bits: the pattern of a 0f or 0d one."""

    text: str
    start: int
    end: int
    value: int | None
    bits: int | None = None


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b, ...}`, or the arguments of a call in parentheses."""

    items: tuple[Operand, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`. base: a register or symbol, None for an absolute address. extra: what else stands in the brackets.

    start, end: the place of the brackets and what is between them.
    """

    base: str | None
    offset: int
    start: int
    end: int
    extra: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """`a|b`, two destinations of one instruction."""

    first: Operand
    second: Operand
    start: int
    end: int


Operand = Name | Immediate | Vector | Address | Pair


@dataclass(frozen=True, slots=True)
class Instruction:
    """`@guard opcode.modifiers operands;`. start: of the guard or opcode; end: behind the semicolon."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Name | None
    start: int
    end: int
    line: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The opcode cut at its dots: ("ld", "global", "v4", "b32")."""
        return tuple(self.opcode.split("."))

    @property
    def root(self) -> str:
        return self.opcode.split(".", 1)[0]


@dataclass(frozen=True, slots=True)
class Label:
    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Declaration:
    """A declared register, or a variable of a state space. space: "reg", "shared", "local", "param", "global", "const".

    names: as declared; `%r<5>` stands for `%r0` to `%r4` and is the one name "%r" with count 5.
    type: "b32", "pred". nbytes: of a variable that is an array, 0 where not said.
    """

    space: str
    type: str
    names: tuple[tuple[str, int], ...]
    start: int
    end: int
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Other:
    """A directive that changes no addresses: `.loc`, `.file`, `.pragma`, `.section`."""

    keyword: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Scope:
    """`{ ... }` inside a function: registers declared in it are seen in it only."""

    statements: tuple[Statement, ...]
    start: int
    end: int


Statement = Instruction | Label | Declaration | Other | Scope


@dataclass(frozen=True, slots=True)
class Parameter:
    """nbytes: its size. pointer: declared `.ptr .global`."""

    name: str
    type: str
    nbytes: int
    pointer: bool


@dataclass(frozen=True, slots=True)
class Function:
    """An entry point or a device function. body: None for a declaration only. body_start: behind the opening brace.

    parameters_end: where one more parameter may be added: before the closing parenthesis (listed), else behind the name.
    """

    name: str
    entry: bool
    parameters: tuple[Parameter, ...]
    body: tuple[Statement, ...] | None
    start: int
    end: int
    body_start: int = 0
    parameters_end: int = 0
    listed: bool = False

    @property
    def behind_declarations(self) -> int:
        """The place behind the declarations that the body starts with, where more may be added."""
        where = self.body_start
        for statement in self.body or ():
            if not isinstance(statement, Declaration):
                break
            where = statement.end
        return where

    def instructions(self) -> tuple[Instruction, ...]:
        """All instructions in the order of the text, those of inner scopes among them."""
        return tuple(s for s in self.flat() if isinstance(s, Instruction))

    def flat(self) -> tuple[Statement, ...]:
        """All statements in the order of the text, inner scopes opened."""
        found: list[Statement] = []

        def visit(statements: tuple[Statement, ...]) -> None:
            for statement in statements:
                if isinstance(statement, Scope):
                    visit(statement.statements)
                else:
                    found.append(statement)

        visit(self.body or ())
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Module:
    """One PTX file. head_end: behind `.address_size 64`, where declarations of the module may be added."""

    source: str
    version: tuple[int, int]
    target: str
    functions: tuple[Function, ...]
    variables: tuple[Declaration, ...]
    head_end: int
    notes: tuple[Other, ...] = field(default=())

    @property
    def entries(self) -> tuple[str, ...]:
        return tuple(function.name for function in self.functions if function.entry)
