"""Launches of the kernels that move data into and out of a tenant's colored memory, and fill it."""

from __future__ import annotations

from dataclasses import dataclass

from missile.coloring.pool import TenantMemory
from missile.compiler.ptx.fill import FILL
from missile.compiler.ptx.transfer import GATHER, SCATTER, THREADS, blocks_for
from missile.gpu.interface import Launch, Module
from missile.gpu.work import KernelWork

__all__ = ["STAND_IN", "Mover"]

# For simulated GPUs, which need the names alone.
STAND_IN = "\n".join(
    [".version 8.0", ".target sm_90", ".address_size 64"]
    + [f".visible .entry {name}() {{ ret; }}" for name in (SCATTER, GATHER, FILL)]
).encode()


@dataclass(frozen=True, slots=True)
class Mover:
    """module: the code that `ColoredKernels.transfer` is for the shape of `memory`. Plain and logical addresses are
    multiples of 16, but for `fill`. overlaps: whether that code waits for the launch before."""

    module: Module
    memory: TenantMemory
    overlaps: bool = False

    def scatter(self, plain: int, logical: int, nbytes: int) -> Launch:
        return self._launch(SCATTER, nbytes, (_u64(plain), _u64(logical), _u64(nbytes)), reads=nbytes)

    def gather(self, plain: int, logical: int, nbytes: int) -> Launch:
        return self._launch(GATHER, nbytes, (_u64(plain), _u64(logical), _u64(nbytes)), reads=nbytes)

    def fill(self, logical: int, nbytes: int, value: int) -> Launch:
        return self._launch(FILL, nbytes + 15, (_u64(logical), _u64(nbytes), value.to_bytes(4, "little")), reads=0)

    def _launch(self, kernel: str, nbytes: int, params: tuple[bytes, ...], *, reads: int) -> Launch:
        blocks = blocks_for(nbytes)
        work = KernelWork(
            blocks=blocks,
            threads=THREADS,
            blocks_per_sm=8,
            read_bytes=reads,
            write_bytes=nbytes,
            footprint_bytes=reads + nbytes,
        )
        grid, block = (blocks, 1, 1), (THREADS, 1, 1)
        arguments = (*params, self.memory.constants)
        return Launch(self.module.kernel(kernel), grid, block, 0, arguments, work, overlaps=self.overlaps)


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")
