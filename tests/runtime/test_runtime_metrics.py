from __future__ import annotations

import numpy as np
import pytest
import scipy.stats  # noqa: F401  (quantile imports it at its first call, which would outlast an example's deadline)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from missile.runtime.metrics import attainment, quantile, tenant_metrics
from missile.runtime.records import RunRecord, TenantRecord

samples = hnp.arrays(np.int64, st.integers(0, 400), elements=st.integers(0, 10**9))
qs = st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999])


def record(latency: np.ndarray, unfinished: int = 0, rejected: int = 0) -> TenantRecord:
    arrival = np.arange(len(latency), dtype=np.int64) * 1000
    start = arrival + latency // 3
    done = arrival + latency
    lane = np.zeros_like(arrival)
    return TenantRecord("a", arrival, arrival, start, done, done, lane, unfinished, rejected)


def run(latency: np.ndarray, **lost: int) -> RunRecord:
    return RunRecord("p", "sim:h100", True, 3_000_000_000, 1_000_000_000, 0, (record(latency, **lost),))


@given(samples, qs, st.sampled_from([0.8, 0.95, 0.99]))
def test_a_quantile_is_a_sample_with_the_right_share_below_it(values, q, confidence):
    found = quantile(values, q, confidence)
    if found is None:
        assert len(values) * (1 - q) < 1
        return
    assert found.value in values
    assert np.mean(values <= found.value) >= q - 1e-9
    assert np.mean(values < found.value) <= q
    assert found.low <= found.value <= found.high
    assert values.min() <= found.low
    assert found.high <= values.max()


@given(samples, qs, st.integers(1, 10**6))
def test_quantiles_move_with_the_samples(values, q, shift):
    found, moved = quantile(values, q), quantile(values + shift, q)
    assert (found is None) == (moved is None)
    if found is not None and moved is not None:
        assert (moved.value, moved.low, moved.high) == (found.value + shift, found.low + shift, found.high + shift)


@pytest.mark.parametrize(("q", "n"), [(0.5, 40), (0.95, 200), (0.99, 900)])
def test_the_interval_covers_the_true_quantile_as_often_as_it_says(q, n):
    rng = np.random.default_rng(5)
    true = -np.log(1 - q) * 1e6
    hits = 0
    for _ in range(600):
        found = quantile((rng.exponential(1e6, n)).astype(np.int64), q, 0.9)
        assert found is not None
        hits += found.low <= true <= found.high or not found.bounded
    assert 0.87 <= hits / 600 <= 0.97


def test_p99_9_needs_a_thousand_samples():
    assert quantile(np.arange(999), 0.999) is None
    found = quantile(np.arange(1000), 0.999)
    assert found is not None
    assert found.value == 998
    assert not found.bounded


@given(samples, st.integers(0, 50), st.integers(0, 50), st.integers(0, 10**9))
def test_lost_requests_count_as_missed(latency, unfinished, rejected, slo):
    met = attainment(record(latency, unfinished, rejected), slo)
    total = len(latency) + unfinished + rejected
    if met is None:
        assert total == 0
    else:
        assert met * total == pytest.approx(sum(latency <= slo))


@given(samples, st.integers(1, 10**9))
def test_rates_are_over_the_measured_span(latency, slo):
    metrics = tenant_metrics(run(latency, unfinished=2), "a", slo_ns=slo, solo=run(np.arange(200)))
    assert metrics.throughput == len(latency) / 2.0
    assert metrics.goodput is not None
    assert metrics.goodput <= metrics.throughput
    assert metrics.against_solo == pytest.approx(len(latency) / 200)
    assert metrics.lost == 2
    for q, found in metrics.latency.items():
        assert metrics.queueing[q].value <= found.value
