"""The copy engine on the simulated link: bytes, isolation of failures, stopping, and the policy's promises on the wire."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missile.errors import GpuError, MisuseError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.pcie.engine import CopyEngine, EngineOptions, Stop
from missile.pcie.lane import ChunkRecord
from missile.pcie.policy import Granularity
from missile.pcie.ticket import CopyState, CopyTicket, Direction, Span
from missile.pcie.weights import MIB, Share, nice_weight

OPTIONS = EngineOptions(h2d_rate=54e9, d2h_rate=54e9)
TINY = EngineOptions(
    h2d_rate=54e9,
    d2h_rate=54e9,
    granularity=Granularity(solo=4096, shared=2048, short=1024, credit=1024, latency_sensitive_credit=4096),
    staging_slots=3,
    staging_slot_bytes=512,
)


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h100") as opened:
        yield opened


@pytest.fixture
def engine(gpu: Gpu) -> Iterator[CopyEngine]:
    with CopyEngine(gpu, OPTIONS) as made:
        for name in ("a", "b", "c"):
            made.admit(name)
        yield made


@settings(max_examples=40, deadline=None)
@given(
    copies=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "ls"]),
            st.booleans(),
            st.integers(0, 9000),
            st.integers(0, 50),
            st.integers(0, 50),
        ),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 99),
)
def test_every_byte_arrives_where_it_should(gpu: Gpu, copies, seed: int) -> None:
    """Pinned and pageable copies of any size and offset, interleaved, there and back."""
    rng = np.random.default_rng(seed)
    with CopyEngine(gpu, TINY) as engine:
        engine.admit("a")
        engine.admit("b", Share(limit=1e9, burst_bytes=700))
        engine.admit("ls", Share(latency_sensitive=True))
        made = []
        for tenant, pinned, size, near, far in copies:
            data = rng.integers(0, 256, size + near, dtype=np.uint8)
            if pinned:
                source, target = (gpu.allocate_host(max(1, size + near)) for _ in range(2))
                source.array[: size + near] = data
                target.array[:] = 7
            else:
                source, target = data.copy(), np.full(size + near, 7, np.uint8)
            device = gpu.allocate(max(1, size + far))
            ticket = engine.to_device(tenant, device, source, target_offset=far, source_offset=near, nbytes=size)
            made.append((tenant, data[near:], source, target, device, ticket, near, far, size))
        engine.run_until_idle()
        back = []
        for tenant, data, _, target, device, ticket, near, far, size in made:
            assert (ticket.state, ticket.copied) == (CopyState.DONE, size)
            copy = engine.to_host(tenant, target, device, source_offset=far, target_offset=near, nbytes=size)
            back.append((copy, data, target, near))
        engine.run_until_idle()
        for copy, data, target, near in back:
            assert copy.state is CopyState.DONE
            got = (target if isinstance(target, np.ndarray) else target.array)[: near + len(data)]
            np.testing.assert_array_equal(got[near:], data)
            assert (got[:near] == 7).all()
        assert engine.step() is None  # idle
        assert not engine.busy
        for _, _, source, target, device, *_ in made:
            device.free()
            for side in (source, target):
                if not isinstance(side, np.ndarray):
                    side.free()


def test_a_kernel_can_wait_for_a_copy_on_the_device(gpu: Gpu, engine: CopyEngine) -> None:
    host, device = gpu.allocate_host(32 * MIB), gpu.allocate(32 * MIB)
    copy = engine.to_device("a", device, host)
    stream, after = gpu.create_stream(), gpu.create_event()
    with pytest.raises(MisuseError, match="that is queued"):
        copy.gate(stream)
    gated: list[bool] = []

    def gate(ticket: CopyTicket) -> None:
        gated.append(ticket.done)
        ticket.gate(stream)
        stream.record(after)

    copy.when_issued(gate)
    engine.run_until_idle()
    gpu.synchronize()
    assert gated == [False]  # the host was told before the bytes had arrived,
    assert after.time_ns() >= copy.submitted_ns + 32 * MIB / 55e9 * 1e9  # the stream went on after
    copy.gate(stream)  # done: nothing to wait for


def test_a_copy_can_wait_for_a_kernel_without_holding_up_others(gpu: Gpu, engine: CopyEngine) -> None:
    host, device = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
    stream, event = gpu.create_stream(), gpu.create_event()
    stream.copy_to_host(host, device.address)  # stands for a kernel: about 1.2 ms
    stream.record(event)
    late = engine.to_device("a", device, host, nbytes=4096, after=event)
    prompt = engine.to_device("b", device, host, nbytes=4096)
    engine.run_until_idle()
    assert prompt.finished_ns - prompt.submitted_ns < 100_000
    assert late.issued_ns >= event.time_ns() - 2_000  # issued within the step that began then


def _failing(engine: CopyEngine, error: GpuError, *, after: int) -> None:
    """After `after` copies, the H2D lane's stream refuses one with `error`."""
    lane = engine.lanes[Direction.H2D]
    stream = lane._flight._streams[0]
    count = itertools.count()

    class Faulty:
        def __getattr__(self, name: str):
            return getattr(stream, name)

        def copy_to_device(self, *args, **kwargs) -> None:
            if next(count) == after:
                raise error
            stream.copy_to_device(*args, **kwargs)

    lane._flight._streams = (Faulty(), lane._flight._streams[1])


