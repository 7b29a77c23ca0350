"""How often a tenant's kernels went outside their colored memory: read from the GPU without waiting for it."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from missile.gpu.interface import Gpu

__all__ = ["EscapeCounter"]


class EscapeCounter:
    """The count at `address` (8 bytes on the device, of a tenant's memory). What it takes on the host belongs to `undo`."""

    def __init__(self, gpu: Gpu, address: int, *, tenant: str, undo: ExitStack) -> None:
        self._address = address
        self._buffer = gpu.allocate_host(8, tenant=tenant)
        undo.callback(self._buffer.free)
        self._buffer.array[:] = 0
        self._stream = gpu.create_stream()
        undo.callback(self._stream.close)
        self._last = 0

    def read(self) -> int:
        """As of the last call: each asks the GPU for a fresh number, which the next one finds."""
        if self._stream.idle():
            self._last = int(self._buffer.array.view(np.uint64)[0])
            self._stream.copy_to_host(self._buffer, self._address)
        return self._last
