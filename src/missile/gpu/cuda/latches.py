"""Latches: a word of device memory that streams write and wait for (stream memory operations)."""

from __future__ import annotations

from missile.gpu.cuda.buffers import CudaBuffer

__all__ = ["CudaLatch"]


class CudaLatch:
    """Owns its word; `CudaGpu.create_latch` has set it to 0."""

    def __init__(self, word: CudaBuffer) -> None:
        self._word = word

    @property
    def address(self) -> int:
        return self._word.address

    def close(self) -> None:
        self._word.free()
