"""An interpreter for the integer arithmetic of one thread: which addresses a kernel touches, rewritten or not.

It follows integers, predicates and branches exactly. All else (floating point, shuffles, matrix units) gives an unknown
value, and an unknown value that decides a branch or becomes an address is an error. Loads from global and shared memory
give the words that the thread is run with, one after another, so that two versions of a kernel can be run on the same data.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from missile.compiler.ptx.access import AccessKind, global_accesses
from missile.compiler.ptx.flow import destinations
from missile.compiler.ptx.syntax import (
    Address,
    Declaration,
    Function,
    Immediate,
    Instruction,
    Label,
    Module,
    Name,
    Operand,
    Pair,
    Vector,
)
from missile.compiler.ptx.translate import SHARED_TABLE
from missile.errors import InternalError, UnsupportedError

__all__ = ["Thread", "Touch", "evaluate", "fixed_width", "run_thread"]

Value = int | None  # None: unknown

_PACKED = re.compile(r"[usb]\d+x2")
_STEPS = 2_000_000
_SHARED_BASE = 1 << 20
_APART = 1 << 20
_FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64", "tf32")


@dataclass(frozen=True, slots=True)
class Touch:
    """One global access. address: as the instruction computed it. made: False for a copy of nothing, which reads nothing."""

    kind: AccessKind
    address: int
    made: bool = True


@dataclass(frozen=True, slots=True)
class Thread:
    """Where a thread stands and what it is given.

    parameters: the arguments, little-endian; a tenant's constants are the last of a rewritten kernel. table: what lies in
    global memory at `table_address` (a translation's table). data: the n-th word that the thread loads (not from the table).
    """

    parameters: Sequence[bytes]
    thread: tuple[int, int, int] = (0, 0, 0)
    block: tuple[int, int, int] = (0, 0, 0)
    threads: tuple[int, int, int] = (128, 1, 1)
    blocks: tuple[int, int, int] = (1, 1, 1)
    table: bytes = b""
    table_address: int = 0
    data: Callable[[int], int] = field(default=lambda _: 0)


class Trapped(Exception):
    """The thread reached `trap`."""


def run_thread(module: Module, function: Function, thread: Thread) -> tuple[Touch, ...]:
    """The accesses to global memory that `thread` makes in `function`, in order; those to its table left out.

    UnsupportedError where an address or a branch depends on a value that is not followed. Trapped at a trap.
    """
    return _Run(module, function, thread).run()


class _Run:
    def __init__(self, module: Module, function: Function, thread: Thread) -> None:
        self._function = function
        self._thread = thread
        self._registers: dict[str, Value] = {}
        self._code: list[Instruction] = []
        self._labels: dict[str, int] = {}
        for statement in function.flat():
            if isinstance(statement, Instruction):
                self._code.append(statement)
            elif isinstance(statement, Label):
                self._labels[statement.name] = len(self._code)
        self._accesses = {a.instruction.start: a.kind for a in global_accesses(module, function)}
        self._symbols: Mapping[str, int] = _symbols(module, function)
        self._parameters = {p.name: value for p, value in zip(function.parameters, thread.parameters, strict=True)}
        self._touches: list[Touch] = []
        self._loaded = 0
        self._specials = {
            f"%{name}.{axis}": triple[index]
            for name, triple in (
                ("tid", thread.thread),
                ("ctaid", thread.block),
                ("ntid", thread.threads),
                ("nctaid", thread.blocks),
            )
            for index, axis in enumerate("xyz")
        }

    def run(self) -> tuple[Touch, ...]:
        position = 0
        for _ in range(_STEPS):
            if position >= len(self._code):
                return tuple(self._touches)
            instruction = self._code[position]
            position += 1
            if instruction.guard is not None:
                allowed = self._read(instruction.guard, 1)
                if allowed is None and instruction.root in ("bra", "ret", "exit", "trap"):
                    raise self._lost(instruction, "branches on")
                if allowed == 0:
                    continue
            match instruction.root:
                case "bra":
                    target = instruction.operands[0]
                    assert isinstance(target, Name)
                    position = self._labels[target.text]
                case "ret" | "exit":
                    return tuple(self._touches)
                case "trap":
                    raise Trapped
                case _:
                    self._step(instruction)
        raise InternalError(f"Kernel {self._function.name!r} did not end within {_STEPS} steps.")

    # --- one instruction
    def _step(self, instruction: Instruction) -> None:
        if instruction.start in self._accesses:
            self._touch(instruction)
            return
        if instruction.root == "ld":
            self._load_own(instruction)
            return
        root, parts, operands = instruction.root, instruction.parts, instruction.operands
        if root == "mov" and len(operands) == 2:
            self._move(operands[0], operands[1], _width(parts[-1]))
            return
        if root == "setp":
            self._compare(instruction)
            return
        if _PACKED.fullmatch(parts[-1]) and root in ("add", "sub") and len(operands) == 3:
            self._add_packed(operands, 1 if root == "add" else -1)
            return
        handler = _ARITHMETIC.get(root)
        if handler is None or _PACKED.fullmatch(parts[-1]) or any(part in _FLOATS for part in parts) or not operands:
            self._forget(instruction)
            return
        width = _width(parts[-1])
        signed = parts[-1].startswith("s")
        target = operands[0]
        if not isinstance(target, Name):
            self._forget(instruction)
            return
        values = [self._read(operand, _operand_width(root, place, width)) for place, operand in enumerate(operands[1:])]
        if root == "selp":
            chosen = values[2]
            self._registers[target.text] = None if chosen is None else values[0] if chosen else values[1]
            return
        if any(value is None for value in values):
            self._registers[target.text] = None
            return
        known = [value for value in values if value is not None]
        result, bits = handler(parts, known, width, signed)
        self._registers[target.text] = result & ((1 << bits) - 1)

    def _add_packed(self, operands: Sequence[Operand], sign: int) -> None:
        """Two halves of a word at once."""
        target = operands[0]
        assert isinstance(target, Name)
        left, right = (self._read(operand, 32) for operand in operands[1:3])
        self._registers[target.text] = None
        if left is not None and right is not None:
            halves = [(left >> at) + sign * (right >> at) & 0xFFFF for at in (0, 16)]
            self._registers[target.text] = halves[0] | halves[1] << 16

    def _touch(self, instruction: Instruction) -> None:
        kind = self._accesses[instruction.start]
        which = 1 if kind is AccessKind.COPY else 0
        address = [o for o in instruction.operands if isinstance(o, Address)][which]
        where = self._where(address, instruction)
        thread = self._thread
        inside = thread.table_address <= where < thread.table_address + len(thread.table)
        if inside and kind is AccessKind.LOAD:
            start = where - thread.table_address
            size = _width(instruction.parts[-1]) // 8
            self._spread_words(instruction.operands[0], thread.table[start:], size)
            return
        sizes = instruction.operands[3:4] if kind is AccessKind.COPY else ()
        made = all(isinstance(operand, Immediate) or self._read(operand, 32) != 0 for operand in sizes)
        self._touches.append(Touch(kind, where, made))
        if kind in (AccessKind.LOAD, AccessKind.ATOMIC):
            self._load_data(instruction)

    def _load_data(self, instruction: Instruction) -> None:
        width = _width(instruction.parts[-1])
        for name in destinations(instruction):
            self._registers[name] = self._thread.data(self._loaded) & ((1 << width) - 1)
            self._loaded += 1

    def _load_own(self, instruction: Instruction) -> None:
        """Parameters and the table are known."""
        (address,) = [o for o in instruction.operands if isinstance(o, Address)]
        size = _width(instruction.parts[-1]) // 8
        parts = instruction.parts
        if "param" in parts and address.base in self._parameters:
            self._spread_words(instruction.operands[0], self._parameters[address.base][address.offset :], size)
        elif "param" in parts:  # through a register
            where = self._where(address, instruction)
            name, start = next((n, where - at) for n, at in self._symbols.items() if 0 <= where - at < _APART)
            self._spread_words(instruction.operands[0], self._parameters[name][start:], size)
        elif "shared" in parts and SHARED_TABLE in self._symbols:
            start = self._where(address, instruction) - self._symbols[SHARED_TABLE]
            if 0 <= start < len(self._thread.table):
                self._spread_words(instruction.operands[0], self._thread.table[start:], size)
            else:
                self._load_data(instruction)
        elif "shared" in parts:
            self._load_data(instruction)
        else:
            self._forget(instruction)

    def _spread_words(self, target: Operand, data: bytes, size: int) -> None:
        names = [target] if isinstance(target, Name) else list(target.items) if isinstance(target, Vector) else []
        if len(data) < size * len(names):
            raise InternalError(f"Kernel {self._function.name!r} reads past the end of its table or constants.")
        for index, name in enumerate(names):
            assert isinstance(name, Name)
            self._registers[name.text] = int.from_bytes(data[index * size : (index + 1) * size], "little")

    def _move(self, target: Operand, source: Operand, width: int) -> None:
        if isinstance(target, Vector):
            value = self._read(source, width)
            part = width // len(target.items)
            for index, item in enumerate(target.items):
                assert isinstance(item, Name)
                mask = (1 << part) - 1
                self._registers[item.text] = None if value is None else value >> (index * part) & mask
        elif isinstance(target, Name):
            self._registers[target.text] = self._read(source, width)

    def _compare(self, instruction: Instruction) -> None:
        parts, operands = instruction.parts, instruction.operands
        kind = parts[-1]
        target = operands[0]
        names = [target.first, target.second] if isinstance(target, Pair) else [target]
        left, right = (self._read(operand, _width(kind)) for operand in operands[1:3])
        outcome: Value = None
        if left is not None and right is not None and kind not in _FLOATS:
            width = _width(kind)
            if kind.startswith("s"):
                left, right = _signed(left, width), _signed(right, width)
            comparison = _COMPARISONS.get(parts[1])
            outcome = None if comparison is None else int(comparison(left, right))
        if len(operands) > 3 and outcome is not None:
            other = self._read(operands[3], 1)
            combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.get(parts[2])
            outcome = None if other is None or combine is None else combine(outcome, other)
        for name, value in zip(names, (outcome, None if outcome is None else 1 - outcome), strict=False):
            assert isinstance(name, Name)
            self._registers[name.text] = value

    # --- operands
    def _read(self, operand: Operand, width: int) -> Value:
        mask = (1 << width) - 1
        match operand:
            case Immediate(value=value, bits=bits):
                found = bits if value is None else value
                return None if found is None else found & mask
            case Name(text=text, negated=negated):
                if text in self._specials:
                    return self._specials[text]
                if text in self._symbols:
                    return self._symbols[text]
                value = self._registers.get(text)
                if value is None:
                    return None
                return 1 - value if negated else value & mask
            case Vector(items=items):
                part = width // len(items)
                values = [self._read(item, part) for item in items]
                if any(value is None for value in values):
                    return None
                return sum((value or 0) << (index * part) for index, value in enumerate(values))
            case _:
                return None

    def _where(self, address: Address, instruction: Instruction) -> int:
        base: Value = 0
        if address.base is not None:
            base = self._read(Name(address.base, 0, 0), 64)
        if base is None:
            raise self._lost(instruction, "takes as an address")
        return base + address.offset & (1 << 64) - 1

    def _forget(self, instruction: Instruction) -> None:
        for name in destinations(instruction):
            self._registers[name] = None

    def _lost(self, instruction: Instruction, does: str) -> UnsupportedError:
        return UnsupportedError(
            f"Kernel {self._function.name!r}: {instruction.opcode} in line {instruction.line} {does} a value that the "
            "interpreter does not follow."
        )


def _symbols(module: Module, function: Function) -> dict[str, int]:
    """Addresses of parameters and variables: far from each other."""
    names = []
    for declaration in (*module.variables, *function.flat()):
        if isinstance(declaration, Declaration) and declaration.space != "reg":
            names += [name for name, _ in declaration.names]
    names += [parameter.name for parameter in function.parameters]
    return {name: _SHARED_BASE + index * _APART for index, name in enumerate(names)}


def evaluate(instruction: Instruction, values: Sequence[int]) -> tuple[int, int] | None:
    """What an arithmetic instruction or a comparison of integers makes of `values`, and its width; None for others.

    values: of its operands behind the first, each cut to the width that it is read at.
    """
    parts = instruction.parts
    width, signed = _width(parts[-1]), parts[-1].startswith("s")
    if instruction.root == "setp":
        left, right = (_signed(value, width) if signed else value for value in values[:2])
        comparison = _COMPARISONS.get(parts[1])
        return None if comparison is None or len(values) != 2 else (int(comparison(left, right)), 1)
    handler = _ARITHMETIC.get(instruction.root)
    if handler is None or _PACKED.fullmatch(parts[-1]) or any(part in _FLOATS for part in parts):
        return None
    result, bits = handler(parts, list(values), width, signed)
    return result & ((1 << bits) - 1), bits


# --- arithmetic: (parts of the opcode, operands, width, signed) -> (result, its width)
Handler = Callable[[tuple[str, ...], list[int], int, bool], tuple[int, int]]


def _signed(value: int, width: int) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


def _width(kind: str) -> int:
    if kind == "pred":
        return 1
    digits = "".join(c for c in kind[1:] if c.isdigit())
    return int(digits) if digits and kind[0] in "bsuf" else 32


def fixed_width(root: str, place: int) -> int | None:
    """Width at which operand `place` of instruction `root` is read whatever its type: counts and positions are words,
    predicates bits. None: it goes by the type."""
    if (root in ("shl", "shr") and place == 1) or (root == "shf" and place == 2):
        return 32
    if (root == "bfe" and place > 0) or (root == "bfi" and place > 1):
        return 32
    return 1 if root == "selp" and place == 2 else None


def _operand_width(root: str, place: int, width: int) -> int:
    return fixed_width(root, place) or (64 if root in ("mad", "cvt") else width)


def _plain(function: Callable[[int, int], int]) -> Handler:
    def run(parts: tuple[str, ...], v: list[int], width: int, signed: bool) -> tuple[int, int]:
        left, right = (_signed(x, width) for x in v) if signed else v
        return function(left, right), width

    return run


def _multiply(parts: tuple[str, ...], v: list[int], width: int, signed: bool) -> tuple[int, int]:
    mask = (1 << width) - 1
    left, right = (_signed(x, width) if signed else x & mask for x in v[:2])
    product = left * right
    add = v[2] if len(v) > 2 else 0
    if "wide" in parts:
        return product + add, 2 * width
    if "hi" in parts:
        return (product >> width) + add, width
    return product + add, width


def _divide(parts: tuple[str, ...], v: list[int], width: int, signed: bool) -> tuple[int, int]:
    left, right = (_signed(x, width) for x in v) if signed else v
    if right == 0:
        return (1 << width) - 1, width
    quotient = abs(left) // abs(right) * (-1 if (left < 0) != (right < 0) else 1)
    return (quotient if parts[0] == "div" else left - quotient * right), width


def _shift(parts: tuple[str, ...], v: list[int], width: int, signed: bool) -> tuple[int, int]:
    count = min(v[1], width)
    if parts[0] == "shl":
        return v[0] << count, width
    return (_signed(v[0], width) if signed else v[0]) >> count, width


def _funnel(parts: tuple[str, ...], v: list[int], width: int, signed: bool) -> tuple[int, int]:
    count = v[2] & 31 if "wrap" in parts else min(v[2], 32)
    both = v[1] << 32 | v[0]
    return (both >> count if parts[1] == "r" else both << count >> 32), 32


def _field(parts: tuple[str, ...], v: list[int], width: int, signed: bool) -> tuple[int, int]:
    if parts[0] == "bfe":
        start, length = v[1] & 255, v[2] & 255
        value = _signed(v[0], width) >> start if signed else v[0] >> start
        if length == 0:
            return 0, width
        value &= (1 << length) - 1
        return (_signed(value, length) if signed else value), width
    start, length = v[2] & 255, v[3] & 255
    mask = (((1 << length) - 1) << start) & ((1 << width) - 1)
    return (v[0] << start & mask) | (v[1] & ~mask), width


def _convert(parts: tuple[str, ...], v: list[int], width: int, signed: bool) -> tuple[int, int]:
    del width, signed
    source, target = parts[-1], parts[-2]
    value = v[0] & ((1 << _width(source)) - 1)
    return (_signed(value, _width(source)) if source.startswith("s") else value), _width(target)


def _unary(function: Callable[[int], int]) -> Handler:
    return lambda parts, v, width, signed: (function(_signed(v[0], width) if signed else v[0]), width)


def _permute(parts: tuple[str, ...], v: list[int], width: int, signed: bool) -> tuple[int, int]:
    both = v[1] << 32 | v[0]
    out = 0
    for place in range(4):
        chosen = v[2] >> (4 * place) & 15
        byte = both >> (8 * (chosen & 7)) & 255
        # The selector's highest bit takes the byte's sign instead.
        out |= (255 * (byte >> 7) if chosen & 8 else byte) << (8 * place)
    return out, 32


def _lop3(parts: tuple[str, ...], v: list[int], width: int, signed: bool) -> tuple[int, int]:
    out = 0
    for bit in range(32):
        place = (v[0] >> bit & 1) << 2 | (v[1] >> bit & 1) << 1 | (v[2] >> bit & 1)
        out |= (v[3] >> place & 1) << bit
    return out, 32


_ARITHMETIC: dict[str, Handler] = {
    "add": _plain(operator.add),
    "sub": _plain(operator.sub),
    "and": _plain(operator.and_),
    "or": _plain(operator.or_),
    "xor": _plain(operator.xor),
    "min": _plain(min),
    "max": _plain(max),
    "mul": _multiply,
    "mad": _multiply,
    "div": _divide,
    "rem": _divide,
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel,
    "bfe": _field,
    "bfi": _field,
    "cvt": _convert,
    "cvta": _unary(lambda x: x),
    "not": _unary(lambda x: ~x),
    "neg": _unary(lambda x: -x),
    "abs": _unary(abs),
    "popc": lambda parts, v, width, signed: (v[0].bit_count(), 32),
    "clz": lambda parts, v, width, signed: (width - v[0].bit_length(), 32),
    "lop3": _lop3,
    "prmt": _permute,
    "selp": _plain(lambda a, b: a),
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}
