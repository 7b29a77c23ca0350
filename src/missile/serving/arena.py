"""Who holds which bytes of the memory between front end and engine: a buddy allocator, pure bookkeeping.

Only the front end allocates and frees. A block is freed when the engine has answered for it, never before, so that the
engine cannot write into a block that belongs to another request by then.
"""

from __future__ import annotations

from missile.errors import InternalError

__all__ = ["MINIMUM_BLOCK", "Arena"]

MINIMUM_BLOCK = 4096


class Arena:
    """Blocks of `MINIMUM_BLOCK` times a power of two bytes, out of `nbytes` (rounded down to such a size).

    Allocation and freeing take time logarithmic in `nbytes`. Not thread-safe.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < MINIMUM_BLOCK:
            raise InternalError(f"An arena of {nbytes} bytes is smaller than a block.")
        self._top = (nbytes // MINIMUM_BLOCK).bit_length() - 1
        self.nbytes = MINIMUM_BLOCK << self._top
        self._free: list[set[int]] = [set() for _ in range(self._top + 1)]
        self._free[self._top].add(0)
        self._order: dict[int, int] = {}
        self.used = 0

    @staticmethod
    def block_bytes(nbytes: int) -> int:
        """How many bytes a request for `nbytes` really takes."""
        return MINIMUM_BLOCK << max(0, (max(1, nbytes) - 1) // MINIMUM_BLOCK).bit_length()

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a block of at least `nbytes`, or None when none is free."""
        order = ((max(1, nbytes) - 1) // MINIMUM_BLOCK).bit_length()
        found = order
        while found <= self._top and not self._free[found]:
            found += 1
        if found > self._top:
            return None
        offset = min(self._free[found])  # low addresses are used again and again: their pages are there already
        self._free[found].remove(offset)
        while found > order:
            found -= 1
            self._free[found].add(offset + (MINIMUM_BLOCK << found))
        self._order[offset] = order
        self.used += MINIMUM_BLOCK << order
        return offset

    def free(self, offset: int) -> None:
        """Give the block at `offset` back. InternalError when it is not one."""
        order = self._order.pop(offset, None)
        if order is None:
            raise InternalError(f"The arena has no block at {offset}.")
        self.used -= MINIMUM_BLOCK << order
        while order < self._top:
            buddy = offset ^ (MINIMUM_BLOCK << order)
            if buddy not in self._free[order]:
                break
            self._free[order].remove(buddy)
            offset = min(offset, buddy)
            order += 1
        self._free[order].add(offset)
