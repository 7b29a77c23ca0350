from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.errors import MisuseError, UnsupportedError
from missile.gpu.interface import GpuInfo, Level, Priority
from missile.runtime.policies import POLICIES, Snapshot, create_policy, policy_summaries
from missile.runtime.policies.interface import BriefedPolicy
from missile.runtime.tenant import Tenant

INFO = GpuInfo("X", "sim:x", True, Level.PARTITIONS, 132, 1 << 20, 1 << 30, 2 << 20, 8, 8, 2, (9, 0))


def make(name: str, kind: str, weight: float = 1.0) -> Tenant:
    arrivals = {"kind": "poisson", "rate_per_s": 1} if kind == "LS" else {"kind": "closed"}
    return Tenant.model_validate({"name": name, "class": kind, "model": "m", "arrivals": arrivals, "weight": weight})


MIX = (make("be0", "BE"), make("ls0", "LS"), make("ls1", "LS"), make("be1", "BE", weight=3.0))


def snapshot(queued: Sequence[int], running: Sequence[int], oldest: Sequence[int], now: int = 100) -> Snapshot:
    return Snapshot(now, list(queued), list(running), list(oldest), (2,) * len(queued))


numbers = st.lists(st.integers(0, 4), min_size=4, max_size=4)


WHOLE = [
    name for name in POLICIES if not isinstance(create_policy(name), BriefedPolicy)
]  # those that start whole requests


@pytest.mark.parametrize("name", WHOLE)
@given(queued=numbers, running=st.lists(st.integers(0, 2), min_size=4, max_size=4), oldest=numbers)
def test_no_policy_starts_what_is_not_there_or_has_no_room(name, queued, running, oldest):
    policy = create_policy(name)
    layout = policy.setup(MIX, INFO)
    state = snapshot(queued, running, oldest)
    starts = policy.decide(state)
    for tenant in range(4):
        count = sum(start.tenant == tenant for start in starts)
        assert count <= queued[tenant]
        assert count + running[tenant] <= 2 or not count
    assert all(0 <= start.lane < len(layout.lanes) for start in starts)
    # Nothing is left waiting on an idle GPU.
    assert starts or any(running) or not any(queued)
    assert (state.queued, state.running) == (queued, running)


@pytest.mark.parametrize("name", ["streams", "priority", "partition"])
@given(queued=numbers)
def test_concurrent_policies_fill_every_tenant_s_room_ls_first(name, queued):
    policy = create_policy(name)
    policy.setup(MIX, INFO)
    starts = policy.decide(snapshot(queued, [0] * 4, [0] * 4))
    assert [sum(start.tenant == tenant for start in starts) for tenant in range(4)] == [min(q, 2) for q in queued]
    classes = [MIX[start.tenant].latency_sensitive for start in starts]
    assert classes == sorted(classes, reverse=True)


def test_temporal_runs_one_at_a_time_oldest_ls_first():
    policy = create_policy("temporal")
    policy.setup(MIX, INFO)
    assert policy.decide(snapshot([1, 1, 1, 1], [0, 0, 0, 0], [0, 50, 40, 0]))[0].tenant == 2
    assert policy.decide(snapshot([1, 1, 0, 1], [0, 0, 1, 0], [0, 50, 0, 0])) == ()
    assert policy.decide(snapshot([1, 1, 0, 1], [0, 0, 0, 0], [0, 50, 0, 0], 200))[0].tenant == 1


def test_temporal_shares_be_time_by_weight():
    policy = create_policy("temporal")
    policy.setup(MIX, INFO)
    time, had = 0, {0: 0, 3: 0}
    for _ in range(400):
        (start,) = policy.decide(snapshot([1, 0, 0, 1], [0] * 4, [0] * 4, time))
        length = 10 if start.tenant == 0 else 70
        had[start.tenant] += length
        time += length
        time += 5 * (not policy.decide(snapshot([0] * 4, [0] * 4, [0] * 4, time)))  # idle time is nobody's
    assert had[3] / had[0] == pytest.approx(3, rel=0.05)


def test_priority_lays_out_high_lanes_for_ls():
    layout = create_policy("priority").setup(MIX, INFO)
    assert [lane.priority for lane in layout.lanes] == [Priority.LOW, Priority.HIGH, Priority.HIGH, Priority.LOW]


@given(share=st.floats(0.001, 0.999), sms=st.integers(16, 200), unit=st.sampled_from([2, 4, 8]))
def test_partition_s_sides_are_what_the_gpu_can_split(share, sms, unit):
    info = replace(INFO, sms=sms, sm_granularity=unit, sm_minimum=8)
    layout = create_policy("partition", {"ls_share": share}).setup(MIX, info)
    (ls,) = layout.partitions
    assert ls % unit == 0
    assert ls >= 8
    assert sms - ls >= 8
    assert abs(ls - share * sms) <= 8 + unit  # the other side's least, then rounding
    assert [lane.partition for lane in layout.lanes] == [1, 0, 0, 1]


def test_partition_with_one_class_is_the_whole_gpu():
    layout = create_policy("partition").setup(MIX[1:3], INFO)
    assert layout.partitions == ()
    assert {lane.partition for lane in layout.lanes} == {None}


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("fastest", MisuseError, "temporal, streams, priority, partition"),
        ("partition:share=0.3", MisuseError, "ls_share"),
        ("partition:ls_share=lots", MisuseError, "ls_share=lots"),
        ("partition:ls_share=1.5", MisuseError, "between 0 and 1"),
        ("streams:ls_share=0.3", MisuseError, "none"),
    ],
)
def test_bad_names_and_options(text, error, says):
    with pytest.raises(error, match=says):
        create_policy(text)


def test_a_gpu_that_can_t():
    with pytest.raises(UnsupportedError, match="partitions"):
        create_policy("partition").setup(MIX, replace(INFO, level=Level.PRIORITIES))
    with pytest.raises(UnsupportedError, match="priorities"):
        create_policy("priority").setup(MIX, replace(INFO, level=Level.CORE))
    with pytest.raises(UnsupportedError, match="too few"):
        create_policy("partition").setup(MIX, replace(INFO, sms=12))


def test_every_policy_says_what_it_does():
    summaries = policy_summaries()
    assert list(summaries) == list(POLICIES)
    assert all(len(text) > 20 for text in summaries.values())


def test_options_in_text_and_in_code():
    assert create_policy("partition:ls_share=0.5").ls_share == 0.5
    assert create_policy("partition:ls_share=0.5", {"ls_share": 0.75}).ls_share == 0.75
    factory: Callable[..., object] = POLICIES["partition"]
    assert create_policy("partition").ls_share == factory().ls_share
