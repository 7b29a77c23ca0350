from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.errors import MisuseError, UnsupportedError
from missile.gpu import open_gpu
from missile.gpu.interface import GpuInfo, Level, Priority
from missile.gpu.sim import Faults, SimulatedGpu, load_spec
from missile.gpu.sim.spec import KernelFault
from missile.gpu.sim.streams import SimEvent
from missile.runtime.loading import load_tenants
from missile.runtime.policies import Snapshot, create_policy
from missile.runtime.policies._rates import RateWatch
from missile.runtime.policies.interface import Advance, Preempt, Reject, Segment, Start, TenantBrief, Wake
from missile.runtime.policies.missile import MissilePolicy
from missile.runtime.preempting import make_preemptible
from missile.runtime.run import run, solo
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import arrival_times

MS = 1_000_000
INFO = GpuInfo("X", "sim:x", True, Level.PARTITIONS, 132, 1 << 20, 1 << 30, 2 << 20, 8, 8, 2, (9, 0))
SEGMENTS = 5


def make(name: str, kind: str, **more: object) -> Tenant:
    arrivals = {"kind": "poisson", "rate_per_s": 1} if kind == "LS" else {"kind": "closed"}
    return Tenant.model_validate({"name": name, "class": kind, "model": "m", "arrivals": arrivals, **more})


MIX = (make("be0", "BE"), make("ls0", "LS", slo_ms=2.0), make("ls1", "LS"), make("be1", "BE", weight=3.0))
LS, BE = (1, 2), (0, 3)


def work_given(policy: MissilePolicy, now: int) -> int:
    """Segments started beside an LS request that has run all the time."""
    return sum(
        isinstance(action, Advance)
        for action in policy.decide(snapshot(queued=(2, 0, 0, 2), running=(0, 1, 0, 0), now=now))
    )


def ready(preemptible: bool = False, **options: float) -> tuple[MissilePolicy, tuple[str, ...]]:
    """A policy that was told about the mix, and its lanes' names. Unless told it arms nothing and stops BE first."""
    policy = MissilePolicy(**{"arm_us": 0.0, "stop_first": True, **options})
    layout = policy.setup(MIX, INFO)
    segments = tuple(Segment(i, i + 1, 50_000.0, (None,)) for i in range(SEGMENTS))
    brief = TenantBrief((300_000.0,) * len(layout.lanes), segments, preemptible)
    policy.brief([brief] * len(MIX))
    return policy, tuple(lane.name for lane in layout.lanes)


def snapshot(
    queued: Sequence[int] = (0, 0, 0, 0),
    running: Sequence[int] = (0, 0, 0, 0),
    launched: Sequence[int] = (0, 0, 0, 0),
    pending: Sequence[int] = (0, 0, 0, 0),
    stopping: Sequence[bool] = (False,) * 4,
    oldest: Sequence[int] = (0, 0, 0, 0),
    now: int = 100,
) -> Snapshot:
    return Snapshot(now, queued, running, oldest, (2, 8, 8, 2), launched, pending, stopping)


counts = st.lists(st.integers(0, 3), min_size=4, max_size=4)
few = st.lists(st.integers(0, 2), min_size=4, max_size=4)
flags = st.lists(st.booleans(), min_size=4, max_size=4)


