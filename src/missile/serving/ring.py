"""A queue of fixed-size records in shared memory: one producer, one consumer, no lock.

Each side writes only its own counter, as one aligned 8-byte store after the record itself. That order is what x86-64
keeps; on other processors the doorbell's system call, which follows every push, is the barrier.
"""

from __future__ import annotations

import struct

from missile.errors import InternalError

__all__ = ["Ring"]

_LINE = 64  # the two counters lie on cache lines of their own


class Ring:
    """`capacity` records of `record.size` bytes over `memory` (at least `Ring.nbytes(...)` bytes, zeroed at first)."""

    def __init__(self, memory: memoryview, record: struct.Struct, capacity: int) -> None:
        if len(memory) < self.nbytes(record, capacity) or capacity & (capacity - 1):
            raise InternalError(f"A ring of {capacity} records does not fit its memory, or is no power of two.")
        counters = memory[: 2 * _LINE].cast("Q")
        self._counters = counters
        self._taken = 0
        self._put = _LINE // 8
        self._records = memory[2 * _LINE :]
        self._record = record
        self._size = record.size
        self.capacity = capacity
        self._mask = capacity - 1

    @staticmethod
    def nbytes(record: struct.Struct, capacity: int) -> int:
        return 2 * _LINE + record.size * capacity

    def push(self, *fields: int) -> bool:
        """Append a record; False when the ring is full. Producer only."""
        counters = self._counters
        put = counters[self._put]
        if put - counters[self._taken] >= self.capacity:
            return False
        self._record.pack_into(self._records, (put & self._mask) * self._size, *fields)
        counters[self._put] = put + 1
        return True

    def pop(self) -> tuple[int, ...] | None:
        """Take the oldest record, or None. Consumer only."""
        counters = self._counters
        taken = counters[self._taken]
        if taken == counters[self._put]:
            return None
        fields = self._record.unpack_from(self._records, (taken & self._mask) * self._size)
        counters[self._taken] = taken + 1
        return fields

    def __len__(self) -> int:
        return int(self._counters[self._put] - self._counters[self._taken])

    def close(self) -> None:
        """Let go of the memory."""
        self._counters.release()
        self._records.release()
