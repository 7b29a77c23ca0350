"""What instructions compute, as sums (`sums.py`): integers, predicates and what is known of both. All else is unknown.

What is unknown has a value of its own for each operation on the same operands, so that what two places compute alike is
seen to be the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from missile.compiler.ptx.blocks import is_repeatable
from missile.compiler.ptx.facts import Fact, Facts
from missile.compiler.ptx.flow import destinations
from missile.compiler.ptx.interpret import evaluate, fixed_width
from missile.compiler.ptx.sums import Sum, Values
from missile.compiler.ptx.syntax import Address, Immediate, Instruction, Name, Operand, Pair, Vector

__all__ = ["Machine"]

_PACKED = re.compile(r"[usbf]\d+x2$")
_THREADS = 1023  # largest thread number in a block's dimension
_BLOCKS = (1 << 31) - 1
_SPECIAL = {"%tid": _THREADS, "%ntid": 2 * _THREADS + 1, "%ctaid": _BLOCKS, "%nctaid": _BLOCKS, "%laneid": 31}


def _width(kind: str) -> int:
    if kind == "pred":
        return 1
    digits = re.fullmatch(r"[busf](8|16|32|64|128)", kind)
    return int(digits[1]) if digits else 0


class Machine:
    """Registers of one thread and what they hold. aligned: bytes that parameters are multiples of, by name. facts: that
    hold where what is computed matters."""

    def __init__(self, values: Values, *, aligned: Mapping[str, int], facts: Iterable[Fact] = ()) -> None:
        self.values = values
        self.aligned = aligned
        self._facts = Facts(values, facts)
        self.registers: dict[str, Sum] = {}

    def forget(self, instruction: Instruction) -> None:
        for name in destinations(instruction):
            self.registers.pop(name, None)

    def run(self, instruction: Instruction) -> None:
        """Carry out `instruction`, which is no branch."""
        guard = instruction.guard
        if guard is not None:
            taken = self.read(guard, 1).known
            if taken == 0:
                return
            if taken is None:
                self.forget(instruction)
                return
        root, parts, operands = instruction.root, instruction.parts, instruction.operands
        if root == "ld" and "param" in parts and isinstance(operands[0], Name):
            width = _width(parts[-1])
            address = operands[1]
            assert isinstance(address, Address)
            unit = self.aligned.get(address.base or "", 1) if address.offset == 0 else 1
            key = ("param", address.base, address.offset)
            self.registers[operands[0].text] = self.values.value(key, width, -unit)
        elif root == "mov" and len(operands) == 2:
            self._move(operands[0], operands[1], _width(parts[-1]))
        elif root == "setp" and isinstance(operands[0], Name | Pair):
            self._compare(instruction)
        elif not operands or not isinstance(operands[0], Name) or not is_repeatable(instruction, guarded=True):
            self.forget(instruction)
        else:
            found = self._packed(instruction) if _PACKED.match(parts[-1]) else self._arithmetic(instruction)
            if found is None:
                self.registers.pop(operands[0].text, None)
            else:
                self.registers[operands[0].text] = found

    def _extend(self, given: Sum, width: int, signed: bool) -> Sum:
        if signed and self.values.most(given) >> (given.width - 1):
            found = self._facts.extend(given, width)
            if found is not None:
                return found
        return self.values.extend(given, width, signed)

    # --- operands
    def read(self, operand: Operand, width: int) -> Sum:
        match operand:
            case Immediate(value=value, bits=bits):
                found = bits if value is None else value
                return self.values.fresh(width) if found is None else Sum.of(width, found)
            case Name(text=text, negated=negated):
                held = self._register(text, width)
                if negated:
                    return Sum.of(1, 1).plus(held, -1) if held.known is not None else self._opaque(("not", held), 1)
                return held
            case Vector(items=items):
                part = width // len(items)
                out = Sum.of(width, 0)
                for index, item in enumerate(items):
                    out = out.plus(self.values.extend(self.read(item, part), width, False).times(1 << (index * part)))
                return out
            case _:
                return self.values.fresh(width)

    def _register(self, text: str, width: int) -> Sum:
        special = _SPECIAL.get(text.split(".")[0])
        if special is not None:
            return self.values.value(text, width, special)
        held = self.registers.get(text)
        if held is None:
            # What it holds now: the same until it is written.
            held = self.values.fresh(width) if text.startswith("%") else self.values.value(("symbol", text), width)
            self.registers[text] = held
        if held.width > width:
            return self.values.cut(held, width)
        return held if held.width == width else self.values.extend(held, width, False)

    def _opaque(self, key: tuple[object, ...], width: int, ones: int | None = None) -> Sum:
        return self.values.value(key, width, ones)

    # --- instructions
    def _move(self, target: Operand, source: Operand, width: int) -> None:
        if isinstance(target, Name):
            if isinstance(source, Name) and source.text.startswith("%clock"):
                self.registers.pop(target.text, None)
                return
            self.registers[target.text] = self.read(source, width)
        elif isinstance(target, Vector):
            value = self.read(source, width)
            part = width // len(target.items)
            for index, item in enumerate(target.items):
                if isinstance(item, Name):
                    self.registers[item.text] = self._part(value, index * part, part)

    def _part(self, value: Sum, start: int, width: int) -> Sum:
        """Bits of `value` from `start` on."""
        moved = self.values.shifted(value, start) if start else value
        if moved is not None:
            return self.values.cut(moved, width)
        return self._opaque(("part", value, start), width, self.values.bits(value) >> start)

    def _compare(self, instruction: Instruction) -> None:
        parts, operands = instruction.parts, instruction.operands
        width = _width(parts[-1])
        target = operands[0]
        names = [target.first, target.second] if isinstance(target, Pair) else [target]
        for name in names:
            if isinstance(name, Name):
                self.registers.pop(name.text, None)
        if not width or parts[-1].startswith("f") or len(operands) != 3 or len(parts) != 3:
            return
        left, right = (self.read(operand, width) for operand in operands[1:3])
        if left.known is not None and right.known is not None:
            outcome = evaluate(instruction, [left.known, right.known])
            held = None if outcome is None else Sum.of(1, outcome[0])
        else:
            held = self._opaque((instruction.opcode, left, right), 1)
        if held is not None and isinstance(names[0], Name):
            self.registers[names[0].text] = held

    def _arithmetic(self, instruction: Instruction) -> Sum | None:
        root, parts = instruction.root, instruction.parts
        width = _width(parts[-1])
        if not width:
            return None
        signed = parts[-1].startswith("s")
        if root == "cvt":
            return self._convert(instruction)
        wide = root in ("mul", "mad") and "wide" in parts
        full = 2 * width if wide else width
        operands = instruction.operands[1:]
        args = [self.read(o, _operand_width(root, place, width, full)) for place, o in enumerate(operands)]
        known = [arg.known for arg in args]
        if root == "selp":
            if args[2].known is not None:
                return args[0] if args[2].known else args[1]
            return self._opaque(("selp", *args), width, self.values.bits(args[0]) | self.values.bits(args[1]))
        numbers = [k for k in known if k is not None]
        if len(numbers) == len(args):
            outcome = evaluate(instruction, numbers)
            return None if outcome is None else Sum.of(outcome[1], outcome[0])
        if root == "add":
            return args[0].plus(args[1])
        if root == "sub":
            return args[0].plus(args[1], -1)
        if root in ("mul", "mad") and "hi" not in parts and (known[0] is not None or known[1] is not None):
            value, factor = (args[1], args[0]) if known[0] is not None else (args[0], args[1])
            if wide:
                value, factor = (self._extend(x, full, signed) for x in (value, factor))
            assert factor.known is not None
            product = value.times(factor.known)
            return product.plus(args[2]) if root == "mad" else product
        if root == "shl" and known[1] is not None and known[1] < width:
            return args[0].times(1 << known[1])
        if root in ("or", "xor") and not self.values.bits(args[0]) & self.values.bits(args[1]):
            return args[0].plus(args[1])
        if root == "and" and (known[0] is not None or known[1] is not None):
            value, mask = (args[1], known[0]) if known[0] is not None else (args[0], known[1])
            assert mask is not None
            return self.values.masked(value, mask)
        shifted = self._shifted(root, args, known, width, signed)
        if shifted is not None:
            return shifted
        ones = self._ones(root, args, known, width, signed)
        return self._opaque((instruction.opcode, *args), full, ones)

    def _shifted(self, root: str, args: list[Sum], known: list[int | None], width: int, signed: bool) -> Sum | None:
        """Bits that a shift or a field takes from a value that is not negative."""
        if root not in ("shr", "bfe") or known[1] is None or known[1] >= width:
            return None
        if signed and (root == "bfe" or self.values.bits(args[0]) >> (width - 1)):
            return None
        out = self.values.shifted(args[0], known[1])
        if out is None or root == "shr":
            return out
        return None if known[2] is None else self.values.masked(out, (1 << min(known[2], width)) - 1)

    def _ones(self, root: str, args: list[Sum], known: list[int | None], width: int, signed: bool) -> int | None:
        """Bits of the result that may be set; None for all."""
        bits = [self.values.bits(arg) for arg in args]
        if root == "and":
            return bits[0] & bits[1]
        if root in ("or", "xor"):
            return bits[0] | bits[1]
        if root in ("shr",) and known[1] is not None and not (signed and bits[0] >> (width - 1)):
            return bits[0] >> known[1]
        if root == "bfe" and known[1] is not None and known[2] is not None and not signed:
            return bits[0] >> known[1] & ((1 << known[2]) - 1)
        if root in ("min",) and not signed:
            return (1 << min(b.bit_length() for b in bits)) - 1
        return None

    def _convert(self, instruction: Instruction) -> Sum | None:
        parts = instruction.parts
        if len(parts) != 3:
            return None
        target, source = _width(parts[1]), _width(parts[2])
        if not target or not source or "f" in (parts[1][0], parts[2][0]):
            return None
        value = self.read(instruction.operands[1], source)
        return (
            self.values.cut(value, target)
            if target <= source
            else self._extend(value, target, parts[2].startswith("s"))
        )

    def _packed(self, instruction: Instruction) -> Sum | None:
        """Two halves of a word at once."""
        if instruction.root not in ("add", "sub") or instruction.parts[1][0] == "f" or len(instruction.parts) != 2:
            return None
        left, right = (self.read(o, 32) for o in instruction.operands[1:3])
        factor = 1 if instruction.root == "add" else -1
        halves = [self._part(left, at, 16).plus(self._part(right, at, 16), factor) for at in (0, 16)]
        low, high = (self.values.extend(half, 32, False) for half in halves)
        return low.plus(high.times(1 << 16))


def _operand_width(root: str, place: int, width: int, full: int) -> int:
    return fixed_width(root, place) or (full if root == "mad" and place == 2 else width)