@given(
    queued=counts,
    running=few,
    launched=few,
    pending=few,
    stopping=flags,
    preemptible=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "arm_us": st.sampled_from([0, 50, 1e4]),
            "patience_us": st.sampled_from([0, 60]),
            "lend": st.sampled_from([0, 0.3]),
            "stop_first": st.booleans(),
        }
    ),
)
def test_what_it_asks_for_can_be_done(queued, running, launched, pending, stopping, preemptible, options):
    running = [max(r, p > 0, bool(n)) for r, p, n in zip(running, pending, launched, strict=True)]
    policy, lanes = ready(preemptible, **options)
    state = snapshot(queued, running, launched, pending, stopping)
    there = any(queued[i] or running[i] for i in LS)
    preempted = set()
    for action in policy.decide(state):
        if isinstance(action, Start):
            assert action.tenant in LS
            assert queued[action.tenant]
            assert lanes[action.lane].startswith(f"high-priority stream of ls{action.tenant - 1}")
        elif isinstance(action, Reject):
            assert action.tenant in LS
            assert queued[action.tenant]
        elif isinstance(action, Preempt):
            assert there
            assert pending[action.tenant]
            preempted.add(action.tenant)
        elif isinstance(action, Advance):
            tenant = action.tenant
            assert tenant in BE
            assert not stopping[tenant]
            assert tenant not in preempted
            assert action.segments == 1
            if not launched[tenant]:
                assert queued[tenant]
                assert running[tenant] < 2
                queued[tenant] -= 1
                running[tenant] += 1
                if preemptible:
                    assert not pending[tenant]  # one request at a time
            launched[tenant] = (launched[tenant] + 1) % SEGMENTS
            pending[tenant] += 1
            assert ("all SMs" in lanes[action.lane]) is (not there or bool(action.after))
            assert there or not action.after
            assert set(action.after) <= {i for i in LS if queued[i] or running[i]}
        else:
            assert isinstance(action, Wake)


def test_be_has_all_sms_until_an_ls_request_comes_and_again_when_it_has_gone():
    policy, lanes = ready(pause=False)
    first, wake = policy.decide(snapshot(queued=(2, 0, 0, 2)))
    assert wake == Wake(100)
    (second, _) = policy.decide(snapshot(queued=(2, 0, 0, 2)))
    assert {first.tenant, second.tenant} == {0, 3}
    assert "all SMs" in lanes[first.lane]
    start, *rest = policy.decide(snapshot(queued=(1, 1, 0, 1), running=(1, 0, 0, 1), launched=(1, 0, 0, 1)))
    assert start.tenant == 1
    assert all("68 SMs" in lanes[action.lane] for action in rest if isinstance(action, Advance))
    full = snapshot(running=(1, 1, 0, 1), launched=(2, 0, 0, 2), pending=(1, 0, 0, 1))
    assert policy.decide(full) == []
    (again, _) = policy.decide(snapshot(running=(1, 0, 0, 1), launched=(2, 0, 0, 2)))
    assert "all SMs" in lanes[again.lane]


def test_it_preempts_once_and_before_it_starts_anything():
    policy, _ = ready(preemptible=True)
    pending = {"running": (1, 0, 0, 0), "launched": (2, 0, 0, 0), "pending": (2, 0, 0, 0)}
    first, second = policy.decide(snapshot(queued=(0, 1, 0, 0), **pending))
    assert first == Preempt(0)
    assert second.tenant == 1
    pending["running"] = (1, 1, 0, 0)
    assert not any(isinstance(action, Preempt) for action in policy.decide(snapshot(queued=(0, 1, 0, 0), **pending)))
    off, _ = ready(preemptible=True, preempt=False)
    assert not any(isinstance(action, Preempt) for action in off.decide(snapshot(queued=(0, 1, 0, 0), **pending)))


def test_armed_be_is_given_what_begins_when_the_ls_requests_have_ended():
    policy, lanes = ready(preemptible=True, arm_us=100)
    started, wake = policy.decide(snapshot(queued=(2, 1, 0, 0), now=0))
    assert (started, wake) == (Start(1, 0), Wake(200_000))  # it takes 300 us
    running = {"running": (0, 1, 0, 0), "now": 200_000}
    first, again = policy.decide(snapshot(queued=(2, 0, 0, 0), **running))
    assert first.after == (1,)
    assert "all SMs" in lanes[first.lane]
    assert again == Wake(200_000)
    given = {"running": (1, 1, 0, 0), "launched": (1, 0, 0, 0), "pending": (1, 0, 0, 0)}
    second, *none = policy.decide(snapshot(queued=(1, 0, 0, 0), now=210_000, **given))
    assert (second.tenant, second.after, none) == (0, (1,), [])
    given |= {"launched": (2, 0, 0, 0), "pending": (2, 0, 0, 0)}
    assert policy.decide(snapshot(queued=(1, 0, 0, 0), now=220_000, **given)) == []
    # Another LS request comes before this one has ended: what was armed leaves, and is armed again behind that one.
    stop, start, wake = policy.decide(snapshot(queued=(1, 0, 1, 0), now=230_000, **given))
    assert (stop, start.tenant) == (Preempt(0), 2)
    assert wake == Wake(430_000)
    left = snapshot(queued=(1, 0, 0, 0), running=(1, 0, 1, 0), launched=(2, 0, 0, 0), now=440_000)
    third, _ = policy.decide(left)
    assert third.after == (2,)
    # Gone: BE goes on as ever.
    after, _ = policy.decide(snapshot(queued=(1, 0, 0, 0), running=(1, 0, 0, 0), launched=(3, 0, 0, 0), now=540_000))
    assert after.after == ()


