"""Buffers for request bodies, used again: fresh ones of hundreds of KiB cost page faults, and leave holes in the heap."""

from __future__ import annotations

__all__ = ["BodyBuffers"]

_SMALLEST = 4096
_LARGEST = 4 << 20  # larger ones are not kept


class BodyBuffers:
    """Buffers come in powers of two of bytes. most: how many bytes are kept when nobody uses them."""

    def __init__(self, most: int = 32 << 20) -> None:
        self._most = most
        self._spare: dict[int, list[bytearray]] = {}
        self.kept = 0

    def take(self, nbytes: int) -> bytearray:
        """A buffer of at least `nbytes`; its contents are undefined."""
        size = max(_SMALLEST, 1 << max(0, nbytes - 1).bit_length())
        if size > _LARGEST:
            return bytearray(nbytes)
        spare = self._spare.get(size)
        if spare:
            self.kept -= size
            return spare.pop()
        return bytearray(size)

    def give(self, buffer: bytearray) -> None:
        """Hand a buffer back that nobody looks at any more."""
        size = len(buffer)
        if _SMALLEST <= size <= _LARGEST and not size & (size - 1) and self.kept + size <= self._most:
            self._spare.setdefault(size, []).append(buffer)
            self.kept += size
