"""Which instructions touch memory, and which of those touch global memory and so have to be translated.

Everything with an address in brackets has to be known here: an access that was overlooked would reach memory of another
tenant. What can't be translated is refused with the kernel's name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from missile.compiler.ptx.flow import Flow, Origin
from missile.compiler.ptx.syntax import Address, Function, Instruction, Module, Name
from missile.errors import UnsupportedError

__all__ = ["Access", "AccessKind", "global_accesses"]


class AccessKind(StrEnum):
    LOAD = "load"
    STORE = "store"
    COPY = "copy"  # global to shared memory, asynchronous
    ATOMIC = "atomic"
    REDUCTION = "reduction"
    PREFETCH = "prefetch"


@dataclass(frozen=True, slots=True)
class Access:
    """One access to global memory by one instruction. nbytes: what one thread touches, 0 for a prefetch.

    table: the module's own variable that a load reads through a register, as sines do, "" for all other accesses;
    table_bytes: its size. Such a load is not translated, only held within the variable.
    """

    instruction: Instruction
    kind: AccessKind
    address: Address
    nbytes: int
    table: str = ""
    table_bytes: int = 0


_ROOTS = {
    "ld": AccessKind.LOAD,
    "ldu": AccessKind.LOAD,
    "st": AccessKind.STORE,
    "atom": AccessKind.ATOMIC,
    "red": AccessKind.REDUCTION,
    "prefetch": AccessKind.PREFETCH,
}
_OWN_SPACES = frozenset(
    {"shared", "shared::cta", "shared::cluster", "local", "param", "param::entry", "param::func", "const"}
)
# Instructions with an address whose state space is shared memory whenever they say so.
_SHARED_ROOTS = frozenset({"ldmatrix", "stmatrix", "mbarrier", "mapa", "wmma", "cp", "fence", "getctarank"})
_OWN_ORIGINS = frozenset({Origin.SHARED, Origin.LOCAL, Origin.CONST})
# Refused by name: longest first.
_REFUSED = (
    ("cp.async.bulk.tensor", "copies tensors with the TMA unit"),
    ("cp.async.bulk", "copies in bulk with the TMA unit"),
    ("cp.reduce.async.bulk", "reduces in bulk with the TMA unit"),
    ("cp.reduce", "reduces in bulk with the TMA unit"),
    ("tensormap", "changes a TMA descriptor"),
    ("fence.proxy.tensormap", "uses TMA descriptors in memory"),
    ("multimem", "uses multicast addresses"),
    ("tcgen05", "uses tensor memory"),
    ("isspacep", "asks which memory an address belongs to"),
    ("suld", "uses surfaces"),
    ("sust", "uses surfaces"),
    ("sured", "uses surfaces"),
    ("tex", "uses textures"),
    ("tld4", "uses textures"),
    ("prefetchu", "prefetches a generic address"),
    ("brx", "branches through a table"),
    ("createpolicy.range", "sets a cache policy for a range of addresses"),
)
# Functions of the GPU's own runtime: it reports an assertion that failed and ends the kernel, touching nobody's memory.
_RUNTIME = frozenset({"__assertfail"})
_WIDE = {"v2": 2, "v4": 4, "v8": 8}


def global_accesses(module: Module, function: Function) -> tuple[Access, ...]:
    """The accesses of `function` to global memory, in the order of the text.

    UnsupportedError, naming the kernel, for an access that can't be translated: TMA, textures, generic addresses that
    may be global, memory of the module itself reached through a register, calls of functions that are not there.
    """
    flow = Flow(module, function)
    bodies = {f.name for f in module.functions if f.body is not None}
    found = []
    for instruction in function.instructions():
        _refuse_by_name(function, instruction)
        if instruction.root == "call":
            _check_call(function, instruction, bodies)
            continue
        access = _access(function, instruction, flow)
        if access is not None:
            found.append(access)
    return tuple(found)


def _refuse_by_name(function: Function, instruction: Instruction) -> None:
    for prefix, does in _REFUSED:
        if instruction.opcode == prefix or instruction.opcode.startswith(prefix + "."):
            raise _refusal(function, instruction, does)


def _check_call(function: Function, instruction: Instruction, bodies: set[str]) -> None:
    names = [operand.text for operand in instruction.operands if isinstance(operand, Name)]
    if not names or names[0] not in bodies | _RUNTIME:
        raise _refusal(function, instruction, f"calls {names[0] if names else 'something'!r}, whose code is not there")


def _access(function: Function, instruction: Instruction, flow: Flow) -> Access | None:
    addresses = [operand for operand in instruction.operands if isinstance(operand, Address)]
    if not addresses:
        return None
    parts = instruction.parts
    if parts[:2] == ("cp", "async") and "global" in parts:
        if len(addresses) < 2 or not isinstance(instruction.operands[1], Address):
            raise _refusal(function, instruction, "copies from an address that is not one")
        size = _copied(function, instruction)
        return _checked(Access(instruction, AccessKind.COPY, addresses[1], size), function, flow)
    if len(addresses) != 1:
        raise _refusal(function, instruction, "has more than one address")
    (address,) = addresses
    spaces = [part for part in parts[1:] if part == "global" or part in _OWN_SPACES]
    kind = _ROOTS.get(instruction.root)
    if kind is None:
        if spaces and spaces[0] != "global" and instruction.root in _SHARED_ROOTS:
            return None
        raise _refusal(function, instruction, "is no access that is known")
    if not spaces:
        origins = flow.origins(address.base)
        if origins and origins <= _OWN_ORIGINS:
            return None
        raise _refusal(function, instruction, "uses a generic address that may be global")
    if spaces[0] != "global":
        return None
    if address.base is not None and flow.is_symbol(address.base):
        return None  # a variable of the module itself
    size = 0 if kind is AccessKind.PREFETCH else _bytes(function, instruction)
    return _checked(Access(instruction, kind, address, size), function, flow)


def _checked(access: Access, function: Function, flow: Flow) -> Access:
    base = access.address.base
    if base is None:
        raise _refusal(function, access.instruction, "uses an absolute address")
    if Origin.MODULE in flow.origins(base):
        table = flow.table_of(base)
        if access.kind is AccessKind.LOAD and flow.size_of(table) >= access.nbytes:
            return replace(access, table=table, table_bytes=flow.size_of(table))
        raise _refusal(function, access.instruction, "reaches the module's own memory through a register")
    if access.address.extra:
        raise _refusal(function, access.instruction, "has an address of several parts")
    return access


def _copied(function: Function, instruction: Instruction) -> int:
    size = getattr(instruction.operands[2], "value", None) if len(instruction.operands) > 2 else None
    if not isinstance(size, int):
        raise _refusal(function, instruction, "copies a number of bytes that is not constant")
    return size


def _bytes(function: Function, instruction: Instruction) -> int:
    lanes = next((_WIDE[part] for part in instruction.parts if part in _WIDE), 1)
    kind = instruction.parts[-1]
    digits = "".join(c for c in kind[1:] if c.isdigit()) if kind[:1] in "bsuf" else ""
    if kind in ("f16x2", "bf16x2"):
        return 4 * lanes
    if kind in ("bf16",):
        return 2 * lanes
    if digits not in ("8", "16", "32", "64", "128"):
        raise _refusal(function, instruction, f"moves data of the type {kind!r}, which is not known")
    return int(digits) // 8 * lanes


def _refusal(function: Function, instruction: Instruction, does: str) -> UnsupportedError:
    return UnsupportedError(
        f"Kernel {function.name!r} can't be colored: {instruction.opcode} in line {instruction.line} {does}."
    )
