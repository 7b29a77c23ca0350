"""Rewriting a kernel's PTX so that every access to global memory goes through its tenant's color translation.

The text is edited in place: what is no access stays as it was, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from missile.coloring.carried import Carried, Slot
from missile.coloring.shape import CONSTANTS, Escape, Field, Shape
from missile.compiler.ptx.access import Access, AccessKind, global_accesses
from missile.compiler.ptx.edits import Edit, apply, lines
from missile.compiler.ptx.flow import Flow
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.placing import place_early
from missile.compiler.ptx.syntax import Function, Module, Name
from missile.compiler.ptx.translate import Emitter, module_declarations, parameter, prologue
from missile.compiler.ptx.unrolling import MOST_STATEMENTS
from missile.compiler.ptx.window_code import WindowEmitter
from missile.errors import MisuseError, UnsupportedError

__all__ = ["USUAL", "Placement", "Rewritten", "rewrite"]


class Placement(StrEnum):
    """Where an address is translated."""

    ACCESS = "access"  # right before each access
    DEFINITION = "definition"  # where the address is computed, once for all its accesses; else right before the access
    EARLY = "early"  # the lookup as early in the block as it can be, so that its latency passes with others
    KEPT = "kept"  # the same, and in loops a lookup is made again only where it is another
    WINDOWS = "windows"  # early, and accesses that differ by constants share a lookup; EARLY where the form can't
    CARRIED = (
        "carried"  # windows, and lookups outside of loops go to what the launch carries; WINDOWS where it does not
    )


USUAL = Placement.WINDOWS
"""For kernels that nothing was measured of."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """ptx: the new text. accesses: how many were translated, by kind. translations: how many were written for them."""

    ptx: str
    accesses: dict[AccessKind, int]
    translations: int


def rewrite(
    source: str,
    shape: Shape,
    *,
    name: str = "",
    placement: Placement = USUAL,
    aligned: Sequence[int] = (),
    carried: Carried | None = None,
    unroll: int = MOST_STATEMENTS,
) -> Rewritten:
    """Translate every access to global memory in the PTX text `source` by translations of `shape`.

    aligned: bytes that each parameter is a multiple of, in their order, for all launches; 1 for those that are not given.
    Windows rely on it for what they compute, not for where it lands. carried: what all launches carry behind the tenant's
    constants (`Carried.constants`), which `Placement.CARRIED` looks things up in; None: nothing. unroll: windows write loops
    of known length out where that takes at most so many statements.
    Every entry point then takes one more parameter, the last: the tenant's constants (`TenantMemory.constants`), by value.
    UnsupportedError naming the kernel for what can't be translated; MisuseError for PTX that was rewritten already.
    """
    module = parse(source, name)
    if any(parameter.name == CONSTANTS for function in module.functions for parameter in function.parameters):
        raise MisuseError(f"Kernel {name or module.entries[0]!r} is colored already.")
    if "missile_" in source:
        raise UnsupportedError(f"Kernel {name!r} has names that begin with 'missile_', which translations use.")
    edits = [Edit(module.head_end, module.head_end, "".join(f"\n{line}" for line in module_declarations(shape)))]
    counts: dict[AccessKind, int] = {}
    translations = 0
    for function in module.functions:
        if function.body is None:
            continue
        accesses = global_accesses(module, function)
        _check(function, accesses, shape)
        edits.append(_parameter(function, Field.BYTES if carried is None else carried.nbytes))
        for access in accesses:
            if not access.table:
                counts[access.kind] = counts.get(access.kind, 0) + 1
        made, written = _function(module, function, accesses, shape, placement, aligned, carried, unroll)
        edits += made
        translations += written
    return Rewritten(apply(source, edits), counts, translations)


def _parameter(function: Function, nbytes: int) -> Edit:
    where, constants = function.parameters_end, parameter(nbytes)
    added = f",\n\t{constants}\n" if function.parameters else constants
    return Edit(where, where, added if function.listed else f"({added})")


def _check(function: Function, accesses: Iterable[Access], shape: Shape) -> None:
    if accesses and not function.entry:
        raise UnsupportedError(
            f"Kernel {function.name!r} can't be colored: it is a function that kernels call, and touches global memory."
        )
    piece = shape.layout.piece_bytes
    for access in accesses:
        # An access is aligned to its size, or the GPU faults: so one that is no larger than a piece lies in one.
        if access.nbytes > piece:
            raise UnsupportedError(
                f"Kernel {function.name!r} can't be colored: {access.instruction.opcode} touches {access.nbytes} bytes, "
                f"memory is colored by {piece}."
            )


def _function(
    module: Module,
    function: Function,
    accesses: tuple[Access, ...],
    shape: Shape,
    placement: Placement,
    aligned: Sequence[int],
    carried: Carried | None,
    unroll: int,
) -> tuple[list[Edit], int]:
    flow = Flow(module, function)
    emitter = WindowEmitter(shape)
    edits: list[Edit] = []
    translated = [access for access in accesses if not access.table]
    for access in accesses:
        if access.table:
            last = access.table_bytes - access.nbytes
            assert access.address.base is not None
            code, held = emitter.hold(access.address.base, access.address.offset, access.table, last)
            edits.append(Edit(access.instruction.start, access.instruction.start, lines(code)))
            edits.append(Edit(access.address.start, access.address.end, f"[{held}]"))
    # Where escapes are counted, only accesses that are made may be: at a definition that is not known yet.
    start: list[str] = []
    if placement is Placement.ACCESS or shape.escape is not Escape.GUARD:
        made, written = _at_accesses(translated, flow, emitter)
    else:
        made, start, written = place_early(
            module.source,
            function,
            translated,
            flow,
            emitter,
            hoist=placement is not Placement.DEFINITION,
            keep=placement is Placement.KEPT,
            aligned={p.name: unit for p, unit in zip(function.parameters, aligned, strict=False)}
            if placement in (Placement.WINDOWS, Placement.CARRIED) and shape.window_units
            else None,
            units=shape.window_units,
            slots=_slots(function, carried) if placement is Placement.CARRIED else {},
            address_bits=64 if shape.wide else 32,
            unroll=unroll,
        )
    edits += made
    head = [*emitter.declarations(), *start, *(prologue(shape) if function.entry and accesses else [])]
    if head:
        where = function.behind_declarations
        edits.append(Edit(where, where, "\n\t" + "\n\t".join(head)))
    return edits, written


def _slots(function: Function, carried: Carried | None) -> dict[str, Slot]:
    """By the name of the parameter."""
    return {} if carried is None else {function.parameters[s.argument].name: s for s in carried.slots}


def _at_accesses(accesses: Iterable[Access], flow: Flow, emitter: Emitter) -> tuple[list[Edit], int]:
    """Each access translates its address itself, right before it."""
    edits: list[Edit] = []
    for access in accesses:
        assert access.address.base is not None
        guard, size = _condition(access, flow)
        code, physical = emitter.translate(access.address.base, access.address.offset, guard=guard, size=size)
        edits.append(Edit(access.instruction.start, access.instruction.start, lines(code)))
        edits.append(Edit(access.address.start, access.address.end, f"[{physical}]"))
    return edits, len(edits) // 2


def _condition(access: Access, flow: Flow) -> tuple[str, str]:
    """The predicate under which `access` is made, and the register with its size where that may be 0; "" for neither."""
    instruction = access.instruction
    guard = "" if instruction.guard is None else f"{'!' if instruction.guard.negated else ''}{instruction.guard.text}"
    if access.kind is not AccessKind.COPY or len(instruction.operands) < 4:
        return guard, ""
    last = instruction.operands[3]
    is_size = isinstance(last, Name) and flow.type_of(last.text)[1:] == "32"
    return guard, last.text if is_size and isinstance(last, Name) else ""
