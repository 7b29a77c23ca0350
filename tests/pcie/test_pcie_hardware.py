"""The copy engine on a real GPU: both kinds of lane, pageable memory, a thread of its own, and copies in streams' order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest

from missile.gpu import open_gpu
from missile.gpu.interface import Copy, Gpu
from missile.pcie.engine import CopyEngine, EngineOptions
from missile.pcie.runner import CopyThread
from missile.pcie.streamed import StreamedCopies
from missile.pcie.ticket import CopyState, CopyTicket
from missile.pcie.weights import MIB, Share

pytestmark = pytest.mark.gpu

SECOND = 10**9


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    with open_gpu("cuda:0") as opened:
        yield opened


@pytest.fixture(params=[True, False], ids=["native", "python"])
def options(request: pytest.FixtureRequest) -> EngineOptions:
    return EngineOptions(h2d_rate=50e9, d2h_rate=50e9, native=request.param, ahead=32 * MIB, h2d_bypass=16 << 10)


def test_every_byte_arrives(gpu: Gpu, options: EngineOptions) -> None:
    rng = np.random.default_rng(0)
    with CopyEngine(gpu, options, executor=ThreadPoolExecutor(4)) as engine:
        for name, share in (("a", Share()), ("b", Share(limit=5e9)), ("ls", Share(latency_sensitive=True))):
            engine.admit(name, share)
        made = []
        for index in range(40):
            size = int(rng.integers(1, 1 << int(rng.integers(4, 26))))
            tenant = ("a", "b", "ls")[index % 3]
            data = rng.integers(0, 256, size, dtype=np.uint8)
            device, source, back = gpu.allocate(size), gpu.allocate_host(size), gpu.allocate_host(size)
            source.array[:] = data
            there = engine.to_device(tenant, device, source if index % 2 else data)
            target = back if index % 4 < 2 else np.zeros(size, np.uint8)
            made.append((tenant, data, device, source, back, target, there))
        engine.run_until_idle(10 * SECOND)
        tickets = [engine.to_host(tenant, target, device) for tenant, _, device, _, _, target, _ in made]
        engine.run_until_idle(10 * SECOND)
        for (_, data, device, source, back, target, there), ticket in zip(made, tickets, strict=True):
            assert there.state is ticket.state is CopyState.DONE
            assert np.array_equal(target if isinstance(target, np.ndarray) else target.array, data)
            for memory in (device, source, back):
                memory.free()


def test_a_thread_of_its_own_under_load_with_pageable_copies_beside(gpu: Gpu, options: EngineOptions) -> None:
    host, device = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
    ordinary, small = np.full(8 * MIB, 3, np.uint8), gpu.allocate(8 * MIB)
    moved = []

    def again(ticket: CopyTicket) -> None:
        moved.append(ticket.copied)
        if ticket.state is CopyState.DONE and time.monotonic() < end:
            engine.to_device("bulk", device, host).add_done_callback(again)

    with CopyEngine(gpu, options, executor=ThreadPoolExecutor(4)) as engine:
        engine.admit("bulk")
        engine.admit("ls", Share(latency_sensitive=True))
        with CopyThread(engine) as thread:
            end = time.monotonic() + 0.5
            for _ in range(2):
                engine.to_device("bulk", device, host).add_done_callback(again)
            futures = []
            while time.monotonic() < end:
                futures.append(engine.to_device("ls", small, ordinary).future())
                time.sleep(0.01)
            wait(futures, timeout=10)
        assert thread.error is None
        assert all(future.result().state is CopyState.DONE for future in futures)
        assert sum(moved) / 0.5 > 20e9
    back = np.zeros_like(ordinary)
    with CopyEngine(gpu, options) as engine:
        engine.admit("ls")
        ticket = engine.to_host("ls", back, small)
        engine.run_until_idle(10 * SECOND)
    assert ticket.state is CopyState.DONE
    assert np.array_equal(back, ordinary)
    for memory in (host, device, small):
        memory.free()


def test_streams_see_their_copies_in_their_own_order(gpu: Gpu, options: EngineOptions) -> None:
    with CopyEngine(gpu, options) as engine:
        copies = StreamedCopies(gpu, engine)
        copies.admit("ls", Share(latency_sensitive=True))
        engine.admit("flood")
        bulk, flood_host = gpu.allocate(256 * MIB), gpu.allocate_host(256 * MIB)
        flood = engine.to_device("flood", bulk, flood_host)
        stream, size = gpu.create_stream(), MIB
        inside, result = gpu.allocate(size), gpu.allocate(size)
        inputs, outputs = ([gpu.allocate_host(size) for _ in range(8)] for _ in range(2))
        ends = [gpu.create_event() for _ in range(9)]
        stream.record(ends[0])
        begin = gpu.now_ns()
        for number, (source, target) in enumerate(zip(inputs, outputs, strict=True)):
            source.array[:] = number + 1
            copies.to_device("ls", stream, inside.address, source, after=ends[number])
            stream.launch(Copy(result.address, inside.address, size))
            copies.to_host("ls", stream, target, result.address)
            stream.record(ends[number + 1])
        while not ends[-1].done():
            copies.wait([ends[-1]], begin + 5 * SECOND)
            assert gpu.now_ns() < begin + 5 * SECOND
        for number, target in enumerate(outputs):
            assert np.all(target.array == number + 1)
        engine.run_until_idle(10 * SECOND)
        assert flood.state is CopyState.DONE
        copies.close()
        for memory in (bulk, flood_host, inside, result, *inputs, *outputs):
            memory.free()
