"""Weights on the host, in parts: every byte in time for its first reader, for any layout and for real models' packages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.compiler.library import find_package
from missile.compiler.package import BufferKind
from missile.compiler.planning import place_buffers
from missile.compiler.synthetic import synthetic_package
from missile.errors import MisuseError
from missile.runtime.host_weights import Part, joined
from missile.runtime.hosted import host_weights, load_image, weight_bytes


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5000)), min_size=1, max_size=40), st.integers(1, 20_000))
def test_parts_cover_every_byte_before_it_is_needed(raw: list[tuple[int, int]], at_least: int) -> None:
    pieces, offset = [], 0
    for first, nbytes in raw:
        pieces.append(Part(offset, nbytes, first))
        offset += -(-nbytes // 512) * 512
    parts = joined(pieces, at_least=at_least)
    assert [part.first for part in parts] == sorted(part.first for part in parts)
    for piece in pieces:
        covering = [p for p in parts if p.offset <= piece.offset and piece.offset + piece.nbytes <= p.offset + p.nbytes]
        assert any(part.first <= piece.first for part in covering)
    if [first for first, _ in raw] == sorted(first for first, _ in raw):  # laid out in order of use: nothing twice
        ends = [(part.offset, part.offset + part.nbytes) for part in parts]
        assert all(before[1] <= after[0] for before, after in pairwise(ends))
        assert all(part.nbytes >= at_least for part in parts[:-1])


@pytest.mark.parametrize(("model", "batch"), [("resnet34", 1), ("mobilebert", 1), ("bert_large", 32)])
def test_a_package_s_parts_arrive_before_the_operations_that_read_them(gpu: Any, model: str, batch: int) -> None:
    package, directory = find_package(model, batch, gpu.info)
    image = load_image(package, directory, gpu, tenant="one")
    weights = host_weights(package, image, 1 << 30)
    assert 2 <= len(weights.parts) <= 10
    place = place_buffers(package)[BufferKind.WEIGHT]
    for buffer in package.buffers:
        if buffer.kind is not BufferKind.WEIGHT or not buffer.nbytes:
            continue
        begin = place.offsets[buffer.id]
        part = next(p for p in weights.parts if p.offset <= begin and begin + buffer.nbytes <= p.offset + p.nbytes)
        assert part.first <= buffer.first
    used = sum(buffer.nbytes for buffer in package.buffers if buffer.kind is BufferKind.WEIGHT)
    assert used <= sum(part.nbytes for part in weights.parts) <= weights.nbytes == weight_bytes(package) <= image.nbytes
    image.free()


def test_a_package_without_weights_is_refused(gpu: Any) -> None:
    with pytest.raises(MisuseError, match="no weights to keep on the host"):
        load_image(synthetic_package("synthetic-tiny", gpu.info), None, gpu, tenant="one")
