"""Orion's rule, snapshot by snapshot, and on the simulated GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.errors import MisuseError, UnsupportedError
from missile.gpu import open_gpu
from missile.gpu.interface import GpuInfo, Level, Priority
from missile.gpu.work import KernelWork
from missile.runtime.loading import load_tenants
from missile.runtime.policies.interface import Advance, Segment, Snapshot, Start, TenantBrief, Wake
from missile.runtime.policies.orion import OrionPolicy
from missile.runtime.run import run
from missile.runtime.tenant import Tenant

# 1 byte and 1 operation (on the scalar units) a ns are the peaks.
INFO = GpuInfo(
    "X", "sim:x", True, Level.PARTITIONS, 100, 1 << 20, 1 << 30, 2 << 20, 8, 8, 2, (9, 0),
    clock_hz=1e9 / 256 / 100, extra={"memory_bytes_per_s": 1e9},
)  # fmt: skip


def kernel(ns: float, kind: str = "", blocks: int = 10) -> KernelWork:
    busy = int(ns * 0.9)
    return KernelWork(
        blocks=blocks,
        solo_ns=ns,
        operations=busy if kind == "compute" else 0,
        footprint_bytes=busy if kind == "memory" else 0,
    )


def make(name: str, kind: str) -> Tenant:
    arrivals = {"kind": "poisson", "rate_per_s": 1} if kind == "LS" else {"kind": "closed"}
    return Tenant.model_validate({"name": name, "class": kind, "model": "m", "arrivals": arrivals})


def brief(works: list[KernelWork], *, whole: bool) -> TenantBrief:
    total = sum(work.solo_ns for work in works)
    cut = [Segment(i, i + 1, work.solo_ns, (work,)) for i, work in enumerate(works)]
    return TenantBrief((total, total), (Segment(0, len(works), total, tuple(works)),) if whole else tuple(cut))


def policy(ls: list[KernelWork], be: list[KernelWork], **options: float) -> OrionPolicy:
    made = OrionPolicy(**options)
    layout = made.setup((make("ls", "LS"), make("be", "BE")), INFO)
    assert [lane.priority for lane in layout.lanes] == [Priority.HIGH, Priority.LOW]
    assert layout.segment_ns == (None, 0.0)
    made.brief((brief(ls, whole=True), brief(be, whole=False)))
    return made


def snapshot(
    now: int, *, ls: tuple[int, int] = (0, 0), be: tuple[int, int] = (2, 0), launched: int = 0, pending: int = 0
) -> Snapshot:
    """ls, be: requests queued and running."""
    return Snapshot(now, [ls[0], be[0]], [ls[1], be[1]], [0, 0], (8, 2), [0, launched], [0, pending], [False, False])


def test_ls_starts_whole_and_first() -> None:
    orion = policy([kernel(1000)], [kernel(10)])
    actions = orion.decide(snapshot(0, ls=(2, 0)))
    assert actions[:2] == [Start(0, 0), Start(0, 0)]


def test_alone_the_duration_threshold_holds_and_can_be_lifted() -> None:
    be = [kernel(30)] * 5
    assert policy([kernel(1000)], be, dur_threshold=0.05).decide(snapshot(0)) == [Advance(1, 1, 2)]  # 0, then 30 of 50
    lifted = policy([kernel(1000)], be, dur_threshold=0.05, throttle_idle=0)
    # All of this request and of the next one.
    assert lifted.decide(snapshot(0))[:2] == [Advance(1, 1, 5), Advance(1, 1, 3)]


def test_a_long_row_of_launches_is_given_in_parts() -> None:
    orion = policy([kernel(1000)], [kernel(1)] * 20, dur_threshold=100)
    assert orion.decide(snapshot(7)) == [Advance(1, 1, 8), Wake(7)]
    assert orion.decide(snapshot(9, launched=8, pending=8)) == [Advance(1, 1, 8), Wake(9)]
    assert orion.decide(snapshot(9, launched=16, pending=16)) == [Advance(1, 1, 4), Advance(1, 1, 4), Wake(9)]


def test_what_is_outstanding_counts_across_requests() -> None:
    orion = policy([kernel(1000)], [kernel(10), kernel(20), kernel(30)], dur_threshold=0.05)
    # The last two of the former request (50) and the first of this one: above 50, so nothing.
    assert orion.decide(snapshot(0, be=(1, 2), launched=1, pending=3)) == []
    assert orion.decide(snapshot(0, be=(1, 2), launched=1, pending=2)) == [Advance(1, 1, 1)]  # 40, and 60 then


@pytest.mark.parametrize(
    ("ls", "be", "allowed"),
    [
        ("memory", "memory", False),
        ("compute", "compute", False),
        ("memory", "compute", True),
        ("compute", "memory", True),
        ("", "memory", True),
        ("memory", "", True),
    ],
)
def test_profiles_have_to_differ_beside_ls(ls: str, be: str, allowed: bool) -> None:
    orion = policy([kernel(1000, ls)], [kernel(100, be)] * 3)
    actions = orion.decide(snapshot(0, ls=(1, 0)))
    assert (Advance(1, 1, 1) in actions) == allowed
    # With no LS request there, any kernel may start.
    assert Advance(1, 1, 1) in orion.decide(snapshot(5000))


def test_a_kernel_that_needs_too_many_sms_waits_for_ls_to_end() -> None:
    orion = policy([kernel(1000)], [kernel(100, blocks=50)] * 3, sm_threshold=0.5)
    assert orion.decide(snapshot(0, ls=(1, 0))) == [Start(0, 0)]
    assert orion.decide(snapshot(900, ls=(0, 1))) == []
    assert orion.decide(snapshot(1000)) == [Advance(1, 1, 1)]
    smaller = policy([kernel(1000)], [kernel(100, blocks=49)] * 3, sm_threshold=0.5)
    assert smaller.decide(snapshot(0, ls=(1, 0))) == [Start(0, 0), Advance(1, 1, 1)]


def test_it_looks_again_when_the_next_ls_kernel_suits() -> None:
    orion = policy([kernel(400, "memory"), kernel(300, "memory"), kernel(300, "compute")], [kernel(100, "memory")])
    assert orion.decide(snapshot(50, ls=(1, 0))) == [Start(0, 0), Wake(750)]
    assert orion.decide(snapshot(700, ls=(0, 1))) == [Wake(750)]
    assert orion.decide(snapshot(750, ls=(0, 1))) == [Advance(1, 1, 1)]


def test_the_next_ls_request_begins_when_the_one_before_ends() -> None:
    orion = policy([kernel(400, "compute"), kernel(600, "memory")], [kernel(100, "memory")] * 9)
    orion.decide(snapshot(0, ls=(2, 0), be=(0, 0)))
    assert orion.decide(snapshot(600, ls=(0, 2))) == []  # in its second kernel
    assert Advance(1, 1, 1) in orion.decide(snapshot(1100, ls=(0, 1)))  # the second request's first kernel


def test_be_tenants_take_turns() -> None:
    made = OrionPolicy()
    tenants = (make("ls", "LS"), make("a", "BE"), make("b", "BE"))
    made.setup(tenants, INFO)
    made.brief((brief([kernel(1000)], whole=True), *(brief([kernel(100)] * 4, whole=False) for _ in "ab")))
    chosen = []
    for now in range(4):
        state = Snapshot(now, [0, 2, 2], [0] * 3, [0] * 3, (8, 2, 2), [0] * 3, [0] * 3, [False] * 3)
        chosen += [action.tenant for action in made.decide(state)]
    assert chosen == [1, 2, 1, 2]


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=6),
    launched=st.integers(0, 5),
    pending=st.integers(0, 20),
    threshold=st.floats(0.01, 2.0),
)
def test_no_more_is_outstanding_than_the_threshold_and_one_kernel(lengths, launched, pending, threshold) -> None:
    launched %= len(lengths)
    works = [kernel(length) for length in lengths]
    orion = policy([kernel(1000)], works, dur_threshold=threshold)
    actions = [
        a for a in orion.decide(snapshot(0, be=(3, 0), launched=launched, pending=pending)) if isinstance(a, Advance)
    ]
    order = [lengths[(launched - 1 - back) % len(lengths)] for back in range(pending)]
    before = sum(order)
    given_away = [lengths[(launched + i) % len(lengths)] for i in range(sum(action.segments for action in actions))]
    reached = list(accumulate([before, *given_away]))
    assert all(outstanding <= threshold * 1000 + 1e-6 for outstanding in reached[:-1])
    assert given_away or before > threshold * 1000 - 1e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sm_threshold": 0.0}, "sm_threshold"),
        ({"dur_threshold": -1.0}, "dur_threshold"),
        ({"throttle_idle": 2.0}, "0 or 1"),
    ],
)
def test_bad_options(options: dict[str, float], says: str) -> None:
    with pytest.raises(MisuseError, match=says):
        OrionPolicy(**options)


def test_a_gpu_without_priorities_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="priorities"):
        OrionPolicy().setup((make("ls", "LS"),), replace(INFO, level=Level.CORE))


def test_on_the_simulated_gpu_it_protects_ls_and_feeds_be() -> None:
    ls = Tenant.model_validate(
        {"name": "ls", "class": "LS", "model": "resnet34", "arrivals": {"kind": "poisson", "rate_per_s": 300}}
    )
    be = Tenant.model_validate({"name": "be", "class": "BE", "model": "densenet161", "arrivals": {"kind": "closed"}})
    p99, rate = {}, {}
    with open_gpu("sim:h200") as gpu, load_tenants(gpu, [ls, be]) as roster:
        for name in ("streams", "orion", "orion:dur_threshold=1"):
            record = run(gpu, roster, name, seed=1, duration_ns=500_000_000, warmup_ns=50_000_000)
            p99[name] = sorted(record.tenants[0].latency)[-2]
            rate[name] = len(record.tenants[1].done)
    assert p99["orion"] < p99["streams"]
    assert 0 < rate["orion"] < rate["orion:dur_threshold=1"] <= rate["streams"]
