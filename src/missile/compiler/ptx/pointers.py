"""Which of a kernel's pointers each access goes by, and how far from it: a launch carries bits of what pointers point into.

A wrong answer gives a wrong address of the tenant's own, as with windows: whatever distance is found is held in the range
that the launch names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from missile.coloring.carried import GRANULE, Slot
from missile.compiler.ptx.access import Access
from missile.compiler.ptx.blocks import Blocks
from missile.compiler.ptx.flow import Flow
from missile.compiler.ptx.loops import Trace, follow
from missile.compiler.ptx.sums import Sum, Values
from missile.compiler.ptx.syntax import Address, Function, Immediate, Instruction, Name
from missile.compiler.ptx.translate import Distance

__all__ = ["Pointers", "Traced", "trace_of"]


@dataclass(frozen=True, slots=True)
class Traced:
    """What a function's accesses touch, and the values that it is sums of."""

    values: Values
    trace: Trace

    def pointers(self) -> dict[Access, str]:
        """The parameter that each access's address is counted from, for those with exactly one such."""
        seen: dict[Access, list[Sum]] = {access: [visit.address] for access, visit in self.trace.visits.items()}
        for loop in self.trace.loops:
            for access, visits in loop.visits.items():
                seen[access] = [visit.address for visit in visits if visit.made]
        found = {}
        for access, addresses in seen.items():
            names = {self._pointer(address) for address in addresses}
            name = names.pop() if len(names) == 1 else None
            if name is not None:
                found[access] = name
        return found

    def _pointer(self, address: Sum) -> str | None:
        names = []
        for value, times in address.terms:
            match self.values.keys[value]:
                case ("param", str() as name, 0) if times == 1:
                    names.append(name)
        return names[0] if len(names) == 1 else None


def trace_of(
    function: Function, blocks: Blocks, accesses: Sequence[Access], aligned: Mapping[str, int], bits: int = 64
) -> Traced:
    """aligned, bits: as of `follow`."""
    values = Values()
    return Traced(values, follow(function, blocks, accesses, values, aligned, bits))


class Pointers:
    """Slots of the ranges that a launch carries bits of, and who takes from which.

    pointers: the parameter that each access goes by; slots: by parameter; aligned: bytes that parameters are multiples of.
    """

    def __init__(
        self, flow: Flow, pointers: Mapping[Access, str], slots: Mapping[str, Slot], aligned: Mapping[str, int]
    ) -> None:
        self._flow = flow
        self._pointers = pointers
        self._slots = slots
        self._aligned = aligned

    def slot_of(self, access: Access) -> Slot | None:
        """None where the launch carries nothing for `access`, or nobody knows what."""
        return self._slots.get(self._pointers.get(access, ""))

    def distance(self, base: str, slot: Slot) -> Distance | None:
        """What the register `base` is more than the pointer that `slot` is for, where that is what an instruction adds to it
        and the pointer is the range's start; the register that is named is written once only."""
        instruction = self._flow.only_definition(base)
        if instruction is None or instruction.guard is not None:
            return None
        root, parts, operands = instruction.root, instruction.parts, instruction.operands
        if root == "add" and parts[-1] in ("s64", "u64", "b64"):
            for pointer, other in ((1, 2), (2, 1)):
                distance = operands[other]
                if self._is_start(operands[pointer], slot) and self._is_fixed(distance):
                    assert isinstance(distance, Name)
                    return Distance(distance.text, None)
        if root == "mad" and "wide" in parts and parts[-1] in ("s32", "u32") and self._is_start(operands[3], slot):
            index, factor = operands[1], operands[2]
            if self._is_fixed(index) and isinstance(factor, Immediate) and factor.value is not None:
                assert isinstance(index, Name)
                return Distance(index.text, factor.value)
        return None

    def _is_fixed(self, operand: object) -> bool:
        return isinstance(operand, Name) and self._flow.only_definition(operand.text) is not None

    def _is_start(self, operand: object, slot: Slot) -> bool:
        if not isinstance(operand, Name):
            return False
        name = self._parameter(self._flow.only_definition(operand.text))
        return self._slots.get(name) is slot and self._aligned.get(name, 1) % GRANULE == 0

    def _parameter(self, instruction: Instruction | None) -> str:
        """The parameter that `instruction` loads, also by way of a conversion of its address space; "" for anything else."""
        if instruction is None or len(instruction.operands) != 2:
            return ""
        source = instruction.operands[1]
        if instruction.root == "ld" and "param" in instruction.parts and isinstance(source, Address):
            return source.base or "" if source.offset == 0 else ""
        if instruction.root in ("cvta", "mov") and isinstance(source, Name):
            return self._parameter(self._flow.only_definition(source.text))
        return ""
