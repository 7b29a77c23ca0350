"""The switch of one preemptible model: a control block in device memory, and a word of host memory that answers.

The flag is written by the front end of a stream of its own (`cuStreamWriteValue`): that needs neither an SM nor a copy
engine, so it takes effect however full both are. `compiler/ptx/preempt.py` is the code that reads the block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from missile.gpu.cuda.buffers import CudaBuffer, CudaHostBuffer
from missile.gpu.cuda.driver import Driver
from missile.gpu.cuda.streams import CudaStream
from missile.gpu.interface import Left, Stream

__all__ = ["CONTROL_BYTES", "CudaPreemptControl"]

CONTROL_BYTES = 24

# The control block: left, stop, resume, request (u32 each), and where `left` is also written in host memory (u64).
_LEFT, _STOP, _RESUME = 0, 4, 8
_STEP_BITS = 16
_STEP_MASK = (1 << _STEP_BITS) - 1


class CudaPreemptControl:
    """See `PreemptControl`. Owns `block` (device), `answer` (pinned) and the CUstream `native`, which writes the flag."""

    def __init__(
        self,
        cu: Driver,
        native: Any,
        block: CudaBuffer,
        answer: CudaHostBuffer,
        on_close: Callable[[CudaPreemptControl], None],
    ) -> None:
        self._cu = cu
        self._native = native
        self._block = block
        self._answer_buffer = answer
        self._answer = answer.array[:4].view(np.uint32)
        self._answer[0] = 0
        self._on_close = on_close
        self._request = 0
        self._closed = False
        contents = np.array([0, 0, answer.address], np.uint64)
        cu("cuMemcpyHtoD", block.address, contents.ctypes.data, contents.nbytes)

    @property
    def address(self) -> int:
        return self._block.address

    def begin(self, stream: Stream) -> int:
        self._request = (self._request + 1) & _STEP_MASK
        self._start(stream, self._request, 0)
        return self._request

    # Without a memory barrier would do as well, but drivers refuse that flag (580 does).
    def raise_flag(self) -> None:
        self._cu("cuStreamWriteValue32", self._native, self._block.address + _STOP, 1, 0)

    def lower_flag(self) -> None:
        self._cu("cuStreamWriteValue32", self._native, self._block.address + _STOP, 0, 0)

    def left(self) -> Left | None:
        value = int(self._answer[0])
        return Left(value >> _STEP_BITS, (value & _STEP_MASK) - 1) if value else None

    def resume(self, stream: Stream, left: Left) -> None:
        assert isinstance(stream, CudaStream)
        self._answer[0] = 0
        self._cu("cuStreamWriteValue32", stream.handle, self._block.address + _LEFT, 0, 0)
        self._start(stream, left.request, left.step + 1)

    def _start(self, stream: Stream, request: int, resume: int) -> None:
        assert isinstance(stream, CudaStream)
        word = request << 32 | resume
        self._cu("cuStreamWriteValue64", stream.handle, self._block.address + _RESUME, word, 0)

    def close(self) -> None:
        """Idempotent. The caller has made sure that no launch looks at the control any more."""
        if self._closed:
            return
        self._closed = True
        self._on_close(self)
        self._cu.release("cuStreamDestroy", self._native)
        self._block.free()
        self._answer_buffer.free()
