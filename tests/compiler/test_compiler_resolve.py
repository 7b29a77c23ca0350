"""From raw launch arguments to buffers and offsets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.compiler.package import BufferKind, BytesArgument, PointerArgument
from missile.compiler.resolve import Block, Resolver
from missile.errors import UnsupportedError

BASE = 0x7F0000000000


def _blocks() -> list[Block]:
    return [
        Block("x", BufferKind.INPUT, BASE, 100),
        Block("w", BufferKind.WEIGHT, BASE + 512, 64),
        Block("s", BufferKind.SCRATCH, BASE + 1024, 4096),
        Block("unused", BufferKind.WEIGHT, BASE + 8192, 64),
        Block("empty", BufferKind.SCRATCH, 0, 0),
    ]


def _pointer(address: int) -> bytes:
    return address.to_bytes(8, "little")


@given(st.integers(-600, 9000))
def test_every_address_is_found_in_its_block_alone(delta: int) -> None:
    found = Resolver(_blocks()).find(BASE + delta)
    holders = [b for b in _blocks() if b.nbytes and b.address <= BASE + delta < b.address + b.nbytes]
    if not holders:
        assert found is None
    else:
        assert found == PointerArgument(buffer=holders[0].id, offset=BASE + delta - holders[0].address)


def test_arguments_and_lifetimes() -> None:
    resolver = Resolver(_blocks())
    four = (7).to_bytes(4, "little")
    arguments = resolver.arguments(0, "k", [_pointer(BASE), _pointer(BASE + 1040), four, bytes(8)], pointers=2)
    assert arguments == (
        PointerArgument(buffer="x"),
        PointerArgument(buffer="s", offset=16),
        BytesArgument(value="07000000"),
        BytesArgument(value="00" * 8),
    )
    resolver.arguments(5, "k", [_pointer(BASE + 1024)], pointers=1)
    spans = {b.id: (b.first, b.last) for b in resolver.buffers()}
    assert spans == {"x": (0, 0), "s": (0, 5)}


def test_pointer_to_foreign_memory_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'k' takes 2 tensors, but 1"):
        Resolver(_blocks()).arguments(0, "k", [_pointer(BASE), _pointer(BASE + 7000)], pointers=2)


def test_number_that_looks_like_an_address_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="takes 0 tensors"):
        Resolver(_blocks()).arguments(0, "k", [_pointer(BASE + 3)], pointers=0)


def test_overlapping_blocks_are_refused() -> None:
    twice = [Block("a", BufferKind.SCRATCH, BASE, 600), Block("b", BufferKind.SCRATCH, BASE + 512, 512)]
    with pytest.raises(UnsupportedError, match="overlap"):
        Resolver(twice)
