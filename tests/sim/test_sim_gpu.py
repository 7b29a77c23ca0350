"""The simulated GPU through its interface: time, the link, memory, faults and specs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from missile.errors import GpuError, InternalError, KernelFaultError, MisuseError, OutOfMemoryError
from missile.gpu import open_gpu
from missile.gpu.interface import Copy, Fill, Launch, Level, Priority
from missile.gpu.sim import Faults, GpuSpec, SimulatedGpu, load_spec
from missile.gpu.sim.spec import CopyFault, KernelFault, NoiseTable, builtin_specs
from missile.gpu.work import KernelWork

MIB = 1 << 20
H100 = load_spec("h100")
QUIET = H100.model_copy(update={"noise": NoiseTable(kernel=0.0, copy=0.0)})
DOCS = Path(__file__).parents[2] / "docs" / "simulator.md"


@pytest.fixture
def gpu() -> SimulatedGpu:
    return SimulatedGpu(QUIET)


def launch(gpu: SimulatedGpu, work: KernelWork, name: str = "k") -> Launch:
    kernel = gpu.load_module(b"", name="tenant").kernel(name)
    return Launch(kernel, (work.blocks, 1, 1), (work.threads, 1, 1), work=work)


def timed(gpu: SimulatedGpu, work: Callable[[], None]) -> int:
    """ns from the call of `work` until the GPU is idle."""
    gpu.synchronize()
    before = gpu.now_ns()
    work()
    gpu.synchronize()
    return gpu.now_ns() - before


# --- time
def test_graphs_of_recorded_kernels_take_their_solo_times_and_gaps(gpu: SimulatedGpu) -> None:
    stream, start, end = gpu.create_stream(), gpu.create_event(), gpu.create_event()
    graph = gpu.create_graph([launch(gpu, KernelWork(blocks=50, solo_ns=10_000.0)) for _ in range(20)])
    stream.record(start)
    stream.launch_graph(graph)
    stream.record(end)
    stream.synchronize()
    waited = end.time_ns() - start.time_ns()
    assert 20 * 10_000 + 19 * 700 <= waited <= 20 * 10_000 + 19 * 700 + 15_000


def test_launches_cost_the_host(gpu: SimulatedGpu) -> None:
    stream = gpu.create_stream()
    before = gpu.now_ns()
    for _ in range(10):
        stream.launch(launch(gpu, KernelWork(blocks=1, solo_ns=1e6)))
    assert gpu.now_ns() - before == 10 * QUIET.host.launch_ns


def test_polling_an_event_ends(gpu: SimulatedGpu) -> None:
    stream, event = gpu.create_stream(), gpu.create_event()
    stream.launch(launch(gpu, KernelWork(blocks=1, solo_ns=100_000.0)))
    stream.record(event)
    for _ in range(1000):
        if event.done():
            break
    assert event.time_ns() <= gpu.now_ns()


def test_the_same_seed_gives_the_same_times_and_another_seed_others() -> None:
    def run(seed: int) -> list[int]:
        with open_gpu("sim:h100", seed=seed) as gpu:
            stream, events = gpu.create_stream(), [gpu.create_event() for _ in range(50)]
            for event in events:
                stream.launch(launch(gpu, KernelWork(blocks=100, solo_ns=20_000.0)))
                stream.record(event)
            gpu.synchronize()
            return [event.time_ns() for event in events]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_wait_that_can_never_end_is_an_internal_error(gpu: SimulatedGpu) -> None:
    event = gpu.create_event()
    event.recorded()  # as if a stream had promised to reach it
    with pytest.raises(InternalError):
        gpu.wait([event])


def test_many_kernels_are_simulated_quickly(gpu: SimulatedGpu) -> None:
    """A guard against quadratic costs, with an ample margin for slow machines: 30,000 launches a second are usual."""
    stream, other = gpu.create_stream(), gpu.create_stream()
    graph = gpu.create_graph([launch(gpu, KernelWork(blocks=100, solo_ns=5_000.0)) for _ in range(200)])
    before = time.perf_counter()
    for _ in range(25):
        stream.launch_graph(graph)
        other.launch_graph(graph)
    gpu.synchronize()
    assert 10_000 / (time.perf_counter() - before) > 3_000


# --- the link
@pytest.mark.parametrize(("kib", "gb_s"), [(256, 32.0), (1024, 48.0), (2048, 51.0), (4096, 53.0), (262144, 54.4)])
def test_queued_copies_reach_the_measured_rates(gpu: SimulatedGpu, kib: int, gb_s: float) -> None:
    nbytes = kib * 1024
    host, buffer, stream = gpu.allocate_host(nbytes), gpu.allocate(nbytes), gpu.create_stream()
    count = 20
    took = timed(gpu, lambda: [stream.copy_to_device(buffer.address, host) for _ in range(count)] and None)
    assert count * nbytes / took == pytest.approx(gb_s, rel=0.1)


def test_a_copy_alone_takes_what_was_measured(gpu: SimulatedGpu) -> None:
    host, buffer, stream = gpu.allocate_host(MIB), gpu.allocate(MIB), gpu.create_stream()
    assert timed(gpu, lambda: stream.copy_to_device(buffer.address, host)) == pytest.approx(28_600, rel=0.1)


def test_a_small_copy_waits_for_the_bulk_copies_issued_before_it(gpu: SimulatedGpu) -> None:
    bulk, small = gpu.create_stream(), gpu.create_stream(priority=Priority.HIGH)
    host, buffer, event = gpu.allocate_host(256 * MIB), gpu.allocate(256 * MIB), gpu.create_event()
    for _ in range(5):
        bulk.copy_to_device(buffer.address, host)
        bulk.record(gpu.create_event())
    begin = gpu.now_ns()
    small.copy_to_device(buffer.address, host, nbytes=MIB)
    small.record(event)
    gpu.wait([event])
    assert gpu.now_ns() - begin == pytest.approx(5 * 256 * MIB / 54.4, rel=0.02)


def test_both_directions_run_at_once(gpu: SimulatedGpu) -> None:
    host, buffer = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
    up, down = gpu.create_stream(), gpu.create_stream()

    def both() -> None:
        up.copy_to_device(buffer.address, host)
        down.copy_to_host(host, buffer.address)

    one_way = timed(gpu, lambda: up.copy_to_device(buffer.address, host))
    assert timed(gpu, both) < 1.1 * one_way


def test_copies_and_kernels_of_one_stream_keep_their_order(gpu: SimulatedGpu) -> None:
    host, buffer, stream = gpu.allocate_host(4096), gpu.allocate(4096), gpu.create_stream()
    host.array[:] = 1
    stream.copy_to_device(buffer.address, host)
    stream.launch(launch(gpu, KernelWork(blocks=1, solo_ns=500_000.0)))
    stream.launch(Fill(buffer.address, 2048, 5))
    stream.copy_to_host(host, buffer.address)
    stream.synchronize()
    assert (host.array[:2048] == 5).all()
    assert (host.array[2048:] == 1).all()


# --- memory
def test_untouched_gigabytes_cost_nothing(gpu: SimulatedGpu) -> None:
    host, buffer, stream = gpu.allocate_host(40 << 30), gpu.allocate(40 << 30), gpu.create_stream()
    before = time.perf_counter()
    stream.copy_to_device(buffer.address, host)
    stream.synchronize()
    assert time.perf_counter() - before < 1.0
    small = gpu.allocate_host(4096)
    small.array[:] = 7
    stream.copy_to_host(small, buffer.address + (30 << 30))
    stream.synchronize()
    assert (small.array == 0).all()


def test_use_after_free_and_beyond_the_end_are_misuse(gpu: SimulatedGpu) -> None:
    host, buffer, stream = gpu.allocate_host(4096), gpu.allocate(4096), gpu.create_stream()
    for address, nbytes in ((buffer.address + 1, 4096), (buffer.address - 1, 4), (0, 1)):
        with pytest.raises(MisuseError, match="live allocation"):
            stream.copy_to_device(address, host, nbytes=nbytes)
        with pytest.raises(MisuseError, match="live allocation"):
            stream.launch(Fill(address, nbytes))
        with pytest.raises(MisuseError, match="live allocation"):
            stream.launch(Copy(buffer.address, address, nbytes))
    buffer.free()
    with pytest.raises(MisuseError, match="live allocation"):
        stream.copy_to_device(buffer.address, host)
    host.free()
    with pytest.raises(MisuseError, match="freed"):
        _ = host.array


def test_reserved_addresses_without_a_page_are_misuse(gpu: SimulatedGpu) -> None:
    region, host, stream = gpu.reserve(2 * gpu.info.page_bytes), gpu.allocate_host(64), gpu.create_stream()
    region.map(0, [gpu.create_page()])
    stream.copy_to_device(region.address, host)
    with pytest.raises(MisuseError, match="no page"):
        stream.copy_to_device(region.address + gpu.info.page_bytes - 32, host)


def test_all_memory_can_be_had_but_no_more(gpu: SimulatedGpu) -> None:
    buffer = gpu.allocate(gpu.memory_free())
    with pytest.raises(OutOfMemoryError, match="'second'"):
        gpu.allocate(1, tenant="second")
    with pytest.raises(OutOfMemoryError):
        gpu.create_page()
    buffer.free()
    small = [gpu.allocate(1000) for _ in range(5000)]
    assert gpu.memory_free() > gpu.info.memory_bytes - 16 * MIB
    for one in small:
        one.free()
    assert gpu.memory_free() == gpu.info.memory_bytes


def test_latency_tells_pages_by_their_physical_address() -> None:
    with open_gpu("sim:h100") as gpu:
        region, page = gpu.reserve(2 * gpu.info.page_bytes), gpu.create_page()
        region.map(0, [page])
        region.map(gpu.info.page_bytes, [page])
        addresses = region.address + np.arange(0, 64 << 10, 4096, dtype=np.int64)
        here = gpu.measure_latency(addresses, gpu.sm_ids()[:8])
        there = gpu.measure_latency(addresses + gpu.info.page_bytes, gpu.sm_ids()[:8])
        # The same physical granules through two addresses: noise (0.5 cycle) apart, not slices (tens of cycles) apart.
        assert np.abs(here - there).max() < 6.0
        assert np.ptp(here, axis=1).max() > 10.0


# --- faults
def test_a_faulting_kernel_loses_the_context_and_names_its_tenant() -> None:
    gpu = SimulatedGpu(QUIET, faults=Faults(kernels=(KernelFault(kernel="bad", launch=3),)))
    stream = gpu.create_stream()
    good, bad = (launch(gpu, KernelWork(blocks=1, solo_ns=10_000.0), name) for name in ("good", "bad"))
    for operation in (good, bad, bad):
        stream.launch(operation)
    gpu.synchronize()
    stream.launch(bad)
    with pytest.raises(KernelFaultError, match="'bad'") as caught:
        gpu.synchronize()
    assert caught.value.tenant == "tenant"
    assert caught.value.usable == "nothing"
    for later in (lambda: stream.launch(good), gpu.create_stream, lambda: gpu.wait([], gpu.now_ns() + 1)):
        with pytest.raises(KernelFaultError):
            later()
    gpu.close()


def test_a_failing_copy_fails_alone() -> None:
    gpu = SimulatedGpu(QUIET, faults=Faults(copies=(CopyFault(direction="h2d", copy_number=2),)))
    host, buffer, stream = gpu.allocate_host(64), gpu.allocate(64), gpu.create_stream()
    host.array[:] = 1
    stream.copy_to_device(buffer.address, host)
    with pytest.raises(GpuError, match="cuMemcpyHtoDAsync") as caught:
        stream.copy_to_device(buffer.address, host)
    assert caught.value.usable == "gpu"
    stream.copy_to_device(buffer.address, host)
    stream.copy_to_host(host, buffer.address)
    stream.synchronize()
    assert (host.array == 1).all()


def test_a_launch_without_work_is_misuse(gpu: SimulatedGpu) -> None:
    kernel = gpu.load_module(b"").kernel("unknown_cost")
    with pytest.raises(MisuseError, match="unknown_cost"):
        gpu.create_stream().launch(Launch(kernel, (1, 1, 1), (32, 1, 1)))


def test_a_closed_gpu_says_so(gpu: SimulatedGpu) -> None:
    stream = gpu.create_stream()
    gpu.close()
    for call in (gpu.create_stream, gpu.synchronize, lambda: gpu.allocate(1), stream.synchronize):
        with pytest.raises(MisuseError, match="closed"):
            call()


# --- specs
@pytest.mark.parametrize("name", sorted(builtin_specs()))
def test_every_shipped_spec_opens(name: str) -> None:
    with open_gpu(f"sim:{name}") as gpu:
        assert gpu.info.simulated
        assert gpu.info.device == f"sim:{name}"
        assert gpu.info.level is Level.MEMORY_LAB
        assert gpu.info.sms == builtin_specs()[name].sm.count


def _example() -> str:
    return re.findall(r"```toml\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)[0]


def test_the_documented_example_is_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(_example())
    with open_gpu(f"sim:{path}") as gpu:
        assert gpu.info.level is Level.MEMORY_LAB
        assert gpu.info.device == f"sim:{path}"


def test_the_documented_example_shows_every_field() -> None:
    text = _example()
    for table, field in GpuSpec.model_fields.items():
        nested = getattr(field.annotation, "model_fields", {})
        for name, inner in nested.items():
            assert re.search(rf"\b{inner.alias or name}\b", text), f"{table}.{name} is not in the example"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("count = 16", "count = 0"), "sm.count"),
        (("clock_mhz = 1500", 'clock_mhz = "fast"'), "sm.clock_mhz"),
        (("h2d_gb_s = 25.0", "h2d_gb_s = -1"), "link.h2d_gb_s"),
        (("[l2]", "[l3]"), "l2"),
        (("page_bytes = 2097152", "page_bytes = 12345"), "memory"),
    ],
)
def test_a_broken_spec_names_the_field(tmp_path: Path, change: tuple[str, str], named: str) -> None:
    path = tmp_path / "broken.toml"
    assert change[0] in _example()
    path.write_text(_example().replace(*change, 1))
    with pytest.raises(MisuseError, match=re.escape(named)):
        open_gpu(f"sim:{path}")


def test_a_spec_that_is_no_toml_or_no_file_is_misuse(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("name = ")
    with pytest.raises(MisuseError, match="not TOML"):
        open_gpu(f"sim:{path}")
    with pytest.raises(MisuseError, match=r"absent\.toml"):
        open_gpu(f"sim:{tmp_path}/absent.toml")
    with pytest.raises(MisuseError, match="known"):
        load_spec("h1000")
