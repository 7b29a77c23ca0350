"""Pages to measure: mapped one after another, spread over the whole memory, and given back whatever happens."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import numpy.typing as npt

from missile.errors import MissileError, OutOfMemoryError
from missile.gpu.interface import AddressRange, DeviceBuffer, Gpu, PhysicalPage

__all__ = ["PagePool"]

_RUN = 256  # pages taken in one go before a stretch of memory is skipped
_TENANT = "probe"


class PagePool:
    """`count` pages of the GPU's page size. A context manager; owns pages, mappings and what it skipped over.

    addresses: int64, shape (count,), device addresses in random order. OutOfMemoryError when the memory is not free.
    """

    def __init__(self, gpu: Gpu, count: int, *, spread: bool, rng: np.random.Generator) -> None:
        self.page_bytes = gpu.info.page_bytes
        self._pages: list[PhysicalPage] = []
        self._skipped: list[DeviceBuffer] = []
        self._range: AddressRange | None = None
        free = gpu.memory_free()
        if free < count * self.page_bytes:
            raise OutOfMemoryError(
                f"Probing {count} pages needs {count * self.page_bytes >> 20} MiB of GPU memory, {free >> 20} MiB are free: "
                "another process holds the rest, or ask for fewer pages.",
                requested=count * self.page_bytes,
                available=free,
            )
        try:
            self._range = gpu.reserve(count * self.page_bytes)
            # The driver hands memory out front to back: what is skipped now puts the next run further on.
            skip = (free - count * self.page_bytes) * 9 // 10 // max(1, -(-count // _RUN)) // self.page_bytes
            for start in range(0, count, _RUN):
                run = [gpu.create_page(tenant=_TENANT) for _ in range(min(_RUN, count - start))]
                self._pages += run
                self._range.map(start * self.page_bytes, run)
                if spread and skip:
                    self._skipped.append(gpu.allocate(skip * self.page_bytes, tenant=_TENANT))
        except BaseException:
            self.close()
            raise
        order = rng.permutation(count)
        self.addresses: npt.NDArray[np.int64] = self._range.address + order.astype(np.int64) * self.page_bytes

    def close(self) -> None:
        """Give everything back. Idempotent."""
        for buffer in self._skipped:
            buffer.free()
        if self._range is not None:
            self._range.free()
        for page in self._pages:
            page.release()
        self._skipped, self._pages, self._range = [], [], None

    def __enter__(self) -> PagePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except MissileError:
            # After a fault nothing can be given back; the first error is the one to report.
            if error is None:
                raise
