"""The fluid model of the SMs: what is conserved, what is bounded, and what it reproduces."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missile.gpu.sim.compute import Compute
from missile.gpu.sim.cost import KernelCost, kernel_cost, missing_share
from missile.gpu.sim.sharing import Capacities, crowded_speed, fair_shares, placed_speed, queueing_ns, speeds
from missile.gpu.sim.spec import GpuSpec, load_spec
from missile.gpu.work import KernelWork

H100 = load_spec("h100")
LIMITS = Capacities.of(H100)

works = st.builds(
    KernelWork,
    blocks=st.integers(1, 5000),
    threads=st.sampled_from([32, 128, 256, 1024]),
    blocks_per_sm=st.integers(1, 32),
    read_bytes=st.integers(0, 1 << 28),
    write_bytes=st.integers(0, 1 << 26),
    footprint_bytes=st.integers(0, 1 << 27),
    operations=st.integers(0, 10**10),
    tensor_ops=st.booleans(),
    solo_ns=st.floats(1_000, 1_000_000),
)
costs = works.map(lambda work: kernel_cost(work, H100))


def run_all(compute: Compute, limit: int = 10_000) -> dict[int, float]:
    """Run until idle; when each kernel ended, by order of arrival."""
    ends: dict[int, float] = {}
    compute.settle()
    for _ in range(limit):
        if compute.idle:
            return ends
        assert compute.next_ns < math.inf, "kernels left that never go on"
        now = compute.next_ns
        compute.advance(now)
        for kernel in compute.finished():
            ends[kernel.order[1]] = now
        compute.settle()
    raise AssertionError("never idle")


@given(cost=costs)
def test_alone_a_kernel_takes_its_solo_time(cost: KernelCost) -> None:
    compute = Compute(H100)
    compute.start(0.0, cost, (0,))
    assert run_all(compute)[1] == pytest.approx(cost.solo_ns, rel=1e-9)


@given(work=works)
def test_a_kernel_recorded_here_keeps_its_measured_time(work: KernelWork) -> None:
    assert kernel_cost(work, H100).solo_ns == work.solo_ns


@settings(max_examples=60)
@given(
    arrivals=st.lists(st.tuples(costs, st.floats(0, 300_000), st.integers(0, 1), st.integers(0, 2)), max_size=8),
)
def test_everything_ends_and_room_comes_back(arrivals: list[tuple[KernelCost, float, int, int]]) -> None:
    compute = Compute(H100)
    compute.divide((32, 100))
    parts = ((0, 1), (0,), (1,))
    ends = 0
    for cost, at, priority, where in sorted(arrivals, key=lambda entry: entry[1]):
        while compute.next_ns <= at:
            compute.advance(compute.next_ns)
            ends += len(compute.finished())
            compute.settle()
        compute.start(at, cost, parts[where], priority=priority)
        compute.settle()
        assert all(free >= 0 for free in compute._free)
        held = [0, 0]
        for kernel in compute._running:
            assert sum(kernel.held) == kernel.blocks <= kernel.cost.blocks
            assert 0.0 <= kernel.spread <= kernel.sms
            for part, count in zip(kernel.parts, kernel.held, strict=True):
                held[part] += count * kernel.cost.units
        assert [h + f for h, f in zip(held, compute._free, strict=True)] == [32 * 5040, 100 * 5040]
    ends += len(run_all(compute))
    assert ends == len(arrivals)
    assert compute._free == [32 * 5040, 100 * 5040]
    assert not compute.contended


@settings(max_examples=60)
@given(group=st.lists(costs, min_size=1, max_size=6))
def test_sm_time_held_is_at_most_what_there_is(group: list[KernelCost]) -> None:
    compute = Compute(H100)
    for cost in group:
        compute.start(0.0, cost, (0,))
    last = max(run_all(compute).values())
    assert 0.0 < compute.busy_sm_ns <= last * H100.sm.count * (1 + 1e-9)


mixes = st.lists(st.tuples(costs, st.floats(0.01, 1.0), st.floats(1.0, 132.0)), min_size=1, max_size=6)


@given(mix=mixes)
def test_bandwidths_and_arithmetic_are_never_exceeded(mix: list[tuple[KernelCost, float, float]]) -> None:
    group, placed, room = (list(column) for column in zip(*mix, strict=True))
    found = speeds(group, placed, room, LIMITS)
    assert all(0.0 < speed <= limit * (1 + 1e-9) for speed, limit in zip(found, placed, strict=True))
    missing = missing_share(sum(c.working_set for c in group), H100.l2_bytes) if len(group) > 1 else group[0].missing
    assert sum(c.vram * missing * s for c, s in zip(group, found, strict=True)) <= H100.vram_rate * (1 + 1e-9)
    assert sum(c.l2 * s for c, s in zip(group, found, strict=True)) <= H100.l2.bandwidth_gb_s * (1 + 1e-9)
    assert sum(c.arithmetic * s for c, s in zip(group, found, strict=True)) <= 1 + 1e-9


@given(mix=mixes, extra=st.tuples(costs, st.floats(0.01, 1.0), st.floats(1.0, 132.0)))
def test_a_neighbour_never_speeds_anybody_up(
    mix: list[tuple[KernelCost, float, float]], extra: tuple[KernelCost, float, float]
) -> None:
    before = speeds(*(list(column) for column in zip(*mix, strict=True)), LIMITS)
    after = speeds(*(list(column) for column in zip(*mix, extra, strict=True)), LIMITS)
    assert all(late <= early * (1 + 1e-9) for early, late in zip(before, after, strict=False))


@given(cost=costs, held=st.integers(1, 5000), sms=st.integers(1, 132))
def test_more_room_is_never_slower(cost: KernelCost, held: int, sms: int) -> None:
    less, more = (placed_speed(cost, room, min(room, sms), LIMITS) for room in (held, held + 1))
    assert 0.0 < less <= more <= 1.0


@given(cost=costs, held=st.integers(1, 5000), sms=st.integers(1, 132), around=st.floats(0.0, 32.0))
def test_blocks_of_others_on_the_same_sms_only_slow(cost: KernelCost, held: int, sms: int, around: float) -> None:
    placed = placed_speed(cost, held, min(held, sms), LIMITS)
    few, many = (crowded_speed(cost, placed, held, min(held, sms), n, LIMITS) for n in (around, around + 1.0))
    assert 0.0 < many <= few <= placed * (1 + 1e-9)


demands = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.1, 100)), min_size=1, max_size=8)


@given(entries=demands, capacity=st.floats(1.0, 1e6))
def test_fair_shares_are_max_min_fair(entries: list[tuple[float, float]], capacity: float) -> None:
    wants, weights = (list(column) for column in zip(*entries, strict=True))
    shares = fair_shares(wants, weights, capacity)
    assert all(0.0 <= share <= want for share, want in zip(shares, wants, strict=True))
    assert sum(shares) == pytest.approx(min(capacity, sum(wants)), rel=1e-9)
    unmet = [s / w for s, want, w in zip(shares, wants, weights, strict=True) if s < want * (1 - 1e-9)]
    if unmet:  # those who want more all have the same per weight, and nobody has more per weight than they
        assert max(unmet) == pytest.approx(min(unmet), rel=1e-6)
        assert all(s / w <= min(unmet) * (1 + 1e-6) for s, w in zip(shares, weights, strict=True))


def test_queues_at_the_memory_grow_with_load_and_no_more_beyond_a_limit() -> None:
    waits = [queueing_ns(load / 20, LIMITS) for load in range(30)]
    assert waits[0] == 0.0
    assert waits[10] == H100.sharing.queueing_ns
    assert waits == sorted(waits)
    assert waits[-1] == waits[20] < 5_000.0


def _full_gpu(waves: int, solo_ns: float) -> KernelCost:
    return kernel_cost(KernelWork(blocks=132 * waves, blocks_per_sm=1, solo_ns=solo_ns), H100)


def test_a_later_kernel_of_the_same_priority_waits_until_the_earlier_is_placed() -> None:
    compute = Compute(H100)
    compute.start(0.0, _full_gpu(10, 100_000.0), (0,))
    compute.start(0.0, _full_gpu(1, 5_000.0), (0,))
    assert run_all(compute) == pytest.approx({1: 100_000.0, 2: 105_000.0})


def test_a_later_kernel_of_higher_priority_waits_for_running_blocks_only() -> None:
    compute = Compute(H100)
    compute.start(0.0, _full_gpu(10, 100_000.0), (0,))
    compute.settle()
    compute.start(42_000.0, _full_gpu(1, 5_000.0), (0,), priority=1)
    ends = run_all(compute)
    assert ends[2] == pytest.approx(42_000.0 + 10_000.0 + 5_000.0)  # a block takes 10 us
    assert ends[1] > 100_000.0


def test_a_small_kernel_of_higher_priority_waits_for_as_many_blocks_as_it_needs() -> None:
    compute = Compute(H100)
    compute.start(0.0, _full_gpu(10, 100_000.0), (0,))
    compute.settle()
    small = kernel_cost(KernelWork(blocks=13, blocks_per_sm=1, solo_ns=5_000.0), H100)
    compute.start(42_000.0, small, (0,), priority=1)
    ends = run_all(compute)
    assert ends[2] == pytest.approx(42_000.0 + 10_000.0 * 13 / 132 + 5_000.0)


def test_the_last_wave_leaves_the_sms_that_it_does_not_need() -> None:
    compute = Compute(H100)
    two_waves = kernel_cost(KernelWork(blocks=200, blocks_per_sm=1, solo_ns=100_000.0), H100)
    compute.start(0.0, two_waves, (0,))
    compute.settle()
    small = kernel_cost(KernelWork(blocks=60, blocks_per_sm=1, solo_ns=5_000.0), H100)
    compute.start(45_000.0, small, (0,))
    compute.settle()
    assert run_all(compute) == pytest.approx({1: 100_000.0, 2: 55_000.0})  # the last wave has 68 blocks


def test_kernels_share_sms_where_there_are_too_few_for_both_and_slow_each_other() -> None:
    compute = Compute(H100)
    wide = kernel_cost(KernelWork(blocks=132, blocks_per_sm=2, solo_ns=50_000.0), H100)
    compute.start(0.0, wide, (0,))
    compute.start(0.0, wide, (0,))
    both = run_all(compute)
    slower = 1 + H100.sharing.crowding / (1 + H100.sharing.crowding)
    assert both == pytest.approx({1: 50_000.0 * slower, 2: 50_000.0 * slower})


def test_blocks_that_need_whole_sms_leave_small_ones_few() -> None:
    compute = Compute(H100)
    whole = kernel_cost(KernelWork(blocks=128, blocks_per_sm=1, solo_ns=100_000.0), H100)
    small = kernel_cost(KernelWork(blocks=64, blocks_per_sm=16, solo_ns=5_000.0), H100)
    compute.start(0.0, whole, (0,))
    compute.start(0.0, small, (0,))
    ends = run_all(compute)
    crowding = H100.sharing.crowding
    assert ends[2] == pytest.approx(5_000.0 * (1 + 16 * crowding) / (1 + crowding))  # 64 blocks on 4 SMs
    assert ends[1] == pytest.approx(100_000.0)


def test_room_that_comes_soon_saves_a_wave() -> None:
    compute = Compute(H100)
    short = kernel_cost(KernelWork(blocks=10, blocks_per_sm=1, solo_ns=3_000.0), H100)
    compute.start(0.0, short, (0,))
    compute.settle()
    compute.start(0.0, _full_gpu(1, 50_000.0), (0,))  # ten blocks wait for the first kernel's SMs
    assert 50_000.0 < run_all(compute)[2] < 55_000.0


def test_a_launch_that_took_its_turn_early_goes_before_what_came_since() -> None:
    compute = Compute(H100)
    compute.start(0.0, _full_gpu(1, 10_000.0), (0,))
    compute.settle()
    turn = compute.take_turn()
    compute.start(1_000.0, _full_gpu(1, 20_000.0), (0,))
    compute.start(2_000.0, _full_gpu(1, 5_000.0), (0,), turn=turn)
    compute.settle()
    assert sorted(run_all(compute).values()) == pytest.approx([10_000.0, 15_000.0, 35_000.0])


def test_times_far_out_do_not_stall() -> None:
    compute = Compute(H100)
    start = 3e12  # fifty minutes
    for offset in (0.0, 0.1, 0.2):
        compute.start(start + offset, _full_gpu(3, 1_000.1), (0,))
        compute.settle()
    assert len(run_all(compute)) == 3


def test_kernels_of_one_wave_are_not_displaced() -> None:
    compute = Compute(H100)
    compute.start(0.0, _full_gpu(1, 100_000.0), (0,))
    compute.settle()
    compute.start(1_000.0, _full_gpu(1, 5_000.0), (0,), priority=1)
    assert run_all(compute) == pytest.approx({1: 100_000.0, 2: 105_000.0})


def test_kernels_that_leave_room_run_side_by_side() -> None:
    compute = Compute(H100)
    half = kernel_cost(KernelWork(blocks=66, blocks_per_sm=1, solo_ns=50_000.0), H100)
    compute.start(0.0, half, (0,))
    compute.start(0.0, half, (0,))
    assert run_all(compute) == pytest.approx({1: 50_000.0, 2: 50_000.0})


def test_blocks_on_fewer_sms_take_more_waves() -> None:
    compute = Compute(H100)
    compute.divide((32, 100))
    compute.start(0.0, _full_gpu(1, 10_000.0), (0,))
    crowding = H100.sharing.crowding
    assert run_all(compute)[1] == pytest.approx(10_000.0 * (5 + 5 * crowding) / (1 + crowding))  # 132 blocks: 5 waves


def test_a_bandwidth_bound_kernel_needs_only_part_of_the_sms() -> None:
    stream = KernelWork(blocks=10_000, blocks_per_sm=8, read_bytes=1 << 28, footprint_bytes=1 << 28, solo_ns=90_000.0)
    cost = kernel_cost(stream, H100)
    assert placed_speed(cost, 8 * 100, 100, LIMITS) > 0.9
    assert placed_speed(cost, 8 * 8, 8, LIMITS) < 0.5


@pytest.mark.parametrize("name", ["h200", "v100", "gtx1080", "p40", "a2000", "a5500"])
def test_recordings_scale_to_other_gpus_by_what_bounds_them(name: str) -> None:
    spec: GpuSpec = load_spec(name)
    memory = KernelWork(
        blocks=10_000, blocks_per_sm=8, footprint_bytes=1 << 28, solo_ns=2**28 / H100.vram_rate, recorded_on=H100.name
    )
    arithmetic = KernelWork(
        blocks=10_000, operations=10**10, solo_ns=10**10 / H100.operation_rate(False), recorded_on=H100.name
    )
    gap = H100.sharing.graph_gap_ns  # part of what was recorded
    assert kernel_cost(memory, spec).solo_ns == pytest.approx((memory.solo_ns - gap) * H100.vram_rate / spec.vram_rate)
    ratio = H100.operation_rate(False) / spec.operation_rate(False)
    assert kernel_cost(arithmetic, spec).solo_ns == pytest.approx((arithmetic.solo_ns - gap) * ratio)
