"""What the raw times of a run say: quantiles with their uncertainty, objectives met, rates. Pure.

Rules: a quantile is an order statistic, so it is a latency that a request really had; a quantile with no sample beyond it is
not given; a request that never finished or was rejected missed its objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.runtime.records import RunRecord, TenantRecord
from missile.statistics import nearest_rank, supports

__all__ = [
    "QUANTILES",
    "Quantile",
    "TenantMetrics",
    "attainment",
    "quantile",
    "tenant_metrics",
]

Samples = npt.NDArray[np.int64]

QUANTILES = (0.5, 0.95, 0.99, 0.999)
_NS_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class Quantile:
    """value: the q-quantile of n samples, in their unit. [low, high]: covers the true one with the confidence asked for;
    high is the largest sample where the samples can't bound it from above, and `bounded` is False then."""

    q: float
    value: int
    low: int
    high: int
    n: int
    bounded: bool = True


@dataclass(frozen=True, slots=True)
class TenantMetrics:
    """One tenant in one run. Times in ns, rates per second of the measured span.

    latency, queueing, service, dispatch: by q, those of `QUANTILES` for which there are enough samples. queueing: arrival to
    first kernel running; service: from there to the output on the host; dispatch: arrival to kernels launched.
    attainment: share of requests within the objective; goodput: their rate. None without an objective.
    throughput: finished requests; against_solo: throughput over that of the solo run, None without one.
    """

    name: str
    n: int
    lost: int
    latency: dict[float, Quantile]
    queueing: dict[float, Quantile]
    service: dict[float, Quantile]
    dispatch: dict[float, Quantile]
    throughput: float
    attainment: float | None
    goodput: float | None
    against_solo: float | None


def quantile(samples: Samples, q: float, confidence: float = 0.95) -> Quantile | None:
    """The q-quantile (0 < q < 1) by nearest rank, with a distribution-free interval; None if no sample would lie beyond it.

    The interval is between order statistics (David and Nagaraja, Order Statistics, 3rd ed., 7.1): how many of n independent
    samples lie below the true quantile is binomial(n, q). Requests in a queue are not independent, so it is a lower
    bound on the doubt: repeats tell more.
    """
    from scipy.stats import binom  # takes most of a second to import, and the other functions here don't need it

    n = len(samples)
    if not supports(n, q):
        return None
    ordered = np.sort(samples)
    tail = (1 - confidence) / 2
    # The largest l with P(B < l) <= tail, the smallest u with P(B >= u) <= tail, counting samples from 1.
    low = int(binom.ppf(tail, n, q))
    high = int(binom.ppf(1 - tail, n, q)) + 1
    return Quantile(
        q=q,
        value=int(ordered[nearest_rank(n, q)]),
        low=int(ordered[max(low, 1) - 1]),
        high=int(ordered[min(high, n) - 1]),
        n=n,
        bounded=low >= 1 and high <= n,
    )


def attainment(record: TenantRecord, slo_ns: float) -> float | None:
    """Share of the tenant's requests that were answered within `slo_ns`, in [0, 1]; None when it had none."""
    total = len(record.arrival) + record.unfinished + record.rejected
    return float(np.count_nonzero(record.latency <= slo_ns)) / total if total else None


def tenant_metrics(
    run: RunRecord, name: str, *, slo_ns: float | None = None, solo: RunRecord | None = None
) -> TenantMetrics:
    """Everything about tenant `name` in `run`. solo: the run in which it had the GPU alone."""
    record = next(record for record in run.tenants if record.name == name)
    span_s = (run.duration_ns - run.warmup_ns) / _NS_PER_S
    n = len(record.arrival)
    met = None if slo_ns is None else attainment(record, slo_ns)
    rate = n / span_s if span_s > 0 else 0.0
    alone = None if solo is None else tenant_metrics(solo, name).throughput
    return TenantMetrics(
        name=name,
        n=n,
        lost=record.unfinished + record.rejected,
        latency=_quantiles(record.latency),
        queueing=_quantiles(record.queueing),
        service=_quantiles(record.service),
        dispatch=_quantiles(record.dispatch - record.arrival),
        throughput=rate,
        attainment=met,
        goodput=None if slo_ns is None or span_s <= 0 else int(np.count_nonzero(record.latency <= slo_ns)) / span_s,
        against_solo=rate / alone if alone else None,
    )


def _quantiles(samples: Samples) -> dict[float, Quantile]:
    found = ((q, quantile(samples, q)) for q in QUANTILES)
    return {q: value for q, value in found if value is not None}
