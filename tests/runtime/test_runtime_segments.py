from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.errors import InternalError
from missile.gpu.interface import Fill, GpuInfo, Launch, Priority
from missile.gpu.work import KernelWork
from missile.runtime.loading import load_tenants
from missile.runtime.policies.interface import (
    Action,
    Advance,
    Lane,
    Layout,
    Preempt,
    Reject,
    Snapshot,
    Start,
    TenantBrief,
    Wake,
)
from missile.runtime.preempting import make_preemptible
from missile.runtime.run import run
from missile.runtime.segments import MOST_SEGMENTS, cut
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import arrival_times

MS = 1_000_000


class Kernel:
    name, registers = "k", 0


def operation(length: float | None) -> Launch | Fill:
    if length is None:
        return Fill(0, 16)
    return Launch(Kernel(), (1, 1, 1), (32, 1, 1), work=KernelWork(1, solo_ns=length))


lengths = st.lists(st.none() | st.just(0.0) | st.floats(1.0, 1e5), min_size=1, max_size=200)


@given(lengths=lengths, target=st.none() | st.floats(0.0, 1e6), total=st.floats(1.0, 1e7))
def test_segments_cover_a_model_in_order_and_share_its_length(lengths, target, total):
    segments = cut([operation(length) for length in lengths], total, target)
    assert segments[0].first == 0
    assert segments[-1].last == len(lengths)
    assert all(a.last == b.first for a, b in pairwise(segments))
    assert all(s.last > s.first and len(s.works) == s.last - s.first for s in segments)
    assert sum(s.expected_ns for s in segments) == pytest.approx(total)
    assert all(lengths[s.last - 1] is not None for s in segments[:-1])
    if target is None:
        assert len(segments) == 1


@given(lengths=st.lists(st.floats(1.0, 1e3), min_size=1, max_size=100), target=st.floats(0.0, 1e5))
def test_segments_are_as_long_as_asked_for_but_for_half_a_kernel(lengths, target):
    for segment in cut([operation(length) for length in lengths], sum(lengths), target)[:-1]:
        longest = max(lengths[segment.first : segment.last + 1])
        assert segment.expected_ns >= target - longest / 2 - 1e-6
        assert segment.last - segment.first == 1 or segment.expected_ns <= target + longest / 2 + 1e-6


def test_zero_means_one_kernel_each_within_reason():
    kernels = [operation(5.0)] * 40
    assert len(cut(kernels, 1.0, 0.0)) == 40
    assert len(cut([operation(None), *kernels, operation(None)], 1.0, 0.0)) == 41
    assert len(cut(kernels * 100, 1.0, 0.0)) <= MOST_SEGMENTS


class Piecewise:
    """Whole LS requests on lane 0; BE piece by piece, two in flight, on lanes 1 and 2 by turns."""

    name = "piecewise"

    def __init__(self, segment_ns: float, step: int = 1, refuse: int = 0) -> None:
        self.segment_ns, self.step, self.refuse = segment_ns, step, refuse
        self.briefs: Sequence[TenantBrief] = ()
        self.seen: list[tuple[int, int]] = []
        self.arrived = self.given = 0
        self.wakes: list[int] = []

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        self.ls = [t.latency_sensitive for t in tenants]
        lanes = (Lane("ls", Priority.HIGH, 0), Lane("be"), Lane("be, part", partition=1))
        return Layout(lanes, (32,), tuple(None if ls else self.segment_ns for ls in self.ls))

    def brief(self, tenants: Sequence[TenantBrief]) -> None:
        self.briefs = tenants

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        actions: list[Action] = []
        self.wakes.append(snapshot.now_ns)
        for tenant, ls in enumerate(self.ls):
            if ls:
                for _ in range(min(snapshot.queued[tenant], snapshot.depth[tenant] - snapshot.running[tenant])):
                    self.arrived += 1
                    turn_away = self.refuse and self.arrived % self.refuse == 0
                    actions.append(Reject(tenant) if turn_away else Start(tenant, 0))
                continue
            self.seen.append((snapshot.launched[tenant], snapshot.pending[tenant]))
            total = len(self.briefs[tenant].segments)
            launched, pending = snapshot.launched[tenant], snapshot.pending[tenant]
            waiting = min(snapshot.queued[tenant], snapshot.depth[tenant] - snapshot.running[tenant])
            while pending < 2 and (launched or waiting):
                count = min(self.step, total - launched)
                waiting -= not launched
                actions.append(Advance(tenant, 1 + self.given % 2, count))
                self.given += 1
                pending += count
                launched = (launched + count) % total
        return actions


