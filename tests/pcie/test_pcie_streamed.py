"""Copies of the engine in streams' order, on the simulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest

from missile.errors import GpuError
from missile.gpu import open_gpu
from missile.gpu.interface import Copy, DeviceBuffer, Event, Gpu, HostBuffer, Stream
from missile.pcie.engine import CopyEngine, EngineOptions
from missile.pcie.streamed import StreamedCopies
from missile.pcie.ticket import CopyState
from missile.pcie.weights import MIB, Share


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h100") as opened:
        yield opened


def _until(copies: StreamedCopies, gpu: Gpu, event: Event) -> None:
    limit = gpu.now_ns() + 10**9
    while not event.done():
        copies.wait([event], limit)
        assert gpu.now_ns() < limit


def test_a_stream_sees_its_copies_in_its_own_order_while_others_queue(gpu: Gpu) -> None:
    """Input, work on it, output, and the next input into the same memory, all given at once behind a flood."""
    with CopyEngine(gpu, EngineOptions(h2d_rate=54e9, d2h_rate=54e9)) as engine:
        copies = StreamedCopies(gpu, engine)
        copies.admit("ls", Share(latency_sensitive=True))
        engine.admit("flood")
        flood = engine.to_device("flood", gpu.allocate(256 * MIB), gpu.allocate_host(256 * MIB))
        stream, done = gpu.create_stream(), gpu.create_event()
        size = MIB
        inside, result = gpu.allocate(size), gpu.allocate(size)
        inputs = [gpu.allocate_host(size) for _ in range(3)]
        outputs = [gpu.allocate_host(size) for _ in range(3)]
        after = None
        begin = gpu.now_ns()
        for number, (source, target) in enumerate(zip(inputs, outputs, strict=True)):
            source.array[:] = number + 1
            copies.to_device("ls", stream, inside.address, source, after=after)
            stream.launch(Copy(result.address, inside.address, size))
            copies.to_host("ls", stream, target, result.address)
            after = gpu.create_event()
            stream.record(after)
        stream.record(done)
        assert gpu.now_ns() - begin < 1_000_000  # the host has waited for nothing
        _until(copies, gpu, done)
        for number, target in enumerate(outputs):
            assert np.all(target.array == number + 1)
        assert not flood.done  # and it did not stand behind the flood
        assert done.time_ns() - begin < 1_000_000
        engine.run_until_idle()
        assert flood.state is CopyState.DONE
        copies.close()


class _Scene(NamedTuple):
    """An LS tenant's stream with a buffer of 1 MiB on either side, and a BE tenant's with 64 MiB."""

    engine: CopyEngine
    copies: StreamedCopies
    stream: Stream
    other: Stream
    short: HostBuffer
    long: HostBuffer
    inside: DeviceBuffer
    outside: DeviceBuffer


@contextmanager
def _two_tenants(gpu: Gpu, *, stays: int = 0) -> Iterator[_Scene]:
    with CopyEngine(gpu, EngineOptions(h2d_rate=54e9, d2h_rate=54e9)) as engine:
        copies = StreamedCopies(gpu, engine, stays=stays)
        copies.admit("ls", Share(latency_sensitive=True))
        copies.admit("be", Share())
        short, long = gpu.allocate_host(MIB), gpu.allocate_host(64 * MIB)
        inside, outside = gpu.allocate(short.nbytes), gpu.allocate(long.nbytes)
        yield _Scene(engine, copies, gpu.create_stream(), gpu.create_stream(), short, long, inside, outside)


def test_a_short_copy_that_finds_the_link_idle_stays_in_its_stream(gpu: Gpu) -> None:
    with _two_tenants(gpu) as (engine, copies, stream, other, short, long, inside, outside):
        mark = gpu.create_event(timing=False)
        assert copies.to_device("ls", stream, inside.address, short) is None
        stream.record(mark)
        queued = copies.to_device("ls", stream, inside.address, short, after=mark)
        assert queued is not None  # the stream is not ready for it yet
        _until(copies, gpu, _recorded(gpu, stream))
        assert copies.to_device("be", other, outside.address, long) is not None  # it would hold others up
        assert copies.to_device("ls", stream, inside.address, short) is not None  # and does
        _until(copies, gpu, _recorded(gpu, stream))
        _until(copies, gpu, _recorded(gpu, other))
        engine.run_until_idle()
        totals = {row.tenant: row.totals.bytes for row in engine.statistics() if row.totals.bytes}
        assert totals == {"ls": 3 * MIB, "be": 64 * MIB}
        copies.close()


def test_short_copies_stay_in_their_streams_until_somebody_copies_much_at_once(gpu: Gpu) -> None:
    with _two_tenants(gpu, stays=MIB) as (engine, copies, stream, other, short, long, inside, outside):
        for _ in range(3):  # each behind the output of the one before, which has not ended
            before = _recorded(gpu, stream)
            assert copies.to_device("ls", stream, inside.address, short, after=before) is None
            assert copies.to_host("ls", stream, short, inside.address) is None
        assert copies.to_device("be", other, outside.address, long) is not None
        assert (
            copies.to_device("ls", stream, inside.address, short) is not None
        )  # does not wait for all of the long one
        assert copies.to_host("ls", stream, short, inside.address) is None  # nobody copies much in this direction
        done = _recorded(gpu, stream)
        begin = gpu.now_ns()
        _until(copies, gpu, done)
        assert gpu.now_ns() - begin < 500_000 < 64 * MIB / 54
        _until(copies, gpu, _recorded(gpu, other))
        engine.run_until_idle()
        totals = {
            (row.tenant, str(row.direction)): row.totals.copies for row in engine.statistics() if row.totals.copies
        }
        assert totals == {("ls", "h2d"): 4, ("ls", "d2h"): 4, ("be", "h2d"): 1}
        copies.close()


def test_a_long_output_that_waits_for_its_streams_work_holds_no_short_one_up(gpu: Gpu) -> None:
    with _two_tenants(gpu, stays=MIB) as (engine, copies, stream, other, short, long, inside, outside):
        gate = gpu.create_latch()
        other.wait_latch(gate, 1)  # work that takes a while
        output = copies.to_host("be", other, long, outside.address)
        assert output is not None
        engine.step()
        assert engine.busy
        assert copies.to_host("ls", stream, short, inside.address) is None
        _until(copies, gpu, _recorded(gpu, stream))
        assert output.state is CopyState.QUEUED
        gpu.create_stream().raise_latch(gate, 1)
        while output.state is CopyState.QUEUED:
            copies.wait([], gpu.now_ns() + 10_000)
        assert copies.to_host("ls", stream, short, inside.address) is not None  # now it goes
        engine.run_until_idle()
        copies.close()


def _recorded(gpu: Gpu, stream: Stream) -> Event:
    event = gpu.create_event(timing=False)
    stream.record(event)
    return event


def test_a_failed_copy_is_raised_with_its_tenant_and_lets_the_stream_go_on(gpu: Gpu) -> None:
    with CopyEngine(gpu, EngineOptions(h2d_rate=54e9, d2h_rate=54e9)) as engine:
        copies = StreamedCopies(gpu, engine)
        copies.admit("a", Share())
        host = gpu.allocate_host(8 * MIB)
        stream, done = gpu.create_stream(), gpu.create_event()
        original = stream.copy_to_device
        try:
            type(stream).copy_to_device = _refuse
            copies.to_device("a", stream, gpu.allocate(8 * MIB).address, host)
        finally:
            type(stream).copy_to_device = original.__func__
        stream.record(done)
        with pytest.raises(GpuError) as raised:
            _until(copies, gpu, done)
        assert raised.value.tenant == "a"
        _until(copies, gpu, done)
        copies.close()


def _refuse(*_: object, **__: object) -> None:
    raise GpuError("cuMemcpyHtoDAsync", "CUDA_ERROR_INVALID_VALUE")
