"""Kernels confined to colors of memory on the simulated GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.errors import MisuseError
from missile.gpu.interface import Launch
from missile.gpu.sim import SimulatedGpu, load_spec
from missile.gpu.sim.cost import KernelCost, kernel_cost
from missile.gpu.sim.sharing import Capacities, speeds
from missile.gpu.sim.spec import NoiseTable
from missile.gpu.work import KernelWork

SPEC = load_spec("h200").model_copy(update={"noise": NoiseTable(kernel=0.0, copy=0.0)})
CAPACITIES = Capacities.of(SPEC)
COLORS = SPEC.l2.colors
LOW = dict.fromkeys(range(COLORS // 2), 1.0)
HIGH = dict.fromkeys(range(COLORS // 2, COLORS), 1.0)

works = st.builds(
    KernelWork,
    blocks=st.integers(1, 4000),
    blocks_per_sm=st.integers(1, 8),
    read_bytes=st.integers(0, 1 << 28),
    footprint_bytes=st.integers(0, 1 << 28),
    operations=st.integers(0, 10**10),
    solo_ns=st.floats(2_000.0, 1e6),
)
colors = st.dictionaries(st.integers(0, COLORS - 1), st.floats(0.1, 1.0), min_size=1)


def cost(work: KernelWork, by_color: dict[int, float] | None = None) -> KernelCost:
    return kernel_cost(replace(work, bytes_by_color=by_color or {}), SPEC, 200e6)


def test_a_stream_in_half_of_the_colors_has_half_of_the_rate():
    copy = KernelWork(4000, read_bytes=1 << 29, footprint_bytes=1 << 29, solo_ns=(1 << 29) / SPEC.vram_rate / 0.95)
    assert speeds([cost(copy, LOW)], [1.0], [132.0], CAPACITIES)[0] == pytest.approx(0.5 / 0.95, rel=0.02)
    even = dict.fromkeys(range(COLORS), 0.5)
    assert cost(copy, even) == cost(copy)


@given(victim=works, neighbour=works)
def test_a_neighbour_in_other_colors_takes_arithmetic_and_nothing_else(victim, neighbour):
    mine, theirs = cost(replace(victim, operations=0), LOW), cost(neighbour, HIGH)
    alone = speeds([mine], [1.0], [66.0], CAPACITIES)[0]
    assert speeds([mine, theirs], [1.0, 1.0], [66.0, 66.0], CAPACITIES)[0] == pytest.approx(alone)


@given(first=works, second=works, one=colors, other=colors)
def test_neighbours_only_slow_each_other_whatever_their_colors(first, second, one, other):
    a, b = cost(first, one), cost(second, other)
    together = speeds([a, b], [1.0, 1.0], [66.0, 66.0], CAPACITIES)
    assert together[0] <= speeds([a], [1.0], [66.0], CAPACITIES)[0] * (1 + 1e-9)
    assert together[1] <= speeds([b], [1.0], [66.0], CAPACITIES)[0] * (1 + 1e-9)
    assert min(together) > 0.0


def test_on_the_gpu_separation_helps_a_victim_of_memory_traffic():
    def took(mine: dict[int, float], theirs: dict[int, float]) -> int:
        gpu = SimulatedGpu(SPEC)
        kernel = gpu.load_module(b"", name="tenant").kernel("k")

        def launch(work: KernelWork) -> Launch:
            return Launch(kernel, (work.blocks, 1, 1), (128, 1, 1), work=work)

        traffic = KernelWork(4000, read_bytes=1 << 33, footprint_bytes=1 << 33, solo_ns=2e6, bytes_by_color=theirs)
        small = KernelWork(64, read_bytes=1 << 24, footprint_bytes=1 << 24, solo_ns=2e4, bytes_by_color=mine)
        ls, be = (gpu.create_stream(partition=part) for part in gpu.split_sms((64, 64)).parts)
        be.launch(launch(traffic))
        graph = gpu.create_graph([launch(small)] * 10)
        begin = gpu.now_ns()
        ls.launch_graph(graph)
        ls.synchronize()
        return gpu.now_ns() - begin

    assert took(LOW, HIGH) < 0.8 * took(LOW, LOW)


def test_unknown_colors_are_refused():
    with pytest.raises(MisuseError, match="0 to 7"):
        cost(KernelWork(1), {8: 1.0})
