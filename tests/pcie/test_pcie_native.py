"""The hot loop in C: the same decisions as the Python policy, and the engine on top of it, over a driver that pretends."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missile.errors import GpuError, MisuseError
from missile.gpu.calls import DriverCalls
from missile.pcie.engine import CopyEngine, EngineOptions, Stop
from missile.pcie.load import Bulk, Requests, Source, run_load
from missile.pcie.native.build import Chunks, compile_shared, library
from missile.pcie.native.lane import ROW, share_of
from missile.pcie.policy import FLOOR_CHUNKS, FairLink, Granularity
from missile.pcie.ticket import CopyState, Direction, Span
from missile.pcie.weights import Share

RATE = 2e9  # of the pretended link, bytes/s
SMALL = Granularity(solo=8192, shared=4096, short=2048, credit=2048, latency_sensitive_credit=8192)
OPTIONS = EngineOptions(h2d_rate=RATE, d2h_rate=RATE, granularity=SMALL, staging_slots=4, staging_slot_bytes=1024)

compiled, why_not = library()
pytestmark = pytest.mark.skipif(compiled is None, reason=f"no compiled hot loop: {why_not}")


# --- the policy

shares = st.builds(
    lambda weight, sensitive, limit, minimum, burst: Share(
        weight=weight,
        latency_sensitive=sensitive,
        limit=None if limit is None else max(limit, minimum),
        minimum=minimum,
        burst_bytes=burst,
    ),
    st.sampled_from([0.05, 0.25, 1.0, 3.7, 20.0]),
    st.booleans(),
    st.none() | st.floats(1e6, 1e9),
    st.sampled_from([0.0, 0.0, 1e6, 2e8]),
    st.integers(500, 20_000),
)
moves = st.lists(
    st.tuples(
        st.sampled_from(["wake", "sleep", "pick", "pick", "pick", "leave", "join"]),
        st.integers(0, 5),
        st.integers(1, 9000),
        st.integers(0, 40_000),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(shares, min_size=1, max_size=6), moves)
def test_the_c_policy_decides_as_pythons(given_shares: list[Share], trace: list[tuple[str, int, int, int]]) -> None:
    fair = FairLink(RATE, SMALL)
    native = compiled.fair_open(ctypes.byref(Chunks(SMALL.solo, SMALL.shared, SMALL.short)))
    flows: dict[str, int] = {}
    out = (ctypes.c_int64 * 4)()
    now = 0

    def join(name: str, share: Share) -> None:
        fair.admit(name, share)
        flows[name] = compiled.fair_call_admit(native, ctypes.byref(share_of(share, fair)), FLOOR_CHUNKS)

    try:
        for index, share in enumerate(given_shares):
            join(str(index), share)
        for move, who, nbytes, later in trace:
            now += later
            name = str(who)
            if move == "join" and name not in flows and who < len(given_shares):
                join(name, given_shares[who])
            elif name not in flows and move != "pick":
                continue
            elif move == "wake":
                fair.wake(name, now)
                compiled.fair_call_wake(native, flows[name], now)
            elif move == "sleep":
                fair.sleep(name, now)
                compiled.fair_call_sleep(native, flows[name], now)
            elif move == "leave":
                fair.remove(name)
                compiled.fair_call_remove(native, flows.pop(name), now)
            elif move == "pick":
                pick = fair.pick(now)
                compiled.fair_call_pick(native, now, nbytes, out)
                if pick is None:
                    assert out[0] == -1
                else:
                    fair.charge(pick, min(nbytes, pick.quantum))
                    expected = (flows[pick.tenant], pick.quantum, pick.latency_sensitive, pick.due)
                    assert tuple(out) == expected
            eligible = fair.next_eligible(now)
            assert compiled.fair_call_next(native, now) == (-1 if eligible is None else eligible)
            for known, flow in flows.items():
                assert compiled.fair_call_lag(native, flow) == fair.lag(known)
    finally:
        compiled.fair_close(native)


# --- the engine over it


class Buffer:
    def __init__(self, nbytes: int) -> None:
        self.array = np.zeros(nbytes, np.uint8)
        self.address = self.array.ctypes.data
        self.nbytes = nbytes

    def free(self) -> None: ...


class PretendedGpu:
    """As much of a `Gpu` as the engine asks for; device memory is host memory."""

    info = SimpleNamespace(simulated=False)

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._streams = 0

    def driver_calls(self) -> DriverCalls:
        def address(name: str) -> int:
            return ctypes.cast(getattr(self._driver, f"fake_{name}"), ctypes.c_void_p).value or 0

        return DriverCalls(
            **{name: address(name) for name in ("set_context", "to_device", "to_host", "record", "query", "write")},
            context=1,
            event_handle=lambda event: event.handle,
            failure=lambda call, code: GpuError(call, str(code), usable="nothing" if code >= 700 else "gpu"),
        )

    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def create_stream(self, **_: object) -> Any:
        self._streams += 1
        raised = lambda latch, value: latch.array.view(np.uint32).__setitem__(0, value)  # noqa: E731
        return SimpleNamespace(handle=self._streams % 15 + 1, close=lambda: None, raise_latch=raised)

    def create_event(self, *, timing: bool = True) -> Any:
        word = ctypes.c_int64(0)
        done = lambda: word.value <= time.perf_counter_ns()  # noqa: E731
        return SimpleNamespace(word=word, handle=ctypes.addressof(word), done=done, close=lambda: None)

    def allocate_host(self, nbytes: int, *, tenant: str = "") -> Buffer:
        return Buffer(nbytes)

    def allocate(self, nbytes: int, *, tenant: str = "") -> Buffer:
        return Buffer(nbytes)

    def synchronize(self) -> None: ...

    def wait(self, events: object, deadline_ns: int) -> None:
        while time.perf_counter_ns() < deadline_ns:
            time.sleep(0)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("driver") / "driver.so"
    compile_shared({"driver.c": Path(__file__).with_name("fake_driver.c").read_bytes()}, target)
    loaded = ctypes.CDLL(str(target))
    loaded.fake_reset.argtypes = [ctypes.c_double]
    loaded.fake_copies.restype = ctypes.c_int64
    return loaded


@pytest.fixture
def gpu(driver: Any) -> PretendedGpu:
    driver.fake_reset(1e9 / RATE)
    return PretendedGpu(driver)


@pytest.fixture
def engine(gpu: PretendedGpu) -> Iterator[CopyEngine]:
    with CopyEngine(gpu, OPTIONS) as made:
        assert made.native
        for name in ("a", "b"):
            made.admit(name)
        made.admit("ls", Share(latency_sensitive=True))
        yield made


@settings(max_examples=30, deadline=None)
@given(
    copies=st.lists(
        st.tuples(st.sampled_from(["a", "b", "ls"]), st.booleans(), st.integers(0, 30_000), st.integers(0, 50)),
        min_size=1,
        max_size=10,
    ),
    threads=st.booleans(),
)
def test_every_byte_arrives(driver: Any, copies: list[tuple[str, bool, int, int]], threads: bool) -> None:
    driver.fake_reset(1e9 / RATE)
    rng = np.random.default_rng(0)
    pool = ThreadPoolExecutor(2) if threads else None
    with CopyEngine(PretendedGpu(driver), OPTIONS, executor=pool) as engine:
        for name in ("a", "b"):
            engine.admit(name)
        engine.admit("ls", Share(latency_sensitive=True))
        made = []
        for tenant, pinned, size, near in copies:
            source, device, back = Buffer(size + near + 1), Buffer(size + 1), Buffer(size + 1)
            source.array[:] = rng.integers(0, 256, source.nbytes)
            host = source if pinned else source.array
            there = engine.to_device(tenant, device, host, source_offset=near, nbytes=size)
            made.append((tenant, pinned, source.array[near : near + size], device, back, size, there))
        engine.run_until_idle(10**10)
        tickets = [
            engine.to_host(tenant, back if pinned else back.array, device, nbytes=size)
            for tenant, pinned, _, device, back, size, _ in made
        ]
        engine.run_until_idle(10**10)
        for (_, _, data, _, back, size, there), ticket in zip(made, tickets, strict=True):
            assert there.state is ticket.state is CopyState.DONE
            assert there.copied == ticket.copied == size
            assert np.array_equal(back.array[:size], data)
            assert not back.array[size:].any()
        moved = sum(row.totals.bytes for row in engine.statistics())
        assert moved == 2 * sum(size for *_, size, _ in made)
        assert not any(row.queued_bytes for row in engine.statistics())
    if pool is not None:
        pool.shutdown()


def test_the_link_is_kept_busy_while_python_does_something_else(engine: CopyEngine, driver: Any) -> None:
    host, device = Buffer(1_000_000), Buffer(1_000_000)
    engine.to_device("a", device, host)
    engine.step()
    given = driver.fake_copies()
    limit = time.monotonic() + 5
    while driver.fake_copies() < 1_000_000 // SMALL.short and time.monotonic() < limit:
        time.sleep(0.01)  # nobody steps
    assert given < 1_000_000 // SMALL.short
    assert driver.fake_copies() >= 1_000_000 // SMALL.short
    assert engine.lanes["h2d"].vitals().cpu_ns > 0
    engine.run_until_idle(10**10)  # the buffers must live until then


def test_weights_hold_on_the_wire(engine: CopyEngine) -> None:
    engine.remove("ls")
    engine.admit("heavy", Share(weight=3))
    host, device = Buffer(1 << 22), Buffer(1 << 22)
    engine.record_chunks()
    tickets = [engine.to_device(name, device, host) for name in ("a", "heavy")]
    engine.run_until_idle(10**10)
    assert all(ticket.done for ticket in tickets)
    order = [(record.tenant, record.nbytes) for record in engine.recorded_chunks()]
    assert sum(nbytes for _, nbytes in order) == 2 << 22
    got = {"a": 0, "heavy": 0}
    both = [index for index, (name, _) in enumerate(order) if name == "heavy"]
    for name, nbytes in order[both[0] + 8 : both[-1]]:  # the first was there before the other, and some credit is spent
        got[name] += nbytes
    assert got["heavy"] / got["a"] == pytest.approx(3, rel=0.03)


def test_a_copy_waits_for_its_event_and_holds_nobody_up(engine: CopyEngine, gpu: PretendedGpu) -> None:
    host, device = Buffer(1000), Buffer(1000)
    later = gpu.create_event()
    later.word.value = time.perf_counter_ns() + 30_000_000
    held = engine.to_device("a", device, host, after=later)
    behind = engine.to_device("a", device, host)
    engine.step()
    assert engine.busy
    other = engine.to_device("b", device, host)
    engine.run_until_idle(10**10)
    assert other.finished_ns < later.word.value <= held.issued_ns <= behind.issued_ns


def test_a_copy_that_waits_for_work_is_not_under_way(engine: CopyEngine, gpu: PretendedGpu) -> None:
    host, device = Buffer(1000), Buffer(1000)
    later = gpu.create_event()
    later.word.value = time.perf_counter_ns() + 30_000_000
    held = engine.to_device("a", device, host, after=later)
    engine.step()
    assert engine.busy
    assert not engine.underway(Direction.H2D)
    while not later.done():
        time.sleep(0.001)
    assert engine.underway(Direction.H2D) or held.state is not CopyState.QUEUED
    engine.run_until_idle(10**10)
    assert not engine.underway(Direction.H2D)


def test_a_latch_is_raised_behind_the_last_byte_and_also_without_it(engine: CopyEngine) -> None:
    host, device = Buffer(100_000), Buffer(100_000)
    latch = Buffer(8)
    for word, outcome in enumerate((CopyState.DONE, CopyState.CANCELLED, CopyState.FAILED), start=1):
        target = Span(8, host.nbytes) if outcome is CopyState.FAILED else device
        ticket = engine.to_device("a", target, host, raises=(latch, word))
        if outcome is CopyState.CANCELLED:
            ticket.cancel()
        assert latch.array.view(np.uint32)[0] < word
        engine.run_until_idle(10**10)
        assert ticket.state is outcome
        assert latch.array.view(np.uint32)[0] == word


def test_cancelling_ends_a_copy_wherever_it_stands(engine: CopyEngine) -> None:
    host, device = Buffer(1 << 22), Buffer(1 << 22)
    tickets = [engine.to_device("a", device, host) for _ in range(4)]
    pageable = engine.to_device("a", device, host.array)
    engine.step()
    for ticket in (tickets[0], tickets[2], pageable):
        ticket.cancel()
    engine.run_until_idle(10**10)
    assert [ticket.state for ticket in tickets] == [
        CopyState.CANCELLED,
        CopyState.DONE,
        CopyState.CANCELLED,
        CopyState.DONE,
    ]
    assert pageable.state is CopyState.CANCELLED
    assert tickets[0].copied < 1 << 22
    assert tickets[2].copied == 0


def test_a_tenant_that_leaves_takes_its_queue_along(engine: CopyEngine) -> None:
    host, device = Buffer(1 << 20), Buffer(1 << 20)
    gone = [engine.to_device("a", device, host) for _ in range(3)]
    stays = engine.to_device("b", device, host)
    engine.step()
    engine.remove("a")
    engine.admit("a", Share(weight=2))
    again = engine.to_device("a", device, host)
    engine.run_until_idle(10**10)
    assert {ticket.state for ticket in gone} == {CopyState.CANCELLED}
    assert stays.state is again.state is CopyState.DONE


def test_a_failing_copy_fails_alone(engine: CopyEngine) -> None:
    host, device = Buffer(4096), Buffer(4096)
    before = engine.to_device("a", device, host)
    broken = engine.to_device("a", Span(8, 4096), host)  # an address that the driver refuses
    after = engine.to_device("a", device, host)
    engine.run_until_idle(10**10)
    assert before.state is after.state is CopyState.DONE
    assert broken.state is CopyState.FAILED
    assert isinstance(broken.error, GpuError)


def test_a_lost_gpu_fails_everything_once(gpu: PretendedGpu, driver: Any) -> None:
    engine = CopyEngine(gpu, OPTIONS)
    engine.admit("a")
    host, device = Buffer(1 << 22), Buffer(1 << 22)
    tickets = [engine.to_device("a", device, host) for _ in range(3)]
    tickets.append(engine.to_host("a", host.array, device))
    engine.step()
    driver.fake_break(700)
    with pytest.raises(GpuError, match="700"):
        engine.run_until_idle(10**10)
    assert {ticket.state for ticket in tickets} == {CopyState.FAILED}
    with pytest.raises(GpuError):
        engine.to_device("a", device, host)
    engine.close()


@pytest.mark.parametrize("how", Stop)
def test_stopping_loses_nothing(engine: CopyEngine, how: Stop) -> None:
    host, device = Buffer(1 << 20), Buffer(1 << 20)
    tickets = [engine.to_device(name, device, memory) for name in ("a", "b") for memory in (host, host.array)]
    engine.step()
    engine.stop(how)
    engine.run_until_idle(10**10)
    assert all(ticket.done for ticket in tickets)
    if how is Stop.DRAIN:
        assert {ticket.state for ticket in tickets} == {CopyState.DONE}
    else:
        assert CopyState.CANCELLED in {ticket.state for ticket in tickets}
    with pytest.raises(MisuseError):
        engine.to_device("a", device, host)


def test_an_idle_engine_uses_no_cpu(engine: CopyEngine) -> None:
    host, device = Buffer(1 << 20), Buffer(1 << 20)
    engine.to_device("a", device, host)
    engine.run_until_idle(10**10)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_a_rate_limit_holds_on_the_wire(gpu: PretendedGpu) -> None:
    with CopyEngine(gpu, OPTIONS) as engine:
        engine.admit("slow", Share(limit=50e6, burst_bytes=10_000))
        host, device = Buffer(1_000_000), Buffer(1_000_000)
        ticket = engine.to_device("slow", device, host)
        engine.run_until_idle(10**10)
        took = (ticket.finished_ns - ticket.submitted_ns) * 1e-9
        assert took >= (1_000_000 - 10_000) / 50e6 * 0.99
        assert took < 0.2


# --- loads that a loop in C makes


def test_a_source_in_c_goes_through_the_same_scheduler(gpu: PretendedGpu, driver: Any) -> None:
    """An urgent copy is given to the GPU at once, behind no more than the window, however many bulk bytes are queued."""
    driver.fake_reset(20.0)
    with CopyEngine(gpu, replace(OPTIONS, h2d_rate=5e7, d2h_rate=5e7)) as engine:
        for name in ("a", "b"):
            engine.admit(name)
        engine.admit("ls", Share(latency_sensitive=True))
        engine.record_chunks()
        lane = engine.lanes["h2d"]
        host, device = Buffer(1_000_000), Buffer(1_000_000)
        for name in ("a", "b"):
            engine.to_device(name, device, host)
        engine.step()
        now = time.perf_counter_ns()
        rows = np.zeros((20, len(ROW)), np.int64)
        rows[:, 0] = now + 1_500_000 * np.arange(1, 21)
        rows[:, 1], rows[:, 2] = lane.flow("ls"), SMALL.short
        with ThreadPoolExecutor(1) as pool:
            submitted = pool.submit(lane.run_source, rows, host, device.address, end_ns=now + 10**10)
            engine.run_until_idle(10**10)
            assert submitted.result() == 20
        chunks = [record for record in engine.recorded_chunks() if record.tenant != "ls"]
    assert sum(chunk.nbytes for chunk in chunks) == 2_000_000
    assert not rows[:, 7].any()
    at_once = 0
    for arrival, _, _, called, returned, issued, done, _ in rows.tolist():
        assert arrival <= called <= min(issued, returned)
        at_once += issued <= returned
        assert issued + SMALL.short * 20 * 0.9 < done
        assert sum(chunk.issued_ns <= issued < chunk.done_ns for chunk in chunks) <= 2 * OPTIONS.depth
    assert at_once >= 10  # by the call that submitted it, unless the lane's thread was at it just then


def test_a_load_from_c_is_accounted_for(gpu: PretendedGpu) -> None:
    bulk = [Bulk(name=name, nbytes=2_000_000) for name in ("a", "b")]
    requests = [Requests(name="ls", nbytes=SMALL.short, rate=200.0)]
    result = run_load(gpu, CopyEngine(gpu, OPTIONS), bulk, requests, duration_s=0.3, source=Source.NATIVE)
    latency, late = result.latency_ns["ls"], result.late_ns["ls"]
    assert (late >= 0).all()
    assert result.unfinished["ls"] == len(late) - len(latency) >= 0
    moved = {key.split()[0]: int(rows[:, 1].sum()) for key, rows in result.chunks.items()}
    assert moved["ls"] >= len(latency) * SMALL.short
    assert min(moved["a"], moved["b"]) > 0


def test_a_source_in_c_ends_with_the_gpu(engine: CopyEngine, driver: Any) -> None:
    lane = engine.lanes["h2d"]
    host, device = Buffer(4096), Buffer(4096)
    now = time.perf_counter_ns()
    rows = np.zeros((3, 8), np.int64)
    rows[:, 0] = now + 1_000_000 * np.arange(3)
    rows[:, 1], rows[:, 2] = lane.flow("ls"), 4096
    driver.fake_break(1)  # a copy that the driver refuses is over, as failed
    assert lane.run_source(rows, host, device.address, end_ns=now + 10**9) == 3
    assert rows[:, 7].all()
    assert (rows[:, 6] >= rows[:, 3]).all()
    driver.fake_break(0)
    lane.abandon(GpuError("x", "700", usable="nothing"), 0)
    rows[:, 6] = 0
    rows[:, 0] = time.perf_counter_ns() + 20_000_000 * np.arange(3)
    assert lane.run_source(rows, host, device.address, end_ns=now + 10**10) == 1
    assert not rows[:, 6].any()


def test_only_the_hot_loop_in_c_takes_a_source_in_c(gpu: PretendedGpu) -> None:
    with CopyEngine(gpu, replace(OPTIONS, native=False)) as engine, pytest.raises(MisuseError, match="hot loop in C"):
        run_load(gpu, engine, [], [Requests(name="ls")], duration_s=0.1, source=Source.NATIVE)
