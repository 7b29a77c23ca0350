from __future__ import annotations

import gc
import os
import signal
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from missile.errors import InternalError, KernelFaultError, MisuseError, OutOfMemoryError
from missile.gpu.interface import GpuInfo
from missile.runtime.loading import load_tenants
from missile.runtime.policies import POLICIES, Lane, Layout, Snapshot, Start
from missile.runtime.records import RunRecord
from missile.runtime.run import SOLO, run, solo
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import arrival_times

MS = 1_000_000
TIMES = ("arrival", "dispatch", "start", "end", "done", "lane")


def by_name(record: RunRecord) -> dict[str, Any]:
    return {tenant.name: tenant for tenant in record.tenants}


@pytest.fixture
def mix(tenant) -> tuple[Tenant, ...]:
    return (
        tenant("ls", "LS", rate=400),
        tenant("be", "BE", "synthetic-gemv"),
        tenant("spin", "LS", "synthetic-spin", rate=50),
        tenant("slow", "BE", "synthetic-copy", arrivals={"kind": "closed", "depth": 1, "think_ms": 1.0}),
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_accounted_for_and_times_are_in_order(gpu, mix, policy):
    with load_tenants(gpu, mix) as roster:
        record = run(gpu, roster, policy, seed=3, duration_ns=120 * MS, warmup_ns=20 * MS)
    assert (record.policy, record.simulated, record.interrupted, record.fault) == (policy, True, False, "")
    for spec, got in zip(mix, record.tenants, strict=True):
        assert len(got.arrival) >= 5
        assert np.all(got.arrival < got.dispatch)
        assert np.all(got.start < got.end)
        assert np.all(got.end <= got.done)
        assert np.all(np.diff(got.start) >= 0)
        assert np.all(got.start[1:] >= got.end[:-1])  # its buffers exist once
        assert np.all(got.lane < len(record.lanes))
        if spec.closed_loop is None:
            due = arrival_times(spec.arrivals, seed=3, tenant=spec.name, horizon_ns=120 * MS)
            due = due[due >= 20 * MS]
            assert len(got.arrival) + got.unfinished == len(due)
            np.testing.assert_array_equal(got.arrival, due[: len(got.arrival)])
        else:
            assert np.all((got.done >= 20 * MS) & (got.done < 120 * MS))
            assert got.unfinished == 0


def test_temporal_never_overlaps(gpu, mix):
    record = run(gpu, mix, "temporal", seed=3, duration_ns=100 * MS)
    spans = sorted((s, e) for t in record.tenants for s, e in zip(t.start.tolist(), t.end.tolist(), strict=True))
    assert all(after[0] >= before[1] for before, after in pairwise(spans))


def test_the_same_seed_gives_the_same_run_and_another_does_not(mix):
    from missile.gpu import open_gpu

    def once(seed: int) -> RunRecord:
        with open_gpu("sim:h100", seed=seed) as gpu:
            return run(gpu, mix, "priority", seed=seed, duration_ns=60 * MS)

    first, again, other = once(1), once(1), once(2)
    for a, b in zip(first.tenants, again.tenants, strict=True):
        for name in TIMES:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert not np.array_equal(by_name(first)["ls"].arrival, by_name(other)["ls"].arrival)


def test_solo_has_the_arrivals_of_the_shared_run_and_the_gpu_to_itself(gpu, mix):
    with load_tenants(gpu, mix) as roster:
        shared = by_name(run(gpu, roster, "streams", seed=3, duration_ns=150 * MS))
        alone = solo(gpu, roster, "ls", seed=3, duration_ns=150 * MS)
        fast = by_name(solo(gpu, roster, "be", seed=3, duration_ns=150 * MS))["be"]
        with pytest.raises(MisuseError, match="known: ls, be, spin, slow"):
            solo(gpu, roster, "nobody", seed=3, duration_ns=150 * MS)
    assert alone.policy == SOLO
    (only,) = alone.tenants
    both = min(len(only.arrival), len(shared["ls"].arrival))
    np.testing.assert_array_equal(only.arrival[:both], shared["ls"].arrival[:both])
    assert np.median(only.latency) < np.median(shared["ls"].latency)
    assert len(fast.done) > len(shared["be"].done)


def test_a_closed_loop_keeps_its_depth_outstanding_and_the_gpu_busy(gpu, tenant):
    with load_tenants(gpu, [tenant("be", "BE", "synthetic-gemv")]) as roster:
        record = by_name(solo(gpu, roster, "be", seed=0, duration_ns=100 * MS))["be"]
    middle = int(record.done[len(record.done) // 2])
    assert np.count_nonzero(record.arrival <= middle) - np.count_nonzero(record.done <= middle) in (1, 2)
    idle = record.start[1:] - record.end[:-1]
    assert np.median(idle) < 0.05 * np.median(record.end - record.start)


def test_thinking_tenants_wait(gpu, mix):
    record = by_name(run(gpu, mix, "streams", seed=1, duration_ns=100 * MS))["slow"]
    np.testing.assert_array_equal(record.arrival[1:] - record.done[:-1], 1 * MS)


def test_overload_is_reported_as_unfinished(gpu, tenant):
    record = by_name(
        run(gpu, [tenant("ls", "LS", "synthetic-spin", rate=5000)], "streams", seed=0, duration_ns=40 * MS)
    )
    assert record["ls"].unfinished > 20
    assert record["ls"].done.max() < 60 * MS


def test_memory_comes_back(gpu, mix):
    before = gpu.memory_free()
    with load_tenants(gpu, mix) as roster:
        assert gpu.memory_free() < before - (1 << 30)
        run(gpu, roster, "partition", seed=0, duration_ns=10 * MS)
        run(gpu, roster, "partition:ls_share=0.5", seed=0, duration_ns=10 * MS)
    assert gpu.memory_free() == before


def test_one_that_does_not_fit_leaves_the_others_running(gpu, tenant):
    tenants = [tenant("big", "BE", "synthetic-gemv", memory_limit_mb=100), tenant("ls", "LS", rate=400)]
    with load_tenants(gpu, tenants) as roster:
        record = run(gpu, roster, "priority", seed=0, duration_ns=50 * MS)
        alone = solo(gpu, roster, "big", seed=0, duration_ns=50 * MS)
    big, ls = record.tenants
    assert "limit is 100 MiB" in big.error
    assert any("big did not run" in note for note in record.notes)
    assert len(ls.arrival) > 5
    assert alone.tenants[0].error == big.error


def test_the_nth_tenant_meets_the_end_of_the_gpu_s_memory(gpu, tenant):
    hold = gpu.allocate(gpu.memory_free() - (700 << 20))
    try:
        with load_tenants(gpu, [tenant("a", model="synthetic-gemv"), tenant("b", model="synthetic-gemv")]) as roster:
            assert [entry.model is None for entry in roster.tenants] == [False, True]
            assert "'b'" in roster.tenants[1].error
        with pytest.raises(OutOfMemoryError, match="No tenant could be loaded"):
            load_tenants(gpu, [tenant("c", model="synthetic-copy")])
    finally:
        hold.free()


@pytest.mark.parametrize(
    ("models", "says"),
    [(["synthetic-nope"], "synthetic-copy"), (["nope"], "nope"), ([], "no tenant")],
)
def test_bad_tenants_load_nothing(gpu, tenant, models, says):
    before = gpu.memory_free()
    with pytest.raises(MisuseError, match=says):
        load_tenants(gpu, [tenant("ok")] * bool(models) + [tenant(f"t{i}", model=m) for i, m in enumerate(models)])
    assert gpu.memory_free() == before
    with pytest.raises(MisuseError, match="twice"):
        load_tenants(gpu, [tenant("a"), tenant("a")])


def test_ctrl_c_keeps_what_there_is(gpu, mix):
    shown = []

    def progress(share: float) -> None:
        shown.append(share)
        if share >= 0.5:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    record = run(gpu, mix, "streams", seed=3, duration_ns=100 * MS, warmup_ns=10 * MS, progress=progress)
    assert record.interrupted
    assert 50 * MS <= record.duration_ns < 70 * MS
    assert len(record.tenants[0].arrival) > 5
    assert "interrupted" in record.notes[-1]
    assert shown == sorted(shown)
    assert signal.getsignal(signal.SIGINT) is before
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


class Faulty:
    """A GPU whose `wait` meets a kernel fault after a while."""

    def __init__(self, gpu: Any, waits: int, tenant: str = "") -> None:
        self._gpu, self._left, self._tenant = gpu, waits, tenant

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gpu, name)

    def wait(self, events: Sequence[Any], deadline_ns: int | None = None) -> None:
        self._left -= 1
        if self._left == 0:
            raise KernelFaultError("cuEventQuery", "CUDA_ERROR_ILLEGAL_ADDRESS", tenant=self._tenant)
        self._gpu.wait(events, deadline_ns)


@pytest.mark.parametrize("named", [True, False])
def test_a_fault_keeps_what_had_finished_and_says_who(gpu, mix, named):
    with load_tenants(gpu, mix) as roster:
        whole = run(gpu, roster, "streams", seed=3, duration_ns=100 * MS)
        record = run(Faulty(gpu, 200, "be" if named else ""), roster, "streams", seed=3, duration_ns=100 * MS)
    assert "ILLEGAL_ADDRESS" in record.fault
    assert not record.interrupted
    assert record.duration_ns < 100 * MS
    blamed = {tenant.name for tenant in record.tenants if tenant.error}
    if named:
        assert blamed == {"be"}
    else:
        assert "be" in blamed  # its kernels never pause
    got, expected = by_name(record)["be"], by_name(whole)["be"]
    assert 5 < len(got.done) < len(expected.done)
    assert got.done.max() < record.duration_ns
    assert "valid" in record.notes[-1]


def test_a_fault_before_the_start_names_the_tenant(gpu, tenant):
    class Dead(Faulty):
        def synchronize(self) -> None:
            raise KernelFaultError("cuCtxSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS")

    with load_tenants(gpu, [tenant("a")]) as roster, pytest.raises(KernelFaultError) as caught:
        run(Dead(gpu, 0), roster, "streams", seed=0, duration_ns=10 * MS)
    assert caught.value.tenant == "a"


class Alternating:
    """Runs each request on the other lane than the one before, and nothing else."""

    name = "alternating"

    def __init__(self, greedy: bool = False) -> None:
        self._count, self._greedy = 0, greedy

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        return Layout((Lane("a", partition=0), Lane("b", partition=1)), partitions=(32,))

    def decide(self, snapshot: Snapshot) -> Sequence[Start]:
        starts = []
        for _ in range(9 if self._greedy else min(snapshot.queued[0], 2 - snapshot.running[0])):
            starts.append(Start(0, self._count % 2))
            self._count += 1
        return starts


def test_a_tenant_that_changes_lanes_still_runs_one_request_at_a_time(gpu, tenant):
    record = run(gpu, [tenant("be", "BE", "synthetic-gemv")], Alternating(), seed=0, duration_ns=100 * MS)
    (be,) = record.tenants
    assert len(be.done) > 10
    assert set(be.lane) == {0, 1}
    assert np.all(be.start[1:] >= be.end[:-1])
    assert np.all(np.diff(be.done) >= 0)


def test_a_policy_that_breaks_the_rules_is_an_internal_error(gpu, tenant):
    with pytest.raises(InternalError, match="can't be started"):
        run(gpu, [tenant("be")], Alternating(greedy=True), seed=0, duration_ns=10 * MS)


def test_a_warm_up_as_long_as_the_run_is_refused(gpu, tenant):
    with pytest.raises(MisuseError, match="warm-up"):
        run(gpu, [tenant("be")], "streams", seed=0, duration_ns=10 * MS, warmup_ns=10 * MS)
