"""What is counted per tenant: pure numbers, fed by the gateway, read by the metrics, the statistics and the view."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from missile.statistics import nearest_rank

__all__ = ["BUCKETS_S", "Histogram", "Measures", "Second", "Totals"]

BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_BUCKETS_NS = [int(edge * 1e9) for edge in BUCKETS_S]
HISTORY_S = 3600
RECENT_S = 10  # latencies of the last seconds are kept one by one


class Histogram:
    """Counts by upper edge (`BUCKETS_S` and infinity) and the sum, ns."""

    __slots__ = ("counts", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(_BUCKETS_NS) + 1)
        self.sum_ns = 0

    def observe(self, ns: int) -> None:
        self.counts[bisect_left(_BUCKETS_NS, ns)] += 1
        self.sum_ns += ns


@dataclass(slots=True)
class Totals:
    """A count and a time, ns, as the statistics extension wants them."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns


def _quantiles_ms(latencies_ns: Iterable[int], *shares: float) -> tuple[float, ...]:
    ordered = sorted(latencies_ns)
    return tuple(ordered[nearest_rank(len(ordered), share)] / 1e6 for share in shares)


@dataclass(frozen=True, slots=True)
class Second:
    """One second of a tenant. Latencies in ms, None where nothing was answered. owed: requests that count for the SLO."""

    at_s: int
    answered: int
    refused: int
    owed: int
    met: int
    p50_ms: float | None
    p99_ms: float | None


@dataclass(slots=True)
class Measures:
    """One tenant's numbers since the server started. slo_ns 0: no SLO."""

    slo_ns: int = 0
    objective: float = 0.99
    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    items: int = 0
    executions: int = 0
    last_inference_ms: int = 0
    total: Histogram = field(default_factory=Histogram)
    queue: Histogram = field(default_factory=Histogram)
    copy: Histogram = field(default_factory=Histogram)
    execute: Histogram = field(default_factory=Histogram)
    success: Totals = field(default_factory=Totals)
    fail: Totals = field(default_factory=Totals)
    queue_total: Totals = field(default_factory=Totals)
    copy_in_total: Totals = field(default_factory=Totals)
    execute_total: Totals = field(default_factory=Totals)
    copy_out_total: Totals = field(default_factory=Totals)
    batches: dict[int, tuple[Totals, Totals, Totals]] = field(default_factory=dict)
    history: deque[Second] = field(default_factory=lambda: deque(maxlen=HISTORY_S))
    recent: deque[list[int]] = field(default_factory=lambda: deque(maxlen=RECENT_S))
    _now: list[int] = field(default_factory=list)
    _now_refused: int = 0
    _now_owed: int = 0
    _now_met: int = 0

    def record(
        self,
        latency_ns: int,
        queue_ns: int,
        copy_in_ns: int,
        execute_ns: int,
        copy_out_ns: int,
        *,
        items: int,
        batch: int,
        first: int,
    ) -> None:
        """An answered request. items: its own; batch: all that ran together; first: 1 for one request of each batch."""
        self.answered += 1
        self.items += items
        self.total.observe(latency_ns)
        self.queue.observe(queue_ns)
        self.copy.observe(copy_in_ns + copy_out_ns)
        self.execute.observe(execute_ns)
        self.success.add(latency_ns)
        self.queue_total.add(queue_ns)
        self.copy_in_total.add(copy_in_ns)
        self.execute_total.add(execute_ns)
        self.copy_out_total.add(copy_out_ns)
        if first:
            self.executions += 1
            sizes = self.batches.get(batch)
            if sizes is None:
                sizes = self.batches[batch] = (Totals(), Totals(), Totals())
            sizes[0].add(copy_in_ns)
            sizes[1].add(execute_ns)
            sizes[2].add(copy_out_ns)
        self._now.append(latency_ns)
        self._now_owed += 1
        if not self.slo_ns or latency_ns <= self.slo_ns:
            self._now_met += 1

    def refuse(self, label: str, *, owed: bool, latency_ns: int = 0) -> None:
        """A request without an answer. owed: it was the server's doing, so it counts against the SLO."""
        self.refused[label] += 1
        self.fail.add(latency_ns)
        self._now_refused += 1
        if owed:
            self._now_owed += 1

    def tick(self, at_s: int) -> None:
        """Close the current second."""
        p50: float | None = None
        p99: float | None = None
        if self._now:
            p50, p99 = _quantiles_ms(self._now, 0.5, 0.99)
        self.history.append(Second(at_s, len(self._now), self._now_refused, self._now_owed, self._now_met, p50, p99))
        self.recent.append(self._now)
        self._now = []
        self._now_refused = self._now_owed = self._now_met = 0

    def attainment(self, seconds: int) -> float | None:
        """Share of owed requests that met the SLO in the last `seconds`; None without any, or without an SLO."""
        if not self.slo_ns:
            return None
        owed = met = 0
        for index in range(1, min(seconds, len(self.history)) + 1):
            owed += self.history[-index].owed
            met += self.history[-index].met
        return met / owed if owed else None

    def burn(self, seconds: int) -> float | None:
        """How many times faster than allowed the error budget went in the last `seconds` (1.0: just allowed)."""
        attained = self.attainment(seconds)
        return None if attained is None else (1.0 - attained) / (1.0 - self.objective)

    def recent_ms(self) -> tuple[float, float, float] | None:
        """p50, p95 and p99, ms, of the last `RECENT_S` seconds; None when nothing was answered."""
        latencies = [ns for second in self.recent for ns in second]
        if not latencies:
            return None
        p50, p95, p99 = _quantiles_ms(latencies, 0.5, 0.95, 0.99)
        return p50, p95, p99

    def rate(self) -> float:
        """Answers per second over the last `RECENT_S` seconds."""
        return sum(map(len, self.recent)) / max(1, len(self.recent))