def test_what_ends_soon_enough_is_not_stopped():
    pending = {"running": (1, 0, 0, 0), "launched": (2, 0, 0, 0), "pending": (2, 0, 0, 0)}
    for patience, stops in ((60, True), (110, False)):  # two segments of 50 us
        policy, _ = ready(preemptible=True, patience_us=patience)
        actions = policy.decide(snapshot(queued=(0, 1, 0, 0), now=0, **pending))
        assert any(isinstance(action, Preempt) for action in actions) is stops
    policy, _ = ready(preemptible=True, patience_us=60)
    policy.decide(snapshot(now=0, **pending))
    one_left = pending | {"pending": (1, 0, 0, 0)}
    policy.decide(snapshot(now=50_000, **one_left))
    late = policy.decide(snapshot(queued=(0, 1, 0, 0), now=90_000, **one_left))
    assert not any(isinstance(action, Preempt) for action in late)


def stops(actions: Sequence[object]) -> bool:
    return any(isinstance(action, Preempt) for action in actions)


WORK = {"launched": (2, 0, 0, 0), "pending": (2, 0, 0, 0)}


def advances(actions: Sequence[object]) -> list[Advance]:
    return [action for action in actions if isinstance(action, Advance)]


@pytest.mark.parametrize("ls_share", [0.5, 1.0])
def test_be_goes_on_beside_ls_requests_that_can_afford_it(ls_share):
    for share, stopped in ((0.0, True), (0.14, True), (0.16, False)):  # 300 us of 2 ms
        policy, lanes = ready(preemptible=True, lend=share, ls_share=ls_share)
        first = snapshot(queued=(0, 1, 0, 0), running=(1, 0, 0, 0), oldest=(0, 100, 0, 0), **WORK)
        assert stops(policy.decide(first)) is stopped
        # What it had ends, and it is given more, on its side of the split.
        later = snapshot(running=(1, 1, 0, 0), launched=(4, 0, 0, 0), now=60_000)
        given = advances(policy.decide(later))
        assert len(given) == (0 if stopped else 1)
        assert all(("68 SMs" if ls_share < 1 else "all SMs") in lanes[one.lane] for one in given)


@pytest.mark.parametrize("ls_share", [0.5, 1.0])
def test_a_queue_that_grows_stops_be_and_one_that_has_gone_lets_it_run_again(ls_share):
    policy, _ = ready(preemptible=True, lend=0.33, ls_share=ls_share)  # 660 us: two requests
    for running, expected in ((0, False), (1, False), (2, True), (3, False)):
        now = 100 + running * 10
        there = snapshot(queued=(0, 1, 0, 0), running=(1, running, 0, 0), oldest=(0, now, 0, 0), now=now, **WORK)
        assert stops(policy.decide(there)) is expected
    # Four are there; it has left. Three of them end, and the last has waited too long until the one before it has ended.
    assert not advances(policy.decide(snapshot(running=(1, 4, 0, 0), launched=(2, 0, 0, 0), now=200_000)))
    assert not advances(policy.decide(snapshot(running=(1, 1, 0, 0), launched=(2, 0, 0, 0), now=900_000)))
    policy.decide(snapshot(running=(1, 0, 0, 0), launched=(2, 0, 0, 0), now=1_200_000))
    again = snapshot(queued=(0, 1, 0, 0), running=(1, 0, 0, 0), launched=(3, 0, 0, 0), oldest=(0, 1_900_000, 0, 0))
    again.now_ns = 1_900_000
    assert advances(policy.decide(again))


