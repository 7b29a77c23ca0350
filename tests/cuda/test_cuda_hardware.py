"""What only hardware can show: faults, partitions by SM id, clock accuracy, launch cost, priorities, the memory lab."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator

import numpy as np
import pytest

from missile.errors import MisuseError, OutOfMemoryError
from missile.gpu import open_gpu
from missile.gpu.cuda import CudaGpu
from missile.gpu.interface import Access, DeviceBuffer, Fill, Graph, Launch, Priority, Stream, Traffic

pytestmark = pytest.mark.gpu

# add1: one thread adds 1 at its address. smids: each block holds its SM for 20 us and notes its id. spin: busy for ns.
PTX = b"""
.version 8.0
.target sm_90
.address_size 64
.visible .entry add1(.param .u64 at)
{
    .reg .b32 %r<2>; .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [at];
    ld.global.u32 %r1, [%rd1];
    add.u32 %r1, %r1, 1;
    st.global.u32 [%rd1], %r1;
    ret;
}
.visible .entry smids(.param .u64 out)
{
    .reg .b32 %r<3>; .reg .b64 %rd<5>; .reg .pred %p;
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %smid;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd1, %rd1, %rd2;
    mov.u64 %rd3, %globaltimer;
again:
    mov.u64 %rd4, %globaltimer;
    sub.s64 %rd4, %rd4, %rd3;
    setp.lt.s64 %p, %rd4, 20000;
    @%p bra again;
    st.global.u32 [%rd1], %r1;
    ret;
}
.visible .entry spin(.param .u64 ns)
{
    .reg .b64 %rd<4>; .reg .pred %p;
    ld.param.u64 %rd1, [ns];
    mov.u64 %rd2, %globaltimer;
again:
    mov.u64 %rd3, %globaltimer;
    sub.s64 %rd3, %rd3, %rd2;
    setp.lt.s64 %p, %rd3, %rd1;
    @%p bra again;
    ret;
}
.visible .entry trap()
{
    trap;
    ret;
}
"""
BLOCKS = 2000


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


@pytest.fixture(scope="module")
def gpu() -> Iterator[CudaGpu]:
    with open_gpu("cuda:0") as opened:
        assert isinstance(opened, CudaGpu)
        opened.sm_ids()  # the memory lab's own stream is there before any test's
        yield opened


@pytest.fixture(autouse=True)
def leave_no_streams(gpu: CudaGpu) -> Iterator[None]:
    before = set(gpu._streams)
    yield
    for key in set(gpu._streams) - before:
        gpu._streams[key].close()


class SmIds:
    """Runs a grid of many blocks and tells which SMs they ran on."""

    def __init__(self, gpu: CudaGpu) -> None:
        self._device, self._host = gpu.allocate(4 * BLOCKS), gpu.allocate_host(4 * BLOCKS)
        kernel = gpu.load_module(PTX, name="test").kernel("smids")
        self.launch = Launch(kernel, (BLOCKS, 1, 1), (64, 1, 1), params=(u64(self._device.address),))

    def __call__(self, stream: Stream, graph: Graph | None = None) -> set[int]:
        self._host.array[:] = 0xFF
        if graph is None:
            stream.launch(self.launch)
        else:
            stream.launch_graph(graph)
        stream.copy_to_host(self._host, self._device.address)
        stream.synchronize()
        return set(self._host.array.view(np.int32).tolist())


# --- partitions
def test_partitions_and_graphs_stay_on_their_own_sms(gpu: CudaGpu) -> None:
    sm_ids = SmIds(gpu)
    split = gpu.split_sms([32, 64])
    graph = gpu.create_graph([sm_ids.launch])  # one graph, launched on every partition in turn
    seen: list[set[int]] = []
    for part in (*split.parts, split.remainder):
        assert part is not None
        stream = gpu.create_stream(partition=part)
        seen.append(sm_ids(stream))
        assert len(seen[-1]) == part.sms
        assert sm_ids(stream, graph) == seen[-1]
    assert sum(map(len, seen)) == len(set.union(*seen)) == gpu.info.sms
    whole = gpu.create_stream()
    assert sm_ids(whole) == sm_ids(whole, graph) == set(gpu.sm_ids())


def test_a_refused_split_leaves_the_first_one_working(gpu: CudaGpu) -> None:
    sm_ids = SmIds(gpu)
    split = gpu.split_sms([8])
    stream = gpu.create_stream(partition=split.parts[0])
    with pytest.raises(MisuseError, match="split already"):
        gpu.split_sms([16])
    assert len(sm_ids(stream)) == 8
    stream.close()
    again = gpu.split_sms([16])
    with pytest.raises(MisuseError, match="not of the GPU's current split"):
        gpu.create_stream(partition=split.parts[0])
    assert again.parts[0].sms == 16


# --- time
def test_event_times_are_right_on_the_host_clock(gpu: CudaGpu) -> None:
    stream, event = gpu.create_stream(), gpu.create_event()
    early, late = [], []
    for _ in range(300):
        before = gpu.now_ns()
        stream.record(event)
        while not event.done():
            pass
        after = gpu.now_ns()
        early.append(before - event.time_ns())
        late.append(event.time_ns() - after)
    # The true time lies between the two readings; beyond them is the mapping's error.
    assert max(early) < 20_000
    assert max(late) < 20_000


def test_priorities_place_the_high_stream_first(gpu: CudaGpu) -> None:
    kernel = gpu.load_module(PTX, name="test").kernel("spin")
    low, high = gpu.create_stream(priority=Priority.LOW), gpu.create_stream(priority=Priority.HIGH)
    # 20 waves of blocks that fill every SM, 0.2 ms each, then one small kernel on the other stream.
    fill = Launch(kernel, (gpu.info.sms * 2 * 20, 1, 1), (1024, 1, 1), params=(u64(200_000),))
    small = Launch(kernel, (1, 1, 1), (1024, 1, 1), params=(u64(1_000),))
    done: dict[Priority, int] = {}
    for stream in (gpu.create_stream(priority=Priority.LOW), high):
        end_of_fill, end_of_small = gpu.create_event(), gpu.create_event()
        low.launch(fill)
        low.record(end_of_fill)
        begin = gpu.now_ns()
        gpu.wait([], begin + 500_000)
        stream.launch(small)
        stream.record(end_of_small)
        gpu.synchronize()
        done[stream.priority] = end_of_small.time_ns() - begin
    assert done[Priority.HIGH] < 0.5 * done[Priority.LOW]


def test_a_launch_costs_the_host_microseconds(gpu: CudaGpu) -> None:
    buffer, stream = gpu.allocate(512), gpu.create_stream()
    launch = Launch(
        gpu.load_module(PTX, name="test").kernel("add1"), (1, 1, 1), (1, 1, 1), params=(u64(buffer.address),)
    )
    costs = []
    for _ in range(20):
        stream.synchronize()
        begin = gpu.now_ns()
        for _ in range(100):
            stream.launch(launch)
        costs.append((gpu.now_ns() - begin) / 100)
    assert np.median(costs) < 10_000


# --- memory
def test_the_nth_allocation_runs_out_and_the_others_go_on(gpu: CudaGpu) -> None:
    held: list[DeviceBuffer] = []

    def load_tenants() -> None:
        while True:
            held.append(gpu.allocate(8 << 30, tenant=f"tenant{len(held)}"))

    with pytest.raises(OutOfMemoryError) as raised:
        load_tenants()
    assert raised.value.tenant == f"tenant{len(held)}"
    assert 0 <= raised.value.available < raised.value.requested == 8 << 30
    stream, host = gpu.create_stream(), gpu.allocate_host(4096)
    for value, buffer in enumerate(held):
        stream.launch(Fill(buffer.address, 4096, value))
    stream.copy_to_host(host, held[-1].address)
    stream.synchronize()
    assert (host.array == len(held) - 1).all()
    assert gpu.ledger.in_use("tenant0") == 8 << 30
    for buffer in held:
        buffer.free()
    assert gpu.ledger.in_use("tenant0") == 0


# --- modules
def test_bad_code_is_explained(gpu: CudaGpu) -> None:
    with pytest.raises(MisuseError, match=r"'broken'.*(nonsense|Parsing|syntax)"):
        gpu.load_module(b".version 8.0\n.target sm_90\n.address_size 64\nnonsense;\n", name="broken")
    with pytest.raises(MisuseError, match=r"neither PTX nor a cubin|can't be loaded"):
        gpu.load_module(b"\x7fELF but not really", name="junk")
    module = gpu.load_module(PTX, name="test")
    with pytest.raises(MisuseError, match=r"no kernel 'addl'; it has: add1, smids, spin, trap"):
        module.kernel("addl")


def test_launches_that_make_no_sense_are_refused_before_they_run(gpu: CudaGpu) -> None:
    kernel, stream = gpu.load_module(PTX, name="test").kernel("add1"), gpu.create_stream()
    with pytest.raises(MisuseError, match=r"arguments of \[8\] bytes, not \[4\]"):
        stream.launch(Launch(kernel, (1, 1, 1), (1, 1, 1), params=(b"\0" * 4,)))
    with pytest.raises(MisuseError, match="2000"):
        stream.launch(Launch(kernel, (1, 1, 1), (2000, 1, 1), params=(u64(0),)))
    with pytest.raises(MisuseError, match="shared memory"):
        stream.launch(Launch(kernel, (1, 1, 1), (1, 1, 1), 1 << 20, (u64(0),)))
    stream.synchronize()


# --- faults: each in a process of its own, since they destroy the context
FAULT = """
    from missile.errors import KernelFaultError
    from missile.gpu import open_gpu
    from missile.gpu.interface import Launch
    PTX = {ptx!r}
    gpu = open_gpu("cuda:0")
    quiet, bad = gpu.create_stream(), gpu.create_stream()
    fine = gpu.load_module(PTX, name="innocent/a").kernel("spin")
    quiet.launch(Launch(fine, (1, 1, 1), (1, 1, 1), params=((1000).to_bytes(8, "little"),)))
    quiet.synchronize()
    kernel = gpu.load_module(PTX, name="guilty/b").kernel({entry!r})
    bad.launch(Launch(kernel, (1, 1, 1), (1, 1, 1), params={params!r}))
    for call in (gpu.synchronize, lambda: gpu.allocate(512, tenant="innocent"), quiet.idle):
        try:
            call()
        except KernelFaultError as error:
            print(error.tenant, error.code, error.usable)
        else:
            print("no error")
    gpu.close()
    print("closed")
