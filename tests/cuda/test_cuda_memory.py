"""Accounting and limits in front of an allocator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.errors import InternalError, OutOfMemoryError
from missile.gpu.interface import DeviceBuffer
from missile.gpu.memory import Ledger, LimitedAllocator, TrackedAllocator

LIMITS = {"a": 1000, "b": 300}


class Memory:
    """An allocator that knows what it has given out."""

    def __init__(self) -> None:
        self.live: set[Piece] = set()

    def allocate(self, nbytes: int, *, tenant: str = "") -> DeviceBuffer:
        piece = Piece(self, nbytes)
        self.live.add(piece)
        return piece


class Piece:
    def __init__(self, memory: Memory, nbytes: int) -> None:
        self.memory, self.nbytes, self.address = memory, nbytes, 512

    def free(self) -> None:
        self.memory.live.remove(self)  # KeyError when freed twice


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 400), st.booleans()), max_size=60))
def test_the_ledger_agrees_with_the_memory_and_limits_hold(steps: list[tuple[str, int, bool]]) -> None:
    memory = Memory()
    allocator = LimitedAllocator(memory, LIMITS)
    held: list[tuple[str, DeviceBuffer]] = []
    peak = dict.fromkeys("abc", 0)
    for tenant, nbytes, free_one in steps:
        if free_one and held:
            _, buffer = held.pop(nbytes % len(held))
            buffer.free()
            buffer.free()  # idempotent
        else:
            before = len(memory.live)
            left = LIMITS.get(tenant, 10**9) - allocator.ledger.in_use(tenant)
            try:
                held.append((tenant, allocator.allocate(nbytes, tenant=tenant)))
                assert nbytes <= left
            except OutOfMemoryError as error:
                assert nbytes > left == error.available  # noqa: PT017
                assert (error.tenant, error.requested, len(memory.live)) == (tenant, nbytes, before)  # noqa: PT017
        for name in "abc":
            used = sum(buffer.nbytes for owner, buffer in held if owner == name)
            peak[name] = max(peak[name], used)
            assert allocator.ledger.in_use(name) == used <= LIMITS.get(name, used)
            assert allocator.ledger.peak(name) == peak[name]
        assert allocator.ledger.total() == sum(piece.nbytes for piece in memory.live)


def test_adaptors_stack() -> None:
    memory = Memory()
    tracked = TrackedAllocator(memory)
    limited = LimitedAllocator(tracked, {"a": 100})
    limited.allocate(60, tenant="a")
    tracked.allocate(60, tenant="a")
    assert (tracked.ledger.in_use("a"), limited.ledger.in_use("a")) == (120, 60)
    with pytest.raises(OutOfMemoryError, match="'a' asked for 41 bytes of GPU memory with 40 of its 100 left"):
        limited.allocate(41, tenant="a")


def test_more_back_than_was_charged_is_a_bug() -> None:
    with pytest.raises(InternalError, match="5 bytes more"):
        Ledger().refund("a", 5)