def test_a_failing_copy_fails_alone(gpu: Gpu, engine: CopyEngine) -> None:
    host, device = gpu.allocate_host(32 * MIB), gpu.allocate(32 * MIB)
    _failing(engine, GpuError("cuMemcpyHtoDAsync", "CUDA_ERROR_INVALID_VALUE"), after=3)
    copies = [engine.to_device(name, device, host) for name in ("a", "b", "c")]
    again = [engine.to_device(name, device, host, nbytes=MIB) for name in ("a", "b", "c")]
    engine.run_until_idle()
    states = [copy.state for copy in copies]
    assert sorted(states) == ["done", "done", "failed"]
    failed = copies[states.index(CopyState.FAILED)]
    assert failed.copied < failed.nbytes
    with pytest.raises(GpuError, match="INVALID_VALUE"):
        failed.future().result(0)
    assert all(copy.state is CopyState.DONE for copy in again)


def test_losing_the_gpu_fails_every_copy_and_says_so(gpu: Gpu, engine: CopyEngine) -> None:
    host, device = gpu.allocate_host(32 * MIB), gpu.allocate(32 * MIB)
    lost = GpuError("cuMemcpyHtoDAsync", "CUDA_ERROR_ILLEGAL_ADDRESS", usable="nothing")
    _failing(engine, lost, after=3)
    copies = [engine.to_device(name, device, host) for name in ("a", "b", "c")]
    copies.append(engine.to_host("a", host, device))
    with pytest.raises(GpuError, match="context is lost"):
        engine.run_until_idle()
    assert {(copy.state, copy.error) for copy in copies} == {(CopyState.FAILED, lost)}
    with pytest.raises(GpuError):
        engine.to_device("a", device, host)


def test_cancelling_drops_what_the_gpu_does_not_have_yet(gpu: Gpu, engine: CopyEngine) -> None:
    host, device = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
    first, second, third = (engine.to_device("a", device, host) for _ in range(3))
    engine.step()
    second.cancel()  # queued behind another of the same tenant
    engine.step()
    assert second.state is CopyState.CANCELLED
    first.cancel()  # under way: the chunks that the GPU has arrive
    engine.run_until_idle()
    assert first.state is CopyState.CANCELLED
    assert 0 <= first.copied < first.nbytes
    assert third.state is CopyState.DONE
    third.cancel()
    engine.step()
    assert third.state is CopyState.DONE
    assert engine.statistics()[0].totals.cancelled == 2


def test_a_tenant_that_disappears_frees_its_queue(gpu: Gpu, engine: CopyEngine) -> None:
    host, device = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
    gone = [engine.to_device("a", device, host) for _ in range(4)]
    stays = engine.to_device("b", device, host)
    engine.step()
    engine.remove("a")
    with pytest.raises(MisuseError, match="Unknown PCIe tenant 'a'; registered: b, c"):
        engine.to_device("a", device, host)
    engine.run_until_idle()
    assert stays.state is CopyState.DONE
    assert all(copy.state is CopyState.CANCELLED for copy in gone)
    assert stays.finished_ns - stays.submitted_ns < 1.3 * 64 * MIB / 54e9 * 1e9  # it did not wait for the dead