"""


@pytest.mark.parametrize(
    ("entry", "params", "code"),
    [
        ("add1", (u64(16),), "CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("add1", (u64(0x7F0000000001),), "CUDA_ERROR_MISALIGNED_ADDRESS"),
        ("trap", (), "CUDA_ERROR_LAUNCH_FAILED"),
    ],
)
def test_a_fault_names_the_guilty_tenant_and_stays(entry: str, params: tuple[bytes, ...], code: str) -> None:
    program = textwrap.dedent(FAULT).format(ptx=PTX, entry=entry, params=params)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    lines = run.stdout.splitlines()
    assert lines[-1:] == ["closed"], run.stderr
    assert len(lines) == 4
    for line in lines[:3]:
        tenant, said, usable = line.split()
        assert (tenant, usable) == ("guilty", "nothing")
        assert said in (code, "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_ILLEGAL_INSTRUCTION")


# --- the memory lab
def test_latencies_repeat_to_within_cycles_and_differ_between_granules(gpu: CudaGpu) -> None:
    buffer = gpu.allocate(4 << 20)
    base = -(-buffer.address // (2 << 20)) * (2 << 20)
    granules = np.arange(512, dtype=np.int64)
    addresses = base + ((granules & 1) << 8) + ((granules >> 1) << 10)
    sms = gpu.sm_ids()[:8]
    one, two = (gpu.measure_latency(addresses, sms, concurrent=4) for _ in range(2))
    assert one.shape == (8, 512)
    assert np.median(np.abs(one - two)) < 3
    assert one.std(axis=1).min() > 5  # slices are near and far
    buffer.free()


def test_an_aggressor_takes_bandwidth_from_a_victim(gpu: CudaGpu) -> None:
    buffer = gpu.allocate(256 << 20)
    ours = buffer.address + 256 * np.arange((8 << 20) // 256, dtype=np.int64)
    theirs = buffer.address + (16 << 20) + 256 * np.arange((240 << 20) // 256, dtype=np.int64)
    alone = gpu.measure_contention(Traffic(ours, 32))
    both = gpu.measure_contention(Traffic(ours, 32), Traffic(theirs, 100, Access.READ))
    chased = gpu.measure_contention(Traffic(ours, 32), mode="latency")
    nobody = gpu.measure_contention(None, Traffic(theirs, 100, Access.READ))
    assert alone.victim_ns.shape == (20,)
    assert alone.aggressor_bytes_per_s == 0.0
    assert np.median(both.victim_ns) > 1.2 * np.median(alone.victim_ns)
    assert np.median(chased.victim_ns) > np.median(alone.victim_ns)
    assert both.aggressor_bytes_per_s > 0.5e12
    assert nobody.aggressor_bytes_per_s > 0.8 * both.aggressor_bytes_per_s
    assert nobody.victim_ns.size == 0
    buffer.free()