def test_a_request_without_an_objective_can_afford_nothing():
    policy, _ = ready(preemptible=True, lend=1.0)
    assert not stops(policy.decide(snapshot(queued=(0, 1, 0, 0), running=(1, 0, 0, 0), **WORK)))
    assert stops(policy.decide(snapshot(queued=(0, 0, 1, 0), running=(1, 1, 0, 0), **WORK)))


def test_a_request_that_has_waited_long_can_afford_nothing():
    for arrival, stopped in ((800_000, False), (300_000, True)):
        policy, _ = ready(preemptible=True, lend=0.4)
        late = snapshot(queued=(0, 1, 0, 0), running=(1, 0, 0, 0), oldest=(0, arrival, 0, 0), now=1_000_000, **WORK)
        assert stops(policy.decide(late)) is stopped
        # It counts from its arrival also when it runs.
        policy, _ = ready(preemptible=True, lend=0.4)
        policy.decide(snapshot(queued=(0, 1, 0, 0), oldest=(0, arrival, 0, 0), now=1_000_000))
        running = snapshot(queued=(2, 0, 0, 0), running=(0, 1, 0, 0), now=1_010_000)
        assert bool(advances(policy.decide(running))) is not stopped


def test_what_is_armed_goes_on_beside_a_request_that_can_afford_it():
    given = {"running": (1, 1, 0, 0), "launched": (2, 0, 0, 0), "pending": (2, 0, 0, 0)}
    for bound, stopped in ((0.14, True), (0.5, False)):
        policy, _ = ready(preemptible=True, arm_us=100, lend=bound)
        policy.decide(snapshot(queued=(0, 1, 0, 0), oldest=(0, -800_000, 0, 0), now=0))  # has waited long
        (armed, _) = policy.decide(snapshot(queued=(2, 0, 0, 0), running=(0, 1, 0, 0), now=200_000))
        assert armed.after == (1,)
        policy.decide(snapshot(queued=(1, 0, 0, 0), now=299_000, **given))
        gone = given | {"running": (1, 0, 1, 0)}
        policy.decide(snapshot(queued=(1, 0, 0, 0), now=300_000, **(given | {"running": (1, 0, 0, 0)})))
        assert gone
        another = snapshot(
            queued=(1, 1, 0, 0), oldest=(0, 301_000, 0, 0), now=301_000, **(given | {"running": (1, 0, 0, 0)})
        )
        assert stops(policy.decide(another)) is stopped


def test_be_may_be_stopped_when_the_ls_request_has_been_launched():
    policy, _ = ready(preemptible=True, stop_first=False)
    pending = {"running": (1, 0, 0, 0), "launched": (2, 0, 0, 0), "pending": (2, 0, 0, 0)}
    start, stop = policy.decide(snapshot(queued=(0, 1, 0, 0), **pending))
    assert start.tenant == 1
    assert stop == Preempt(0)


def test_with_the_whole_share_be_pauses_and_with_linger_it_waits():
    policy, lanes = ready(ls_share=1.0, linger_us=50.0)
    assert not any("SMs" in name and "all" not in name for name in lanes)
    (start,) = policy.decide(snapshot(queued=(1, 1, 0, 1)))
    assert isinstance(start, Start)
    assert policy.decide(snapshot(queued=(1, 0, 0, 1), now=10_000)) == [Wake(50_100)]
    assert isinstance(policy.decide(snapshot(queued=(1, 0, 0, 1), now=50_100))[0], Advance)


@pytest.mark.parametrize("be_min", [0.0, 0.1, 0.4])
def test_a_pausing_be_tenant_keeps_the_rate_that_it_was_promised(be_min):
    policy, lanes = ready(be_min=be_min)
    assert any("68 SMs" in name for name in lanes) is (be_min > 0)
    begin = 30 * MS  # from here on, an LS request runs all the time
    given = sum(work_given(policy, now) for now in range(begin, begin + 500 * MS, 20_000))
    assert given * 50_000 / (500 * MS) == pytest.approx(be_min, rel=0.05)