@pytest.mark.parametrize(("segment_ns", "step"), [(0.0, 1), (0.0, 3), (50_000.0, 1), (1e9, 1)])
def test_cut_requests_run_whole_in_order_and_at_nearly_full_speed(gpu, tenant, segment_ns, step):
    tenants = [tenant("ls", "LS", rate=300), tenant("be", "BE", "synthetic-gemv")]
    policy = Piecewise(segment_ns, step)
    with load_tenants(gpu, tenants) as roster:
        record = run(gpu, roster, policy, seed=1, duration_ns=60 * MS)
        whole = run(gpu, roster, "streams", seed=1, duration_ns=60 * MS)
    be, plain = record.tenants[1], whole.tenants[1]
    assert not record.fault
    count = len(policy.briefs[1].segments)
    assert (count > 1) == (segment_ns < 1e9)
    assert {launched for launched, _ in policy.seen} <= set(range(count))
    assert max(pending for _, pending in policy.seen) <= 1 + step
    assert np.all(be.start[1:] >= be.end[:-1])
    assert np.all(be.arrival <= be.dispatch)
    assert np.all(be.start < be.end)
    # A GEMV keeps most of its speed on 100 of 132 SMs; the rest is what pieces cost.
    assert len(be.done) > 0.6 * len(plain.done)
    assert record.tenants[0].unfinished == 0


def test_rejected_requests_are_counted_and_do_not_run(gpu, tenant):
    tenants = [tenant("ls", "LS", rate=1500), tenant("be", "BE", "synthetic-gemv")]
    record = run(gpu, tenants, Piecewise(1e5, refuse=5), seed=1, duration_ns=60 * MS, warmup_ns=20 * MS)
    plain = run(gpu, tenants, "streams", seed=1, duration_ns=60 * MS, warmup_ns=20 * MS)
    ls, all_of_them = record.tenants[0], plain.tenants[0]
    assert ls.rejected >= 5
    assert len(ls.arrival) + ls.rejected + ls.unfinished == len(all_of_them.arrival) + all_of_them.unfinished
    assert np.all(ls.lane == 0)
    assert np.all(ls.start < ls.end)
    due = arrival_times(tenants[0].arrivals, seed=1, tenant="ls", horizon_ns=60 * MS)
    assert set(ls.arrival.tolist()) < set(due.tolist())


def test_requests_keep_their_times_however_many_were_refused_between_them(gpu, tenant):
    class Choosy(Piecewise):
        """Starts one request, and beside it the one that is as many later as there are slots."""

        def decide(self, snapshot: Snapshot) -> Sequence[Action]:
            between = 2 * snapshot.depth[0] + 1
            if snapshot.queued[0] <= between or snapshot.running[0]:
                return []
            return [Start(0, 0), *[Reject(0)] * (between - 1), Start(0, 0)]

    record = run(gpu, [tenant("ls", "LS", rate=30_000)], Choosy(1e5), seed=1, duration_ns=20 * MS)
    ls = record.tenants[0]
    assert not record.fault
    assert len(ls.start) > 10
    assert np.all(ls.start < ls.end)
    assert np.all(ls.end <= ls.done)
    assert np.all(ls.start[1:] >= ls.end[:-1])


