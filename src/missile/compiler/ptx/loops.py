"""Which addresses a kernel touches, as sums of values that are not known (`sums.py`), also in loops that run a number of
times that is known: those are followed as they run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from missile.compiler.ptx.access import Access, AccessKind
from missile.compiler.ptx.blocks import Blocks
from missile.compiler.ptx.facts import facts_of
from missile.compiler.ptx.flow import destinations, registers
from missile.compiler.ptx.sums import Sum, Values
from missile.compiler.ptx.symbolic import Machine
from missile.compiler.ptx.syntax import Function, Immediate, Instruction, Name, Scope

__all__ = ["Loop", "Trace", "Visit", "follow"]

_MOST = 1 << 12  # iterations


@dataclass(frozen=True, slots=True)
class Visit:
    """One access in one iteration. made: False where it is not, for all threads. conditions: what has to be set for it."""

    address: Sum
    made: bool
    conditions: tuple[Sum, ...] = ()


@dataclass(frozen=True, slots=True)
class Loop:
    """block: its body. count: iterations. visits: for each access in the body one `Visit` an iteration."""

    block: int
    count: int
    visits: Mapping[Access, Sequence[Visit]]


@dataclass(frozen=True, slots=True)
class Trace:
    """visits: of accesses outside of loops of one block. loops: those that could be followed."""

    visits: Mapping[Access, Visit]
    loops: Sequence[Loop]


def follow(
    function: Function,
    blocks: Blocks,
    accesses: Sequence[Access],
    values: Values,
    aligned: Mapping[str, int],
    bits: int = 64,
) -> Trace:
    """What `accesses` touch. Loops are followed whose body is one block and whose end depends on constants alone.

    aligned: bytes that pointers among the parameters are multiples of, by name. bits: of an address that are looked at, its
    lowest. Addresses are mostly 32 bits that were extended, and whether those wrap matters for the upper half alone.
    """
    statements = {s.start: s for s in function.body or () if isinstance(s, Instruction | Scope)}
    by_start = {access.instruction.start: access for access in accesses}
    writes = Counter(name for unit in blocks.units for name in unit.writes)
    machine = Machine(values, aligned=aligned)
    visits: dict[Access, Visit] = {}
    loops = []
    for block in range(blocks.count):
        body = [statements[unit.start] for unit in blocks.units_of(block)]
        sources = blocks.sources(block)
        if block in sources:
            inside = [by_start[s.start] for s in body if s.start in by_start]
            loop = _follow(block, body, inside, machine, bits) if sources == {block} else None
            if loop is not None:
                loops.append(loop)
            for statement in body:
                _forget(machine, statement)
            continue
        if sources:
            # Reached on several ways: what is written once only is the same on each, or not there.
            machine.registers = {name: held for name, held in machine.registers.items() if writes[name] <= 1}
        for statement in body:
            if isinstance(statement, Instruction) and statement.start in by_start:
                visits[by_start[statement.start]] = _visit(by_start[statement.start], machine, bits)
                machine.forget(statement)
            else:
                _step(machine, statement)
    return Trace(visits, loops)


def _step(machine: Machine, statement: Instruction | Scope) -> None:
    if isinstance(statement, Scope):
        _forget(machine, statement)
    elif statement.root not in ("bra", "ret", "exit"):
        machine.run(statement)


def _forget(machine: Machine, statement: Instruction | Scope) -> None:
    for instruction in (statement,) if isinstance(statement, Instruction) else _inner(statement):
        machine.forget(instruction)


def _inner(scope: Scope) -> Iterator[Instruction]:
    for statement in scope.statements:
        if isinstance(statement, Instruction):
            yield statement
        elif isinstance(statement, Scope):
            yield from _inner(statement)


def _follow(
    block: int, statements: Sequence[Instruction | Scope], accesses: Sequence[Access], machine: Machine, bits: int
) -> Loop | None:
    last = statements[-1]
    if not isinstance(last, Instruction) or last.root != "bra" or last.guard is None:
        return None
    needed = _needed(statements, last, accesses)
    own = Machine(machine.values, aligned=machine.aligned)
    own.registers = {name: held for name, held in machine.registers.items() if name in needed}
    by_start = {access.instruction.start: access for access in accesses}
    visits: dict[Access, list[Visit]] = {access: [] for access in accesses}
    code = [s for s in statements[:-1] if isinstance(s, Scope) or s.start in by_start or _writes(s) & needed]
    before: list[dict[str, Sum]] = []
    for count in range(1, _MOST + 1):
        before.append(dict(own.registers))
        for statement in code:
            access = by_start.get(statement.start)
            if access is not None and isinstance(statement, Instruction):
                visits[access].append(_visit(access, own, bits))
                own.forget(statement)
            else:
                _step(own, statement)
        again = own.read(last.guard, 1).known
        if again is None:
            return None
        if not again:
            for access, seen in visits.items():
                if len({visit.address.terms for visit in seen if visit.made}) > 1:
                    visits[access] = _where_made(access, seen, before, code, own, bits)
            return Loop(block, count, visits)
    return None


def _where_made(
    access: Access,
    visits: Sequence[Visit],
    before: Sequence[dict[str, Sum]],
    code: Sequence[Instruction | Scope],
    machine: Machine,
    bits: int,
) -> list[Visit]:
    """`visits` with what is known where the access is made. before: what registers hold when an iteration starts."""
    values, found = machine.values, []
    for visit, registers_then in zip(visits, before, strict=True):
        facts = facts_of(values, visit.conditions) if visit.made else []
        if not facts:
            found.append(visit)
            continue
        again = Machine(values, aligned=machine.aligned, facts=facts)
        again.registers = dict(registers_then)
        for statement in code:
            if statement.start == access.instruction.start:
                break
            _step(again, statement)
        found.append(replace(visit, address=_visit(access, again, bits).address))
    return found


def _visit(access: Access, machine: Machine, bits: int) -> Visit:
    assert access.address.base is not None
    base = machine.read(Name(access.address.base, 0, 0), 64)
    conditions = []
    guard = access.instruction.guard
    if guard is not None:
        conditions.append(machine.read(guard, 1))
    operands = access.instruction.operands
    if access.kind is AccessKind.COPY and len(operands) > 3 and not isinstance(operands[3], Immediate):
        conditions.append(machine.read(operands[3], 32))
    made = all(condition.known != 0 for condition in conditions)
    address = machine.values.cut(base.plus(Sum.of(64, access.address.offset)), bits)
    return Visit(address, made, tuple(conditions))


def _writes(statement: Instruction) -> set[str]:
    return set(destinations(statement))


def _needed(statements: Sequence[Instruction | Scope], last: Instruction, accesses: Sequence[Access]) -> set[str]:
    """Registers that addresses, conditions of accesses and the end of the loop are computed from."""
    assert last.guard is not None
    needed = {last.guard.text}
    for access in accesses:
        assert access.address.base is not None
        needed.add(access.address.base)
        if access.instruction.guard is not None:
            needed.add(access.instruction.guard.text)
        if access.kind is AccessKind.COPY:
            needed.update(name for operand in access.instruction.operands[3:4] for name in registers(operand))
    simple = [s for s in statements if isinstance(s, Instruction)]
    while True:
        more: set[str] = set()
        for statement in simple:
            if _writes(statement) & needed:
                more.update(name for operand in statement.operands[1:] for name in registers(operand))
                if statement.guard is not None:
                    more.add(statement.guard.text)
        if more <= needed:
            return needed
        needed |= more