@pytest.mark.parametrize("how", list(Stop))
def test_stopping_loses_nothing_silently(gpu: Gpu, engine: CopyEngine, how: Stop) -> None:
    host, device = gpu.allocate_host(32 * MIB), gpu.allocate(32 * MIB)
    copies = [engine.to_device(name, device, host) for name in ("a", "b", "a")]
    pageable = engine.to_host("b", np.zeros(5 * MIB, np.uint8), device, nbytes=5 * MIB)
    engine.step()
    engine.stop(how)
    with pytest.raises(MisuseError, match="has been stopped"):
        engine.to_device("a", device, host)
    engine.close()
    assert all(copy.done for copy in [*copies, pageable])
    expected = CopyState.DONE if how is Stop.DRAIN else CopyState.CANCELLED
    assert {copy.state for copy in copies} == {expected}


def test_closing_in_flight_cancels(gpu: Gpu) -> None:
    host, device = gpu.allocate_host(32 * MIB), gpu.allocate(32 * MIB)
    with CopyEngine(gpu, OPTIONS) as engine:
        engine.admit("a")
        copy = engine.to_device("a", device, host)
        engine.step()
    assert copy.state is CopyState.CANCELLED
    assert copy.copied > 0


def test_bad_copies_are_refused_and_change_nothing(gpu: Gpu, engine: CopyEngine) -> None:
    host, device = gpu.allocate_host(MIB), gpu.allocate(MIB)
    cases = [
        ("device memory of 1048576", lambda: engine.to_device("a", device, host, target_offset=1, nbytes=MIB)),
        ("host memory of 1048576", lambda: engine.to_device("a", device, host, source_offset=8, nbytes=MIB)),
        ("A copy of -1 bytes", lambda: engine.to_host("a", host, device, nbytes=-1)),
        ("leaves the device", lambda: engine.to_host("a", host, Span(device.address, 8), nbytes=16)),
        ("Unknown PCIe tenant 'x'", lambda: engine.to_device("x", device, host)),
        ("C-contiguous", lambda: engine.to_device("a", device, np.zeros((8, 8), np.uint8)[:, :4])),
    ]
    for says, make in cases:
        with pytest.raises(MisuseError, match=says):
            make()
    with pytest.raises(MisuseError, match="already registered"):
        engine.admit("a")
    with pytest.raises(MisuseError, match="sum to"):
        engine.admit("greedy", Share(), d2h=Share(minimum=99e9))
    engine.admit("greedy")  # the refusal left no half of it behind
    assert not engine.busy
    with CopyEngine(gpu, EngineOptions(h2d_rate=1e9, d2h_rate=1e9, staging_slots=0)) as strict:
        strict.admit("a")
        with pytest.raises(MisuseError, match="must be pinned memory"):
            strict.to_device("a", device, np.zeros(8, np.uint8))


# --- the policy's promises, on the wire


def _flood(gpu: Gpu, engine: CopyEngine, tenants: list[str], duration_ns: int) -> list[ChunkRecord]:
    """Every tenant always has copies waiting; returns the chunks that arrived."""
    host, device = gpu.allocate_host(32 * MIB), gpu.allocate(32 * MIB)
    engine.record_chunks()
    end = gpu.now_ns() + duration_ns

    def again(ticket: CopyTicket) -> None:
        if gpu.now_ns() < end:
            engine.to_device(ticket.tenant, device, host).add_done_callback(again)

    for tenant in tenants:
        for _ in range(2):
            engine.to_device(tenant, device, host).add_done_callback(again)
    while gpu.now_ns() < end:
        due = engine.step()
        gpu.wait(engine.events(), due)
    records = engine.recorded_chunks()
    engine.stop(Stop.CANCEL)
    engine.close()
    return [record for record in records if record.done_ns <= end]