def test_requests_in_flight_have_host_buffers_of_their_own_however_many_were_refused(gpu, tenant, monkeypatch):
    class Choosy(Piecewise):
        """Starts one request, and beside it the one that is as many later as there are buffers."""

        def decide(self, snapshot: Snapshot) -> Sequence[Action]:
            depth = snapshot.depth[0]
            if snapshot.queued[0] <= depth or snapshot.running[0]:
                return []
            return [Start(0, 0), *[Reject(0)] * (depth - 1), Start(0, 0)]

    kind = type(gpu.create_stream())
    copies: dict[str, list] = {"copy_to_device": [], "copy_to_host": []}

    def noted(whole, hosts):
        def copy(stream, *sides):
            hosts.extend(side for side in sides if not isinstance(side, int))
            whole(stream, *sides)

        return copy

    for name, hosts in copies.items():
        monkeypatch.setattr(kind, name, noted(getattr(kind, name), hosts))
    with load_tenants(gpu, [tenant("ls", "LS", "resnet34", rate=30_000)]) as roster:
        loaded = roster.tenants[0]

        def rehearsed() -> None:
            for hosts in copies.values():
                hosts.clear()

        record = run(gpu, roster, Choosy(1e5), seed=1, duration_ns=20 * MS, gate=rehearsed)
    assert not record.fault
    assert len(copies["copy_to_device"]) > 2 * loaded.depth
    for side, buffers in (("copy_to_device", loaded.inputs), ("copy_to_host", loaded.outputs)):
        which = [next(place for place, buffer in enumerate(buffers) if buffer is host) for host in copies[side]]
        assert which == [turn % loaded.depth for turn in range(len(which))]


def test_a_policy_is_woken_when_it_asked_for_it(gpu, tenant):
    class Sleeper(Piecewise):
        def decide(self, snapshot: Snapshot) -> Sequence[Action]:
            return [*super().decide(snapshot), Wake(snapshot.now_ns + MS)]

    policy = Sleeper(1e5)
    run(gpu, [tenant("ls", "LS", rate=1)], policy, seed=1, duration_ns=50 * MS)
    assert 45 <= len(policy.wakes) <= 52


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (Advance(1, 1, 0), "advanced"),
        (Advance(1, 1, 10_000), "advanced"),
        (Start(1, 1), "cut"),
        (Reject(1), "rejected"),
        (Advance(0, 1), "advanced"),
    ],
)
def test_what_makes_no_sense_is_refused(gpu, tenant, action, says):
    class Wrong(Piecewise):
        def decide(self, snapshot: Snapshot) -> Sequence[Action]:
            return (action,)

    with pytest.raises(InternalError, match=says):
        run(
            gpu,
            [tenant("ls", "LS", rate=1000), tenant("be", "BE", "synthetic-gemv")],
            Wrong(1e4),
            seed=1,
            duration_ns=5 * MS,
        )


class Restless(Piecewise):
    """One request in flight; preempts at random times and goes on on random lanes."""

    def __init__(self, seed: int) -> None:
        super().__init__(60_000.0)
        self.random = random.Random(seed)
        self.preemptions = self.resumed = 0
        self.was_stopping = False

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        actions: list[Action] = [Wake(snapshot.now_ns + self.random.randrange(1, 400_000))]
        (tenant,) = range(len(self.ls))
        launched, pending = snapshot.launched[tenant], snapshot.pending[tenant]
        total = len(self.briefs[tenant].segments)
        if snapshot.stopping[tenant]:
            self.was_stopping = True
            return actions
        if self.was_stopping:
            self.was_stopping = False
            self.resumed += 1
            assert pending == 0
        if pending and self.random.random() < 0.2:
            self.preemptions += 1
            return [*actions, Preempt(tenant)]
        while pending < 3 and (launched or (snapshot.queued[tenant] and not pending)):
            actions.append(Advance(tenant, self.random.randrange(1, 3)))
            launched, pending = (launched + 1) % total, pending + 1
            if not launched:
                break
        return actions


@pytest.mark.parametrize("seed", range(4))
def test_however_often_a_tenant_is_preempted_its_requests_run_once_and_in_order(gpu, tenant, seed):
    with make_preemptible(load_tenants(gpu, [tenant("be", "BE", "synthetic-spin")])).roster as roster:
        alone = run(gpu, roster, "streams", seed=1, duration_ns=20 * MS).tenants[0]
        policy = Restless(seed)
        record = run(gpu, roster, policy, seed=1, duration_ns=60 * MS)
    (be,) = record.tenants
    assert not record.fault
    assert policy.resumed > 10
    assert policy.resumed <= policy.preemptions
    assert len(be.done) > 10
    assert np.all(be.start[1:] >= be.end[:-1])
    assert np.all(np.diff(be.done) > 0)
    # Each one takes its time at least, and the time between two is the host's turn.
    assert np.min(be.end - be.start) > 0.98 * np.min(alone.end - alone.start)
    assert np.all(np.diff(be.arrival) >= 0)
