"""Weights that wait on the host: nothing is read before it is there, nothing locks up, and runs say what it cost."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missile.errors import GpuError, MisuseError, UnsupportedError
from missile.gpu import open_gpu
from missile.pcie.engine import CopyEngine
from missile.pcie.streamed import StreamedCopies
from missile.pcie.ticket import CopyState
from missile.pcie.weights import Share
from missile.runtime import loading
from missile.runtime.copying import link_options
from missile.runtime.host_weights import HostWeights, Part
from missile.runtime.loading import load_tenants
from missile.runtime.policies.interface import Lane, Layout
from missile.runtime.residency import Residency
from missile.runtime.run import run
from missile.runtime.stage import Stage

SECOND = 1_000_000_000
MIB = 1 << 20


# --- a GPU that does what its streams hold in any order that they allow


class Machine:
    """Streams are queues of steps; a step is ready or not, and does something. Memory remembers whose bytes it holds."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.ranks: dict[int, float] = {}
        self.queues: list[deque[tuple[Callable[[], bool], Callable[[], None]]]] = []
        self.holds: dict[int, int] = {}
        self.errors: list[str] = []

    def queue(self) -> deque[Any]:
        self.queues.append(deque())
        self.ranks[id(self.queues[-1])] = self._rng.random()  # some are starved
        return self.queues[-1]

    def step(self, rng: random.Random) -> bool:
        ready = [queue for queue in self.queues if queue and queue[0][0]()]
        if not ready:
            return False
        favourite = min(ready, key=lambda queue: self.ranks[id(queue)])
        (favourite if rng.random() < 0.8 else rng.choice(ready)).popleft()[1]()
        return True

    # --- what `Residency` asks of a Gpu

    def create_stream(self) -> Stream:
        return Stream(self)

    def create_latch(self) -> Any:
        return SimpleNamespace(value=0, close=lambda: None)

    def create_event(self, *, timing: bool = True) -> Event:
        return Event()

    def now_ns(self) -> int:
        return 0


class Event:
    def __init__(self) -> None:
        self.record = {"over": True}

    def done(self) -> bool:
        return self.record["over"]

    def time_ns(self) -> int:
        return 1

    def close(self) -> None: ...


def _always() -> bool:
    return True


class Stream:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._queue = machine.queue()

    def wait(self, event: Event) -> None:
        record = event.record  # the last one, as it is now
        self._queue.append((lambda: record["over"], lambda: None))

    def record(self, event: Event) -> None:
        record = event.record = {"over": False}
        self._queue.append((_always, lambda: record.update(over=True)))

    def wait_latch(self, latch: Any, value: int) -> None:
        self._queue.append((lambda: latch.value >= value, lambda: None))

    def raise_latch(self, latch: Any, value: int) -> None:
        self._queue.append((_always, lambda: setattr(latch, "value", value)))

    def copy_to_device(self, target: int, source: int, *, offset: int, nbytes: int) -> None:
        self._queue.append(
            (_always, lambda: self._machine.holds.update(dict.fromkeys(range(target, target + nbytes), source)))
        )

    def kernel(self, tenant: int, first: int, until: int) -> None:
        def read() -> None:
            if any(self._machine.holds.get(at) != tenant for at in range(first, until)):
                self._machine.errors.append(f"tenant {tenant} read what is not its own in [{first}, {until})")

        self._queue.append((_always, read))

    def close(self) -> None: ...