def test_work_that_was_preempted_does_not_count_as_had(gpu, tenant):
    tenants = [tenant("ls", "LS", rate=3500), tenant("be", "BE", "synthetic-spin")]
    with make_preemptible(load_tenants(gpu, tenants)).roster as roster:
        alone = solo(gpu, roster, "be", seed=2, duration_ns=100 * MS).tenants[0]
        paused, promised = (
            run(gpu, roster, f"missile:arm_us=0,stop_first=on{options}", seed=2, duration_ns=100 * MS).tenants[1]
            for options in ("", ",be_min=0.45")
        )
    assert len(paused.done) < 0.4 * len(alone.done)
    assert len(promised.done) > 0.43 * len(alone.done)


def test_it_asks_to_be_woken_when_be_will_be_owed_work():
    policy, _ = ready(be_min=0.2)
    for _ in range(20):
        policy.decide(snapshot(queued=(2, 0, 0, 2), now=1 * MS))
    *_, wake = policy.decide(snapshot(queued=(2, 1, 0, 2), now=2 * MS))
    assert isinstance(wake, Wake)
    assert work_given(policy, wake.at_ns - 1_000) == 0
    assert work_given(policy, wake.at_ns) > 0


def test_be_tenants_share_by_weight():
    policy, _ = ready()
    given = {0: 0, 3: 0}
    for _ in range(400):
        (one,) = policy.decide(snapshot(queued=(2, 0, 0, 2), pending=(0, 0, 0, 1)))[:1]
        given[one.tenant] += 1
    assert given[3] / given[0] == pytest.approx(3, rel=0.05)


def test_one_that_comes_back_does_not_take_over():
    policy, _ = ready()
    for _ in range(1000):
        policy.decide(snapshot(queued=(2, 0, 0, 0)))
    turns = [policy.decide(snapshot(queued=(2, 0, 0, 2)))[0].tenant for _ in range(200)]
    assert turns.count(0) > 20


def test_admission_turns_away_what_is_late_and_no_more():
    policy, _ = ready()
    late = snapshot(queued=(0, 2, 0, 0), oldest=(0, 0, 0, 0), now=1_800_000)
    assert policy.decide(late) == [Reject(1), Wake(1_800_000)]
    due = snapshot(queued=(0, 1, 0, 0), oldest=(0, 500_000, 0, 0), now=1_800_000)
    assert isinstance(policy.decide(due)[0], Start)
    # Seven before it, 0.3 ms each: 2.3 ms from now.
    behind = snapshot(queued=(0, 1, 0, 0), running=(0, 7, 0, 0), oldest=(0, 90_000, 0, 0), now=100_000)
    fresh, _ = ready()
    assert fresh.decide(behind) == [Reject(1)]
    generous, _ = ready(admission=False)
    assert isinstance(generous.decide(behind)[0], Start)


def test_queues_are_bounded_even_without_an_objective():
    policy, _ = ready(queue_limit=3)
    full = snapshot(queued=(0, 0, 3, 0), running=(0, 0, 8, 0))
    assert policy.decide(full) == []
    assert policy.decide(snapshot(queued=(0, 0, 4, 0), running=(0, 0, 8, 0)))[0] == Reject(2)


