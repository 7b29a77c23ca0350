"""From a captured run to a launch plan: which buffer each argument points into, and when each buffer is used. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from missile.compiler.package import Argument, Buffer, BufferKind, BytesArgument, PointerArgument
from missile.errors import UnsupportedError

__all__ = ["Block", "Resolver"]


@dataclass(frozen=True, slots=True)
class Block:
    """A range of device memory that existed, distinct from all others, throughout the captured run."""

    id: str
    kind: BufferKind
    address: int
    nbytes: int


class Resolver:
    """Turns addresses into (buffer, offset) and remembers at which steps each buffer was used."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = sorted((b for b in blocks if b.nbytes), key=lambda b: b.address)
        self._starts = [b.address for b in self._blocks]
        self._used: dict[str, tuple[int, int]] = {}
        for before, after in zip(self._blocks, self._blocks[1:], strict=False):
            if before.address + before.nbytes > after.address:
                raise UnsupportedError(f"Buffers {before.id!r} and {after.id!r} overlap in the captured run.")

    def find(self, address: int) -> PointerArgument | None:
        """The buffer that holds `address`, or None."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        block = self._blocks[index]
        offset = address - block.address
        return PointerArgument(buffer=block.id, offset=offset) if offset < block.nbytes else None

    def arguments(self, step: int, name: str, params: Sequence[bytes], pointers: int) -> tuple[Argument, ...]:
        """The arguments of the kernel `name` at `step`.

        pointers: how many of them are tensors. UnsupportedError when another number points into known memory: then a
        pointer leads somewhere that the plan doesn't own, or a plain number looks like an address.
        """
        out: list[Argument] = []
        found = 0
        for value in params:
            target = self.find(int.from_bytes(value, "little")) if len(value) == 8 else None
            if target is None:
                out.append(BytesArgument(value=value.hex()))
                continue
            found += 1
            self.use(target.buffer, step)
            out.append(target)
        if found != pointers:
            raise UnsupportedError(
                f"Kernel {name!r} takes {pointers} tensors, but {found} of its arguments lead into the model's memory."
            )
        return tuple(out)

    def use(self, buffer: str, step: int) -> None:
        """Note that `step` touches `buffer`."""
        first, last = self._used.get(buffer, (step, step))
        self._used[buffer] = (min(first, step), max(last, step))

    def buffers(self) -> tuple[Buffer, ...]:
        """The buffers that the plan needs: those used, and inputs and outputs in any case."""
        always = (BufferKind.INPUT, BufferKind.OUTPUT)
        kept = [b for b in self._blocks if b.id in self._used or b.kind in always]
        order = {kind: place for place, kind in enumerate(BufferKind)}
        out = []
        for block in sorted(kept, key=lambda b: (order[b.kind], self._used.get(b.id, (0, 0)), b.id)):
            first, last = self._used.get(block.id, (0, 0))
            out.append(Buffer(id=block.id, kind=block.kind, nbytes=block.nbytes, first=first, last=last))
        return tuple(out)