class Scheduled:
    """`StreamedCopies.bring`: a tenant's copies go in their order, others' at any time."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._queues: dict[str, deque[Any]] = {}

    def bring(
        self, tenant: str, address: int, source: int, offset: int, nbytes: int, *, after: Event | None, raises: Any
    ) -> Any:
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = self._machine.queue()
        calls: list[Callable[[Any], None]] = []
        ticket = SimpleNamespace(state=CopyState.DONE, finished_ns=1, add_done_callback=calls.append)

        def go() -> None:
            at = address + offset
            self._machine.holds.update(dict.fromkeys(range(at, at + nbytes), source))
            raises[0].value = raises[1]
            for call in calls:
                call(ticket)

        queue.append((lambda: after is None or after.done(), go))  # asks the event as it is then
        return ticket

    def hand_over(self) -> None:
        """Nothing: copies go when the machine takes them."""


work = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=40
)


@settings(max_examples=400, deadline=None)
@given(
    layout=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=4, max_size=4),
    work=work,
    scheduled=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_no_kernel_reads_what_is_not_there_and_everything_ends(
    layout: list[tuple[int, int]], work: list[tuple[int, int, int, int]], scheduled: bool, seed: int
) -> None:
    """Four tenants with places anywhere, requests in up to four pieces that others come between, on two lanes."""
    rng = random.Random(seed)
    machine = Machine(rng)
    weights = [
        HostWeights(tenant, 10 * at, 10 * parts, tuple(Part(10 * i, 10, i) for i in range(parts)))  # type: ignore[arg-type]
        for tenant, (at, parts) in enumerate(layout)
    ]
    copies: Any = Scheduled(machine) if scheduled else None
    residency = Residency(machine, [str(t) for t in range(4)], weights, copies)  # type: ignore[arg-type]
    lanes = [machine.create_stream(), machine.create_stream()]
    tails: list[Event | None] = [None] * 4
    lane_of, opened = [-1] * 4, [0] * 4
    for tenant, lane, pieces, steps in work:
        stream = lanes[lane]
        if lane_of[tenant] != lane and (tail := tails[tenant]) is not None:
            stream.wait(tail)
        lane_of[tenant] = lane
        residency.bring(tenant, tails)  # type: ignore[arg-type]
        for _ in range(pieces):
            piece = opened[tenant]
            residency.gate(tenant, stream, piece + 1)  # type: ignore[arg-type]
            stream.kernel(tenant, weights[tenant].address + 10 * piece, weights[tenant].address + 10 * piece + 10)
            opened[tenant] = (piece + 1) % len(weights[tenant].parts)
        tails[tenant] = Event()
        stream.record(tails[tenant])
        for _ in range(steps):
            machine.step(rng)
    while machine.step(rng):
        pass
    assert not machine.errors
    assert not any(machine.queues)  # nothing waits for ever
    assert sum(len(residency.cold_starts(tenant)) for tenant in range(4)) >= len({tenant for tenant, *_ in work})
    residency.close()


# --- runs


@pytest.mark.parametrize("policy", ["streams", "priority", "temporal", "partition", "missile", "missile:copies=off"])
def test_two_models_in_memory_for_one_run_under_every_policy(policy: str, tenant: Any) -> None:
    tenants = [
        tenant("ls", "LS", "resnet34", rate=100),
        tenant("one", "BE", "mobilebert", residency="host"),
        tenant("two", "BE", "resnet152", residency="host"),
    ]
    with open_gpu("sim:h100") as gpu, load_tenants(gpu, tenants, swap_bytes=128 * MIB) as roster:
        one, two = (loaded.weights for loaded in roster.tenants[1:])
        assert one is not None
        assert two is not None
        assert one.overlaps(two)
        record = run(gpu, roster, policy, seed=0, duration_ns=SECOND // 2)
        assert not record.fault
        assert record.tenants[0].cold_bytes == len(record.tenants[0].cold) == 0
        for hosted in record.tenants[1:]:
            took = hosted.cold[:, 1] - hosted.cold[:, 0]
            assert len(hosted.arrival) >= 2
            assert len(took) >= 2
            assert took.min() >= 0.97 * hosted.cold_ideal_ns > 0


@pytest.mark.parametrize("policy", ["missile", "missile:copies=off"])
def test_a_run_may_end_in_the_middle_of_a_request(policy: str, tenant: Any) -> None:
    """An LS tenant makes the others come in segments; what was copied for the rest of a request nobody waits for."""
    tenants = [
        tenant("ls", "LS", "synthetic-tiny", rate=500),
        tenant("one", "BE", "mobilebert", residency="host"),
        tenant("two", "BE", "resnet152", residency="host"),
    ]
    with open_gpu("sim:h100") as gpu, load_tenants(gpu, tenants, swap_bytes=128 * MIB) as roster:
        free = gpu.memory_free()
        for extra in range(8):
            record = run(gpu, roster, policy, seed=extra, duration_ns=20_000_000 + 700_000 * extra)
            assert not record.fault
        assert gpu.memory_free() == free


def test_weights_that_stay_are_copied_once(tenant: Any) -> None:
    tenants = [
        tenant("one", "BE", "mobilebert", residency="host"),
        tenant("two", "LS", "resnet34", 50, residency="host"),
    ]
    with open_gpu("sim:h100") as gpu, load_tenants(gpu, tenants, swap_bytes=512 * MIB) as roster:
        record = run(gpu, roster, "missile", seed=0, duration_ns=SECOND // 5)
        assert [len(found.cold) for found in record.tenants] == [0, 0]  # before the clock started
        assert all(len(found.arrival) for found in record.tenants)
        assert not record.fault


def test_what_cannot_wait_on_the_host_is_refused_and_nothing_is_held(
    monkeypatch: pytest.MonkeyPatch, gpu: Any, tenant: Any
) -> None:
    model = tenant("one", "BE", "resnet34", residency="host")
    free = gpu.memory_free()
    with pytest.raises(MisuseError, match="needs swap_mb"):
        load_tenants(gpu, [model])
    with pytest.raises(MisuseError, match="42 MiB of weights on the host and swap_mb is 10"):
        load_tenants(gpu, [model], swap_bytes=10 * MIB)
    with pytest.raises(MisuseError, match="synthetic model has no weights"):
        load_tenants(gpu, [tenant("x", residency="host")], swap_bytes=10 * MIB)
    coloring: Any = SimpleNamespace(sets={"one": (0,)}, check=lambda *_: None)
    with pytest.raises(UnsupportedError, match="colored memory can't do"):
        load_tenants(gpu, [model], swap_bytes=256 * MIB, coloring=coloring)

    def broken(*_: object, **__: object) -> None:
        raise MisuseError("no code")

    monkeypatch.setattr(loading, "bind", broken)
    with pytest.raises(MisuseError, match="no code"):
        load_tenants(gpu, [model], swap_bytes=256 * MIB)
    assert gpu.memory_free() == free


def test_weights_on_the_host_do_not_count_against_the_limit(gpu: Any, tenant: Any) -> None:
    limited = tenant("one", "BE", "bert_large", memory_limit_mb=400)
    with pytest.raises(Exception, match="its limit is 400 MiB"):
        load_tenants(gpu, [limited])
    hosted = limited.model_copy(update={"residency": "host"})
    with load_tenants(gpu, [hosted], swap_bytes=800 * MIB) as roster:
        assert roster.ready


class FirstLaunches:
    """Of a simulated GPU's graphs: those whose first launch found their stream waiting for a latch."""

    def __init__(self, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.behind_latches = 0, 0
        launched: set[int] = set()
        waiting: dict[int, list[tuple[Any, int]]] = {}
        kind = type(gpu.create_stream())
        launch_graph, wait_latch = kind.launch_graph, kind.wait_latch
        graphs: list[Any] = []  # kept: an id is not given to another one

        def launch(stream: Any, graph: Any) -> None:
            if id(graph) not in launched:
                launched.add(id(graph))
                graphs.append(graph)
                self.count += 1
                left = [entry for entry in waiting.get(id(stream), []) if not entry[0].reached(entry[1])]
                self.behind_latches += bool(left)
            launch_graph(stream, graph)

        def wait(stream: Any, latch: Any, value: int) -> None:
            waiting.setdefault(id(stream), []).append((latch, value))
            wait_latch(stream, latch, value)

        monkeypatch.setattr(kind, "launch_graph", launch)
        monkeypatch.setattr(kind, "wait_latch", wait)


@pytest.mark.parametrize("policy", ["partition", "missile", "missile:pause=off", "missile:copies=off"])
def test_no_graph_is_first_launched_behind_weights_that_have_not_come(
    policy: str, tenant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that makes the driver wait for the GPU, and the weights are yet to be asked for, it waits for ever."""
    tenants = [
        tenant("ls", "LS", "resnet34", rate=100),
        tenant("one", "BE", "mobilebert", residency="host"),
        tenant("two", "BE", "resnet152", residency="host"),
    ]
    with open_gpu("sim:h100") as gpu, load_tenants(gpu, tenants, swap_bytes=128 * MIB) as roster:
        seen = FirstLaunches(gpu, monkeypatch)
        record = run(gpu, roster, policy, seed=0, duration_ns=SECOND // 10)
        assert all(len(found.cold) for found in record.tenants[1:])
        assert seen.count > 10
        assert seen.behind_latches == 0


def test_a_rehearsal_that_does_not_end_is_an_error(tenant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tenants = [tenant("one", "BE", "mobilebert", residency="host")]
    with open_gpu("sim:h100") as gpu, load_tenants(gpu, tenants, swap_bytes=128 * MIB) as roster:
        monkeypatch.setattr(Residency, "arriving", lambda *_: True)
        with pytest.raises(GpuError, match=r"10 s for a rehearsal failed for tenant 'one': TIMEOUT"):
            run(gpu, roster, "missile", seed=0, duration_ns=SECOND // 10)


@pytest.mark.parametrize(("floods", "most"), [(0, 1.15), (2, 1.5)])
def test_a_cold_start_takes_about_as_long_as_its_bytes(gpu: Any, tenant: Any, floods: int, most: float) -> None:
    """Of two models that displace each other; beside a flood, its share of the link: two of four."""
    tenants = [
        tenant("one", "BE", "decoder_1b", batch=8, residency="host"),
        tenant("two", residency="host", model="resnet34"),
    ]
    share = Share(weight=2)
    with (
        CopyEngine(gpu, link_options(gpu)) as engine,
        load_tenants(gpu, tenants, swap_bytes=2100 * MIB) as roster,
    ):
        copies = StreamedCopies(gpu, engine)
        for loaded in roster.ready:
            copies.admit(loaded.tenant.name, share)
        stage = Stage(gpu, roster.ready, Layout((Lane("only"),)), copies)
        stage.rehearse()
        host, device = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
        for name in "xy"[:floods]:
            engine.admit(name)
            for _ in range(20):
                engine.to_device(name, device, host)
        for request in range(2):  # the second is warm
            begun = gpu.now_ns()
            slot, _ = stage.enqueue(0, 0, request)
            while not slot.done.done():
                stage.wait([slot.done], begun + SECOND)
            took = gpu.now_ns() - begun
            weights = roster.ready[0].weights
            assert weights is not None
            ideal = weights.nbytes / link_options(gpu).h2d_rate * 1e9 * (2 if floods else 1)
            assert took < most * ideal if not request else took < 0.2 * ideal
        stage.clear()
        assert len(stage.cold_starts(0)) == 1
        engine.run_until_idle()
        stage.close()


def test_weights_that_fail_to_come_end_the_run_and_come_in_the_next(fail_copy: Any, tenant: Any) -> None:
    tenants = [tenant("one", residency="host", model="mobilebert"), tenant("two", residency="host", model="resnet152")]
    with open_gpu("sim:h100") as gpu, load_tenants(gpu, tenants, swap_bytes=128 * MIB) as roster:
        link_options(gpu)
        images = [loaded.weights.image for loaded in roster.tenants if loaded.weights]
        fail_copy(gpu, 150, images)
        record = run(gpu, roster, "missile", seed=0, duration_ns=SECOND // 2)
        assert "cuMemcpyHtoDAsync" in record.fault
        record = run(gpu, roster, "missile", seed=0, duration_ns=SECOND // 2)
        assert not record.fault
        assert all(len(found.cold) for found in record.tenants)