def test_an_objective_bounds_the_queue_by_itself():
    policy, _ = ready(queue_limit=3)
    many = snapshot(queued=(0, 50, 0, 0), running=(0, 2, 0, 0), oldest=(0, 90_000, 0, 0), now=100_000)
    assert isinstance(policy.decide(many)[0], Start)
    assert policy.decide(snapshot(queued=(0, 50, 0, 0), running=(0, 3, 0, 0), now=1_900_000))[0] == Reject(1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("ls_share=0", "ls_share must be above 0"),
        ("ls_share=1.2", "at most 1"),
        ("ls_share=0.8,be_min=0.3", "more than the whole GPU"),
        ("be_min=1", "below 1"),
        ("segment_us=-1", "segment_us"),
        ("queue_limit=0", "queue_limit"),
        ("arm_us=-1", "arm_us"),
        ("lend=1.5", "lend"),
        ("pause_above=-1", "pause_above"),
        ("patience_us=-1", "patience_us"),
        ("share=1", "ls_share"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(MisuseError, match=says):
        create_policy(f"missile:{options}")


def test_a_gpu_that_can_t():
    with pytest.raises(UnsupportedError, match="pauses"):
        create_policy("missile:pause=off").setup(MIX, replace(INFO, level=Level.PRIORITIES))
    create_policy("missile:ls_share=1").setup(MIX, replace(INFO, level=Level.PRIORITIES))
    with pytest.raises(UnsupportedError, match="priorities"):
        create_policy("missile").setup(MIX, replace(INFO, level=Level.CORE))


@pytest.mark.parametrize("options", ["", ":ls_whole=off", ":elastic=off", ":ls_share=1"])
def test_lanes_of_ls_have_priority(options):
    layout = create_policy(f"missile{options}").setup(MIX, INFO)
    assert [lane.priority for lane in layout.lanes].count(Priority.HIGH) == 2
    assert all(ns == 80_000.0 for ns in (layout.segment_ns[i] for i in BE))
    assert all(layout.segment_ns[i] is None for i in LS)


# --- on the simulated GPU
def test_an_objective_below_the_time_alone_is_refused(gpu, tenant):
    tenants = [tenant("ls", "LS", rate=100, slo_ms=0.01), tenant("be", "BE", "synthetic-gemv")]
    with pytest.raises(MisuseError, match=r"'ls' has an objective of 0\.01 ms and takes"):
        run(gpu, tenants, "missile", seed=1, duration_ns=10 * MS)


@pytest.mark.parametrize("preempt", [False, True])
def test_be_keeps_its_rate_and_ls_its_latency(gpu, tenant, preempt):
    tenants = [tenant("ls", "LS", rate=300), tenant("be", "BE", "synthetic-gemv")]
    roster = load_tenants(gpu, tenants)
    if preempt:
        roster, refused = make_preemptible(roster)
        assert refused == {}
    with roster:
        alone = solo(gpu, roster, "ls", seed=2, duration_ns=150 * MS).tenants[0]
        fast = solo(gpu, roster, "be", seed=2, duration_ns=150 * MS).tenants[0]
        naive = run(gpu, roster, "streams", seed=2, duration_ns=150 * MS).tenants[0]
        record = run(gpu, roster, "missile:segment_us=60", seed=2, duration_ns=150 * MS)
    assert not record.fault
    ls, be = record.tenants
    assert len(ls.arrival) == len(alone.arrival)
    assert np.all(be.start[1:] >= be.end[:-1])
    assert np.all(np.diff(be.arrival) >= 0)
    assert np.percentile(ls.latency, 95) < np.percentile(naive.latency, 95)
    assert np.percentile(ls.latency, 95) < (1.3 if preempt else 1.7) * np.percentile(alone.latency, 95)
    busy = float(np.sum(alone.service)) / (150 * MS)
    assert len(be.done) > (1 - busy) * 0.85 * len(fast.done)


def test_preempted_requests_finish_once_each_and_the_next_run_starts_clean(gpu, tenant):
    tenants = [tenant("ls", "LS", rate=2000), tenant("be", "BE", "synthetic-gemv")]
    with make_preemptible(load_tenants(gpu, tenants)).roster as roster:
        first = run(gpu, roster, "missile:ls_share=1", seed=2, duration_ns=60 * MS).tenants[1]
        second = solo(gpu, roster, "be", seed=2, duration_ns=60 * MS).tenants[0]
        third = run(gpu, roster, "missile", seed=2, duration_ns=60 * MS).tenants[1]
    for be in (first, second, third):
        assert len(be.done) > 5
        assert len(set(be.end.tolist())) == len(be.end)
        assert np.all(be.start < be.end)
    lengths = second.end - second.start
    assert np.max(lengths) < 1.1 * np.min(lengths)  # nothing of a preempted request is left over
    assert np.all(first.end - first.start >= 0.9 * np.min(lengths))


def test_armed_be_follows_an_ls_request_at_once_and_nothing_is_run_twice(tenant):
    tenants = [tenant("ls", "LS", "mobilenet_v3_large", rate=1500), tenant("be", "BE", "decoder_1b")]
    with open_gpu("sim:h200", seed=1) as gpu, make_preemptible(load_tenants(gpu, tenants)).roster as roster:
        alone = solo(gpu, roster, "be", seed=2, duration_ns=300 * MS).tenants[0]
        seen, armed = (
            run(gpu, roster, f"missile:arm_us={arm}", seed=2, duration_ns=300 * MS).tenants for arm in (0, 100)
        )
        after = solo(gpu, roster, "be", seed=2, duration_ns=300 * MS).tenants[0]
    assert len(armed[1].done) > 1.01 * len(seen[1].done)
    assert np.percentile(armed[0].latency, 99) < 1.1 * np.percentile(seen[0].latency, 99)
    be = armed[1]
    assert len(set(be.end.tolist())) == len(be.end)
    assert np.all(be.end - be.start >= 0.9 * np.min(alone.end - alone.start))  # every request ran whole
    assert np.all(be.start[1:] >= be.end[:-1])
    assert len(after.done) == pytest.approx(len(alone.done), rel=0.02)  # and left nothing behind


def test_lending_gives_be_more_for_a_tail_that_it_bounds(tenant):
    tenants = [tenant("ls", "LS", "resnet34", rate=1950, slo_ms=2.3), tenant("be", "BE", "densenet161")]
    with open_gpu("sim:h200", seed=1) as gpu, make_preemptible(load_tenants(gpu, tenants)).roster as roster:
        alone = solo(gpu, roster, "ls", seed=2, duration_ns=300 * MS).tenants[0]
        found = [
            run(gpu, roster, f"missile:{option}", seed=2, duration_ns=300 * MS).tenants
            for option in ("pause=on", "lend=0.15", "lend=0.3", "pause=off")
        ]
    work = [len(be.done) for _, be in found]
    assert work == sorted(work)
    assert work[2] > 1.2 * work[0]
    tails = [np.percentile(ls.latency, 99) / np.percentile(alone.latency, 99) for ls, _ in found]
    assert max(tails[:2]) < 1.1
    assert tails[2] < 1.2 < tails[3]
    for _, be in found:
        assert len(set(be.end.tolist())) == len(be.end)  # nothing is run twice
        assert np.all(be.start[1:] >= be.end[:-1])


@given(st.lists(st.tuples(st.integers(0, 50_000_000), st.integers(0, 5)), max_size=50), st.floats(1.0, 1e4))
def test_rates_are_never_negative_and_change_sides_in_turn(steps, limit):
    watch, now, arrived, high = RateWatch(limit), 0, 0, False
    for wait, more in steps:
        now, arrived = now + wait, arrived + more
        changed = watch.ask(now, arrived)
        assert watch.per_s >= 0.0
        assert changed is (watch.high is not high)
        high = watch.high
        assert high or watch.per_s <= limit
        assert not high or watch.per_s > 0.8 * limit


def test_be_pauses_while_ls_requests_come_faster_than_planned():
    policy, lanes = ready(pause=False, pause_above=1500)

    def beside(now: int) -> list[str]:
        policy.decide(snapshot(queued=(2, 1, 0, 2), oldest=(0, now, 0, 0), now=now))
        actions = policy.decide(snapshot(queued=(2, 0, 0, 2), running=(0, 1, 0, 0), now=now))
        return [lanes[action.lane] for action in actions if isinstance(action, Advance)]

    slow = [beside(now) for now in range(0, 500 * MS, 1 * MS)]
    assert all("68 SMs" in name for names in slow for name in names)
    assert all(slow)
    fast = [beside(now) for now in range(500 * MS, 1000 * MS, MS // 2)]
    assert not any(fast[400:])
    assert [at for at, _ in policy.changes] == [pytest.approx(570 * MS, abs=30 * MS)]
    slow = [beside(now) for now in range(1000 * MS, 1500 * MS, 1 * MS)]
    assert all(slow[400:])
    assert [text.partition(":")[0] for _, text in policy.changes] == [
        "BE pauses beside LS requests",
        "BE runs beside LS requests again",
    ]


def test_a_run_whose_rate_doubles_changes_its_plan_and_says_when(tenant, monkeypatch):
    def doubling(arrivals, *, seed, tenant, horizon_ns):
        if tenant != "ls":
            return arrival_times(arrivals, seed=seed, tenant=tenant, horizon_ns=horizon_ns)
        gaps = [800_000] * 500 + [400_000] * 1000
        return np.cumsum(np.array(gaps, np.int64))

    monkeypatch.setattr("missile.runtime.run.arrival_times", doubling)
    tenants = [tenant("ls", "LS", "mobilenet_v3_large", rate=1250, slo_ms=1.0), tenant("be", "BE", "decoder_1b")]
    policy = "missile:pause=off,ls_share=0.5,pause_above=2000"
    with open_gpu("sim:h200", seed=1) as gpu, make_preemptible(load_tenants(gpu, tenants)).roster as roster:
        record = run(gpu, roster, policy, seed=2, duration_ns=800 * MS)
        fixed = run(gpu, roster, policy.rpartition(",")[0], seed=2, duration_ns=800 * MS)
    (note,) = record.notes
    assert note.startswith((f"{policy} after 0.4", f"{policy} after 0.5"))
    assert "BE pauses beside LS requests: these come at 2" in note
    assert fixed.notes == ()

    def latency(found, begin: int, end: int) -> float:
        ls = found.tenants[0]
        return float(np.median(ls.latency[(ls.arrival >= begin * MS) & (ls.arrival < end * MS)]))

    assert latency(record, 0, 400) == pytest.approx(latency(fixed, 0, 400), rel=0.02)
    assert latency(record, 600, 800) < 0.95 * latency(fixed, 600, 800)


def test_a_tenant_that_dies_in_the_middle_of_a_request_leaves_the_others_results(tenant):
    faults = Faults(kernels=(KernelFault(kernel="gemv", launch=500),))
    gpu = SimulatedGpu(load_spec("h100"), faults=faults, device="sim:h100")
    roster = load_tenants(gpu, [tenant("ls", "LS", rate=400), tenant("be", "BE", "synthetic-gemv")])
    record = run(gpu, roster, "missile", seed=1, duration_ns=60 * MS)
    assert "ILLEGAL_ADDRESS" in record.fault
    ls, be = record.tenants
    assert be.error
    assert not ls.error
    assert len(be.done) > 5
    assert np.all(be.done > 0)


class Stuck(SimulatedGpu):
    """From 20 ms on, what low-priority streams were given never ends, as far as their events tell."""

    def create_stream(self, **options: Any) -> Any:
        stream = super().create_stream(**options)
        if stream.priority is Priority.LOW:
            record = stream.record

            def recorded(event: Any) -> None:
                record(event)
                if self.now_ns() > 20 * MS + self.begin:
                    event.__class__ = StuckEvent

            stream.record = recorded
        return stream

    begin = 1 << 60


class StuckEvent(SimEvent):
    reached = False

    def done(self) -> bool:
        return False


@pytest.mark.parametrize("duration_ms", [60, 12_000])
def test_a_be_tenant_that_never_ends_a_kernel_is_waited_for_ten_seconds_and_named(tenant, duration_ms):
    gpu = Stuck(load_spec("h100"), device="sim:h100")

    def begin() -> None:
        gpu.begin = gpu.now_ns()

    rate = 400 if duration_ms < 100 else 0.001
    roster = load_tenants(gpu, [tenant("ls", "LS", rate=rate), tenant("be", "BE", "synthetic-gemv")])
    record = run(gpu, roster, "missile", seed=1, duration_ns=duration_ms * MS, gate=begin)
    assert "Waiting 10 s for running kernels failed for tenant 'be': TIMEOUT" in record.fault
    assert record.tenants[1].error
    assert not record.tenants[0].error
    assert 3 < len(record.tenants[1].done) < 30
    assert gpu.now_ns() - gpu.begin < 11_000 * MS