def _windows(records: list[ChunkRecord], window_ns: int) -> Iterator[dict[str, int]]:
    begin, end = records[0].done_ns, records[-1].done_ns
    start = begin + 5_000_000
    while start + window_ns <= end:
        bytes_of: dict[str, int] = {}
        for record in records:
            if start <= record.done_ns < start + window_ns:
                bytes_of[record.tenant] = bytes_of.get(record.tenant, 0) + record.nbytes
        yield bytes_of
        start += window_ns // 7


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 4.0), (1.0, 10.0), (nice_weight(0), nice_weight(5))])
def test_shares_on_the_wire_over_any_100_ms(gpu: Gpu, weights: tuple[float, ...]) -> None:
    engine = CopyEngine(gpu, OPTIONS)
    names = [f"t{index}" for index in range(len(weights))]
    for name, weight in zip(names, weights, strict=True):
        engine.admit(name, Share(weight=weight))
    records = _flood(gpu, engine, names, 220_000_000)
    for served in _windows(records, 100_000_000):
        total = sum(served.values())
        assert total >= 0.95 * 0.1 * 54e9  # full
        for name, weight in zip(names, weights, strict=True):
            assert served[name] / total == pytest.approx(weight / sum(weights), rel=0.02)
        if len(set(weights)) == 1:
            assert total**2 / (len(names) * sum(n * n for n in served.values())) >= 0.99  # Jain's index


def test_limits_and_minimums_on_the_wire(gpu: Gpu) -> None:
    engine = CopyEngine(gpu, OPTIONS)
    engine.admit("promised", Share(weight=0.05, minimum=10e9))
    engine.admit("limited", Share(weight=50, limit=4e9, burst_bytes=8 * MIB))
    engine.admit("flood", Share(weight=20))
    records = _flood(gpu, engine, ["promised", "limited", "flood"], 150_000_000)
    for served in _windows(records, 50_000_000):
        assert served["promised"] >= 10e9 * 0.05 - 5 * OPTIONS.granularity.shared
        assert served["limited"] <= 4e9 * 0.05 + 8 * MIB + 2 * OPTIONS.granularity.shared
        assert served["limited"] >= 0.9 * 4e9 * 0.05
        assert sum(served.values()) >= 0.95 * 0.05 * 54e9  # what a limit leaves is not lost


@pytest.mark.parametrize(("nbytes", "bound_us"), [(MIB, 150), (4096, 100)])
def test_latency_sensitive_copies_beside_three_bulk_tenants(gpu: Gpu, nbytes: int, bound_us: int) -> None:
    engine = CopyEngine(gpu, OPTIONS)
    for name in ("a", "b", "c"):
        engine.admit(name)
    engine.admit("ls", Share(latency_sensitive=True))
    host, device = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
    for name in ("a", "b", "c"):
        for _ in range(30):
            engine.to_device(name, device, host)
    rng = np.random.default_rng(0)
    latencies = []
    for _ in range(60):
        arrival = gpu.now_ns() + int(rng.exponential(300_000))
        while gpu.now_ns() < arrival:
            due = engine.step()
            assert due is not None  # the bulk tenants must still be at it
            gpu.wait([], min(due, arrival))
        copy = engine.to_device("ls", device, host, nbytes=nbytes)
        while not copy.done:
            due = engine.step()
            if not copy.done:
                gpu.wait(engine.events(), due)
        latencies.append((gpu.now_ns() - arrival) / 1e3)
    assert max(latencies) <= bound_us
    assert engine.lanes[Direction.H2D].queued("a") > 0
    engine.close()


def test_an_owner_who_sleeps_as_told_looks_a_few_times_a_chunk_though_the_link_is_slower_than_measured(
    gpu: Gpu,
) -> None:
    """The estimate of arrivals is put right by each of them: it must not run ahead of the link until everybody polls."""
    chunk, chunks = 4 * MIB, 64
    options = EngineOptions(h2d_rate=60e9, d2h_rate=60e9, granularity=Granularity(solo=chunk, shared=chunk))
    with CopyEngine(gpu, options) as engine:
        engine.admit("a")
        ticket = engine.to_device("a", gpu.allocate(chunks * chunk), gpu.allocate_host(chunks * chunk))
        begin, steps = gpu.now_ns(), 0
        while not ticket.done:
            due = engine.step()
            steps += 1
            if due is not None:
                gpu.wait([], due)
        assert steps < 4 * chunks
        assert gpu.now_ns() - begin < 1.1 * chunks * chunk / 52e9 * 1e9
