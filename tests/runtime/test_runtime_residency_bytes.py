"""Weights that wait on the host, byte for byte: what is read is what was on the host, whoever displaces whom."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from missile.gpu import open_gpu
from missile.gpu.interface import Copy, Event, Gpu
from missile.pcie.engine import CopyEngine, EngineOptions
from missile.pcie.streamed import StreamedCopies
from missile.pcie.weights import MIB, Share
from missile.runtime.host_weights import HostWeights, Part
from missile.runtime.residency import Residency

SIZE, PART = 16 * MIB, 2 * MIB
OFFSETS = (0, 8 * MIB, 16 * MIB)  # the first and the last displace the one between them only
REQUESTS = 60


@pytest.fixture(params=["sim:h200", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    with open_gpu(request.param) as opened:
        yield opened


@pytest.mark.parametrize("scheduled", [True, False], ids=["scheduled", "plain"])
def test_every_request_reads_its_own_weights(gpu: Gpu, scheduled: bool) -> None:
    assert read_wrong(gpu, scheduled) == []


def read_wrong(gpu: Gpu, scheduled: bool) -> list[int]:
    """Requests whose "kernels", copies of each part to an output, got something else. Half of them come in two pieces."""
    names = ["a", "b", "c"]
    rng = random.Random(0)
    with ExitStack() as undo:
        memory = gpu.allocate(OFFSETS[-1] + SIZE)
        undo.callback(memory.free)
        weights, outputs, results = [], [], []
        for number, offset in enumerate(OFFSETS):
            image, output = gpu.allocate_host(SIZE), gpu.allocate(SIZE)
            undo.callback(image.free)
            undo.callback(output.free)
            image.array[:] = np.random.default_rng(number).integers(0, 256, SIZE, np.uint8)
            parts = tuple(Part(at, PART, at // PART) for at in range(0, SIZE, PART))
            weights.append(HostWeights(image, memory.address + offset, SIZE, parts))
            outputs.append(output)
        copies = None
        if scheduled:
            engine = undo.enter_context(CopyEngine(gpu, EngineOptions(h2d_rate=50e9, d2h_rate=50e9)))
            copies = StreamedCopies(gpu, engine)
            undo.callback(copies.close)
            for name in names:
                copies.admit(name, Share())
        residency = Residency(gpu, names, weights, copies)
        undo.callback(residency.close)
        lanes = [gpu.create_stream() for _ in names]
        tails: list[Event | None] = [None] * len(names)
        for _ in range(REQUESTS):
            tenant = rng.randrange(len(names))
            stream, mine, result = lanes[tenant], weights[tenant], gpu.allocate_host(SIZE)
            undo.callback(result.free)
            pieces = [range(8)] if rng.random() < 0.5 else [range(4), range(4, 8)]
            for piece in pieces:
                residency.bring(tenant, tails)
                for part in piece:
                    residency.gate(tenant, stream, part + 1)
                    at = part * PART
                    stream.launch(Copy(outputs[tenant].address + at, mine.address + at, PART))
                tail = tails[tenant] = tails[tenant] or gpu.create_event(timing=False)
                stream.record(tail)
                other = rng.randrange(len(names))
                if other != tenant and len(pieces) == 2 and piece is pieces[0]:
                    residency.bring(other, tails)  # in the middle of the request
            stream.copy_to_host(result, outputs[tenant].address)
            results.append((tenant, result))
            if copies is not None:
                copies.wait([], gpu.now_ns() + 50_000)
        for stream in lanes:
            while not stream.idle():
                if copies is not None:
                    copies.wait([], gpu.now_ns() + 50_000)
        if copies is not None:
            copies.drain(gpu.now_ns() + 1_000_000_000)
        gpu.synchronize()
        wrong = [
            index
            for index, (tenant, result) in enumerate(results)
            if not np.array_equal(result.array, weights[tenant].image.array[:SIZE])
        ]
        assert sum(len(residency.cold_starts(tenant)) for tenant in range(len(names))) > REQUESTS // 4
        for tail in tails:
            if tail is not None:
                tail.close()
        for stream in lanes:
            stream.close()
        return wrong
