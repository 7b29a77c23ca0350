"""The numbers of the table: percentiles against their definition, ratios and shares against hand-made runs."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats  # noqa: F401  (quantile imports it at its first call, which would outlast an example's deadline)
from hypothesis import given
from hypothesis import strategies as st

from missile.bench.results import Results, Run, TenantRun
from missile.bench.summary import Summary, percentile, summarize
from missile.bench.table import format_share, three_digits
from missile.runtime.metrics import quantile


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=2000), st.sampled_from([50.0, 90.0, 95.0, 99.0, 99.9]))
def test_percentile_by_nearest_rank_or_not_at_all(values: list[float], q: float) -> None:
    samples = np.array(values)
    answer = percentile(samples, q)
    needed = {50.0: 2, 90.0: 10, 95.0: 20, 99.0: 100, 99.9: 1000}[q]
    if len(values) < needed:
        assert answer is None
    else:
        assert answer in values
        assert np.count_nonzero(samples <= answer) >= len(values) * q / 100 * (1 - 1e-12)
        assert np.count_nonzero(samples < answer) < len(values) * q / 100 * (1 + 1e-12)


@given(st.integers(1, 5000), st.sampled_from([50.0, 90.0, 95.0, 99.0, 99.9]))
def test_bench_and_runtime_give_the_same_percentiles(n: int, q: float) -> None:
    samples = np.random.default_rng(n).permutation(n)
    ours, theirs = percentile(samples.astype(np.float64), q), quantile(samples, q / 100)
    assert ours == (None if theirs is None else theirs.value)


def test_p99_9_of_a_thousand_samples_leaves_one_beyond_it() -> None:
    assert percentile(np.arange(1000.0), 99.9) == 998.0
    assert percentile(np.arange(999.0), 99.9) is None


def _tenant(name: str, latency_ms: list[float], *, waited_ms: float = 0.0, lost: int = 0) -> TenantRun:
    arrival = [i * 1_000_000 for i in range(len(latency_ms))]
    start = [a + round(waited_ms * 1e6) for a in arrival]
    done = [a + round(ms * 1e6) for a, ms in zip(arrival, latency_ms, strict=True)]
    return TenantRun(
        name=name,
        arrival_ns=arrival,
        dispatch_ns=start,
        start_ns=start,
        end_ns=done,
        done_ns=done,
        lane=[0] * len(arrival),
        unfinished=lost,
    )


def _run(kind: str, policy: str, repeat: int, *tenants: TenantRun, interrupted: bool = False) -> Run:
    return Run.model_validate(
        {
            "kind": kind,
            "policy": policy,
            "repeat": repeat,
            "seed": repeat,
            "duration_ns": 2_500_000_000,
            "warmup_ns": 500_000_000,
            "lanes": ["a lane"],
            "tenants": [tenant.model_dump() for tenant in tenants],
            "interrupted": interrupted,
        }
    )


@pytest.fixture
def hand_made(toy_results: Results) -> Summary:
    """detect: 1 ms alone; 3 ms under streams, but 10 ms for 2% of the second repeat. reindex: half its solo rate."""
    slow = [3.0] * 98 + [10.0] * 2
    runs = [
        _run("solo", "solo", 0, _tenant("detect", [1.0] * 100)),
        _run("solo", "solo", 0, _tenant("reindex", [9.0] * 40)),
        _run("policy", "streams", 0, _tenant("detect", [3.0] * 100, waited_ms=2), _tenant("reindex", [20.0] * 10)),
        _run("policy", "streams", 1, _tenant("detect", slow, waited_ms=2, lost=5), _tenant("reindex", [20.0] * 30)),
        _run("policy", "streams", 2, _tenant("detect", [999.0] * 100), interrupted=True),
    ]
    tenants = [
        tenant.model_copy(update={"slo_ms": 3.5 if tenant.tenant_class == "LS" else None})
        for tenant in toy_results.tenants
        if tenant.name in ("detect", "reindex")
    ]
    return summarize(toy_results.model_copy(update={"runs": runs, "tenants": tenants}))


def test_latency_figures(hand_made: Summary) -> None:
    (streams,) = hand_made.policies
    (detect,) = streams.ls
    assert (detect.n, detect.p50, detect.p95, detect.p999) == (200, 3.0, 3.0, None)
    assert detect.p99 is not None
    assert (detect.p99.value, detect.p99.low, detect.p99.high) == (3.0, 3.0, 10.0)
    assert (detect.over_solo, detect.queueing_p99) == (3.0, 2.0)
    assert streams.ls_over_solo == pytest.approx(3.0)


def test_lost_requests_miss_their_objective(hand_made: Summary) -> None:
    detect = hand_made.policies[0].ls[0]
    assert detect.lost == 5
    assert detect.attainment == pytest.approx(198 / 205)
    assert detect.over_solo_of_all is None  # more than 1%


def test_a_p99_of_all_requests_counts_lost_ones_as_the_slowest(toy_results: Results) -> None:
    late = [float(i) for i in range(1, 201)]
    runs = [
        _run("solo", "solo", 0, _tenant("detect", [1.0] * 100)),
        _run("policy", "streams", 0, _tenant("detect", late, lost=2)),
    ]
    tenants = [tenant for tenant in toy_results.tenants if tenant.name == "detect"]
    (detect,) = summarize(toy_results.model_copy(update={"runs": runs, "tenants": tenants})).policies[0].ls
    assert (detect.over_solo, detect.over_solo_of_all) == (
        198.0,
        200.0,
    )  # the 3rd longest of 202 is the longest finished


def test_throughput_counts_the_measured_span_only(hand_made: Summary) -> None:
    (reindex,) = hand_made.policies[0].be
    assert hand_made.solo_be[0].rate.value == 20.0
    assert (reindex.rate.value, reindex.rate.low, reindex.rate.high) == (10.0, 5.0, 15.0)
    assert reindex.share is not None
    assert (reindex.share.value, reindex.share.low, reindex.share.high) == (0.5, 0.25, 0.75)
    assert hand_made.policies[0].be_share == 0.5


def test_an_interrupted_run_is_not_averaged_in(hand_made: Summary) -> None:
    assert hand_made.policies[0].repeats == 2


def test_without_solo_runs_there_are_no_ratios(toy_results: Results) -> None:
    shared = [run for run in toy_results.runs if run.kind == "policy"]
    summary = summarize(toy_results.model_copy(update={"runs": shared}))
    assert summary.solo_ls == summary.solo_be == ()
    assert all(policy.ls_over_solo is None and policy.be_share is None for policy in summary.policies)
    assert all(row.over_solo is None and row.p99 for policy in summary.policies for row in policy.ls)


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100%"), (0.9996, "99.9%"), (0.0, "0%"), (0.0004, "0.0%"), (0.5, "50.0%"), (1.26, "126%"), (None, "–")],
)
def test_a_share_is_never_rounded_up_to_all(share: float | None, text: str) -> None:
    assert format_share(share) == text


def test_milliseconds_have_three_digits() -> None:
    assert [three_digits(v) for v in (0.123, 1.005, 12.34, 123.4, None)] == ["0.12", "1.00", "12.3", "123", "–"]
