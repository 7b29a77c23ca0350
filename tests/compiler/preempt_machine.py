"""A machine small enough to see through: it runs the PTX of whole blocks, one thread after another, over real memory.

Integers only, one barrier number, and a hook between any two memory accesses, at which the host may do something.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.syntax import Address, Immediate, Instruction, Label, Module, Name, Operand, Vector

MASK = (1 << 32) - 1


class Machine:
    """Memory, a stream of work, and `meanwhile`, which is called between accesses."""

    def __init__(self, rng: random.Random, *, cached: bool = False) -> None:
        self.rng = rng
        self.memory: dict[int, int] = {}
        self.queue: deque[Callable[[], None]] = deque()
        self.meanwhile: Callable[[], None] = lambda: None
        self.cached = cached  # plain loads of the control may give what it held at any time since the kernel started
        self.stale: dict[int, set[int]] = {}

    def read(self, address: int, nbytes: int) -> int:
        return sum(self.memory.get(address + i, 0) << 8 * i for i in range(nbytes))

    def write(self, address: int, value: int, nbytes: int) -> None:
        for i in range(nbytes):
            self.memory[address + i] = value >> 8 * i & 255

    def launch(self, module: Module, params: tuple[bytes, ...], grid: tuple[int, int], threads: int) -> None:
        """Append a launch to the stream."""
        self.queue.append(lambda: self._kernel(module, params, grid, threads))

    def drain(self) -> None:
        while self.queue:
            self.queue.popleft()()

    def _kernel(self, module: Module, params: tuple[bytes, ...], grid: tuple[int, int], threads: int) -> None:
        """Blocks in random order, a few of them at a time by turns."""
        self.stale.clear()
        waiting = [(x, y) for x in range(grid[0]) for y in range(grid[1])]
        self.rng.shuffle(waiting)
        active: list[Iterator[None]] = []
        while waiting or active:
            while waiting and len(active) < 3:
                active.append(self._block(module, params, grid, waiting.pop(), threads))
            block = self.rng.choice(active)
            if next(block, "ended") == "ended":
                active.remove(block)

    def _block(
        self, module: Module, params: tuple[bytes, ...], grid: tuple[int, int], where: tuple[int, int], threads: int
    ) -> Iterator[None]:
        crew = [_Thread(self, module, params, grid, where, threads, index) for index in range(threads)]
        while True:
            votes = []
            for thread in crew:
                yield from thread.run()
                votes.append(thread.vote)
            if all(vote is None for vote in votes):
                return
            assert None not in votes, "threads of one block part ways at a barrier"
            for thread in crew:
                thread.learn(any(votes))


class _Thread:
    def __init__(
        self,
        machine: Machine,
        module: Module,
        params: tuple[bytes, ...],
        grid: tuple[int, int],
        where: tuple[int, int],
        threads: int,
        index: int,
    ) -> None:
        function = module.functions[-1]
        self._machine = machine
        self._params = {p.name: int.from_bytes(v, "little") for p, v in zip(function.parameters, params, strict=True)}
        self._code: list[Instruction] = []
        self._labels: dict[str, int] = {}
        for statement in function.flat():
            if isinstance(statement, Instruction):
                self._code.append(statement)
            elif isinstance(statement, Label):
                self._labels[statement.name] = len(self._code)
        zero = dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.z"), 0)
        self._registers: dict[str, int] = {
            **zero,
            "%tid.x": index,
            "%ntid.x": threads,
            "%ctaid.x": where[0],
            "%ctaid.y": where[1],
            "%nctaid.x": grid[0],
            "%nctaid.y": grid[1],
        }
        self._at = 0
        self._result = ""
        self.vote: bool | None = None

    def run(self) -> Iterator[None]:
        """Up to the next barrier (`vote` says what it brings) or to the end (`vote` is None)."""
        while True:
            instruction = self._code[self._at]
            self._at += 1
            if instruction.guard is not None and self._value(instruction.guard) == 0:
                continue
            root, operands = instruction.root, instruction.operands
            if root == "cp":
                continue
            if root == "ret":
                self._at -= 1
                self.vote = None
                return
            if root == "bra":
                self._at = self._labels[_name(operands[0])]
            elif root == "bar":
                assert instruction.opcode == "bar.red.or.pred"
                self._result, self.vote = _name(operands[0]), bool(self._value(operands[2]))
                return
            elif root in ("ld", "st", "atom") and "param" not in instruction.parts:
                self._machine.meanwhile()
                yield
                self._access(instruction)
            else:
                self._registers[_name(operands[0])] = self._compute(instruction)

    def learn(self, outcome: bool) -> None:
        self._registers[self._result] = int(outcome)

    def _access(self, instruction: Instruction) -> None:
        machine = self._machine
        (address,) = [operand for operand in instruction.operands if isinstance(operand, Address)]
        where = self._registers[str(address.base)] + address.offset
        nbytes = int(instruction.parts[-1][1:]) // 8
        if instruction.root == "atom":
            assert "cas" in instruction.parts
            before = machine.read(where, nbytes)
            if before == self._value(instruction.operands[2]):
                machine.write(where, self._value(instruction.operands[3]), nbytes)
            self._registers[_name(instruction.operands[0])] = before
            return
        if instruction.root == "st":
            machine.write(where, self._value(instruction.operands[1]), nbytes)
            return
        target = instruction.operands[0]
        names = [target] if isinstance(target, Name) else list(target.items) if isinstance(target, Vector) else []
        for place, name in enumerate(names):
            value = machine.read(where + place * nbytes, nbytes)
            if machine.cached and len(names) > 1 and "relaxed" not in instruction.parts:
                seen = machine.stale.setdefault(where + place * nbytes, set())
                seen.add(value)
                value = machine.rng.choice(sorted(seen))
            self._registers[_name(name)] = value

    def _compute(self, instruction: Instruction) -> int:
        root, parts, operands = instruction.root, instruction.parts, instruction.operands
        if root == "ld":
            (address,) = [operand for operand in operands if isinstance(operand, Address)]
            return self._params[str(address.base)]
        values = [self._value(operand) for operand in operands[1:]]
        match root:
            case "setp":
                outcome = {"eq": values[0] == values[1], "ne": values[0] != values[1], "lt": values[0] < values[1]}[
                    parts[1]
                ]
                return int(outcome and bool(values[2])) if "and" in parts else int(outcome)
            case "mov" | "cvt" | "cvta":
                return values[0]
            case "add":
                return values[0] + values[1] & ((1 << 64) - 1 if parts[-1].endswith("64") else MASK)
            case "mad":
                product = values[0] * values[1] + values[2]
                return product if "wide" in parts else product & MASK
            case "or":
                return values[0] | values[1]
            case "rem":
                return values[0] % values[1]
            case "shl":
                return values[0] << values[1] & MASK
        raise AssertionError(f"{instruction.opcode} is not known here")

    def _value(self, operand: Operand) -> int:
        if isinstance(operand, Immediate):
            assert operand.value is not None
            return operand.value
        assert isinstance(operand, Name)
        value = self._registers[operand.text]
        return 1 - value if operand.negated else value


def _name(operand: Any) -> str:
    assert isinstance(operand, Name)
    return operand.text


def module(text: str) -> Module:
    return parse(text)
