"""A ring of pinned buffers, through which copies from and to ordinary (pageable) memory go."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError
from missile.gpu.interface import Gpu, HostBuffer

__all__ = ["Bytes", "Piece", "StagingRing"]

Bytes = npt.NDArray[np.uint8]


class Piece:
    """A part of a pageable copy that has a pinned buffer: its first `nbytes` are, or will be, the bytes from `offset` on."""

    __slots__ = ("buffer", "nbytes", "offset", "work")

    def __init__(self, buffer: HostBuffer, offset: int, nbytes: int) -> None:
        self.buffer = buffer
        self.offset = offset
        self.nbytes = nbytes
        self.work: Future[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether the host's part of the work is done. Raises what it raised."""
        if self.work is None:
            return True
        if not self.work.done():
            return False
        self.work.result()
        return True


class StagingRing:
    """`slots` pinned buffers of `slot_bytes`. Owned by the engine; not thread-safe.

    executor: runs the host's memory copies (they release the interpreter's lock), so that a slow one does not hold up
    the other tenants' chunks. None: in place, which is deterministic. `wake` is called when one has finished.
    """

    def __init__(
        self,
        gpu: Gpu,
        *,
        slots: int,
        slot_bytes: int,
        executor: Executor | None = None,
        wake: Callable[[], None] | None = None,
    ) -> None:
        if slots < 0 or slot_bytes <= 0:
            raise MisuseError(f"The staging ring can't have {slots} buffers of {slot_bytes} bytes.")
        self.slot_bytes = slot_bytes
        self._executor = executor
        self._wake = wake
        self._all: list[HostBuffer] = []
        try:
            for _ in range(slots):
                self._all.append(gpu.allocate_host(slot_bytes, tenant="pcie staging"))
        except Exception:
            self.close()
            raise
        self._free = list(self._all)

    @property
    def slots(self) -> int:
        return len(self._all)

    @property
    def available(self) -> int:
        return len(self._free)

    def take(self, offset: int, nbytes: int) -> Piece | None:
        """A piece for at most `nbytes` from `offset`; None when all buffers are in use."""
        if not self._free:
            return None
        return Piece(self._free.pop(), offset, min(nbytes, self.slot_bytes))

    def fill(self, piece: Piece, source: Bytes) -> None:
        """Start copying the piece's bytes from `source`, shape (n,), into its buffer."""
        target = piece.buffer.array[: piece.nbytes]
        self._start(piece, target, source[piece.offset : piece.offset + piece.nbytes])

    def drain(self, piece: Piece, target: Bytes) -> None:
        """Start copying the piece's bytes from its buffer into `target`, shape (n,)."""
        self._start(piece, target[piece.offset : piece.offset + piece.nbytes], piece.buffer.array[: piece.nbytes])

    def give_back(self, piece: Piece) -> None:
        self._free.append(piece.buffer)

    def close(self) -> None:
        """Free the buffers. The caller has made sure that no copy uses them."""
        while self._all:
            self._all.pop().free()
        self._free = []

    def _start(self, piece: Piece, target: Bytes, source: Bytes) -> None:
        if self._executor is None:
            np.copyto(target, source)
            return
        piece.work = self._executor.submit(np.copyto, target, source)
        if self._wake is not None:
            wake = self._wake
            piece.work.add_done_callback(lambda _: wake())
