"""A soak: the same pieces of a recorded trace played three times over, to see what grows, drifts or gets lost.

A soak is many *legs*, runs of a few seconds each. Each third of them plays the same pieces of the trace in the same order,
so that the last third's tail may be compared with the first one's. Between legs nothing runs, and what the process and the
GPU hold is written down.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError
from missile.gpu.interface import Gpu
from missile.runtime.records import RunRecord
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import TraceArrivals, arrival_times
from missile.workloads.traces import load_trace

__all__ = ["Check", "Held", "Soak", "Tails", "held_now", "piece_of", "problems_of"]

_STEP = math.log(1.005)  # a bin of the histograms is half a percent wide
_BINS = 8192  # to about 6e17 ns

# What may be more in the last third than in the second one, on average, and by what factor a tail may be longer than in the
# first: beyond that it is a leak or a drift.
_HOST_BYTES, _DEVICE_BYTES, _HANDLES = 8 << 20, 4 << 20, 0
_DRIFT = 1.15


@dataclass(frozen=True, slots=True)
class Held:
    """What is held between two legs: host_bytes, resident; device_bytes, of the GPU's memory by anybody; handles, open
    files of the process."""

    host_bytes: int
    device_bytes: int
    handles: int


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. holds: None where there was too little to say."""

    what: str
    holds: bool | None
    found: str


def piece_of(tenant: Tenant, leg: int, pieces: int) -> Tenant:
    """`tenant` with the piece of its trace that leg number `leg` plays; one without a trace as it is.

    The trace is cut into `pieces` equal windows, each played at the tenant's mean rate.
    """
    arrivals = tenant.arrivals
    if not isinstance(arrivals, TraceArrivals):
        return tenant
    if arrivals.rate_per_s is None:
        raise MisuseError(f"Tenant {tenant.name!r}: a soak plays traces at a mean rate (rate_per_s).")
    length = load_trace(arrivals.name).span_ns / 1e9 / pieces
    window = arrivals.model_copy(update={"start_s": (leg % pieces) * length, "length_s": length})
    return tenant.model_copy(update={"arrivals": window})


def problems_of(record: RunRecord, tenants: Sequence[Tenant], seed: int) -> list[str]:
    """What is wrong with a leg's requests, a sentence each: lost, twice there, or in an order that can't be."""
    found = [] if not record.fault else [f"a fault: {record.fault}"]
    rows = {row.name: row for row in record.tenants}
    for tenant in tenants:
        row = rows[tenant.name]
        if tenant.closed_loop is None:
            due = arrival_times(tenant.arrivals, seed=seed, tenant=tenant.name, horizon_ns=record.duration_ns)
            due = due[due >= record.warmup_ns]
            known = len(row.arrival) + row.rejected + row.unfinished
            if known != len(due):
                found.append(f"{tenant.name}: {len(due)} requests arrived, {known} are accounted for")
            if row.unfinished:
                found.append(f"{tenant.name}: {row.unfinished} requests were never finished")
            if not _contained(row.arrival, due):
                found.append(f"{tenant.name}: requests that never arrived, or one twice")
        if np.any(row.end < row.start) or np.any(
            row.done < row.end - 1_000
        ):  # the GPU's clock is known to a microsecond
            found.append(f"{tenant.name}: a request was done before it ended, or ended before it began")
        if np.any(row.start[1:] < row.end[:-1] - 1_000):
            found.append(f"{tenant.name}: two requests of it ran at once")
    return found


def _contained(some: npt.NDArray[np.int64], every: npt.NDArray[np.int64]) -> bool:
    """Whether each time in `some` is one in `every`, as often at most."""
    times, counts = np.unique(some, return_counts=True)
    there, most = np.unique(every, return_counts=True)
    place = np.searchsorted(there, times)
    if np.any(place >= len(there)):
        return False
    return bool(np.all(there[place] == times) and np.all(counts <= most[place]))


class Tails:
    """Latencies of one tenant in bins half a percent wide: its memory does not grow with what it has seen."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)

    def add(self, latency_ns: npt.NDArray[np.int64]) -> None:
        bins = np.log(np.maximum(latency_ns, 1)) / _STEP
        self.counts += np.bincount(np.minimum(bins.astype(np.int64), _BINS - 1), minlength=_BINS)

    def quantile(self, share: float) -> float | None:
        """ns; None where fewer than ten requests lie beyond it."""
        total = int(self.counts.sum())
        if total * (1.0 - share) < 10:
            return None
        place = int(np.searchsorted(np.cumsum(self.counts), share * total))
        return math.exp((place + 0.5) * _STEP)


def held_now(gpu: Gpu) -> Held:
    """What this process and the GPU hold now, garbage collected. Linux; zero where there is no /proc."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        handles = len(os.listdir("/proc/self/fd"))
    except OSError:
        pages = handles = 0
    return Held(pages * os.sysconf("SC_PAGE_SIZE"), gpu.info.memory_bytes - gpu.memory_free(), handles)


@dataclass
class Soak:
    """A soak in progress: `play` each leg in turn, `checks` at any time.

    serve: runs tenants for a leg, with a seed. hold: what is held now. legs: how many, at least three.
    """

    tenants: Sequence[Tenant]
    serve: Callable[[Sequence[Tenant], int], RunRecord]
    hold: Callable[[], Held]
    legs: int
    seed: int = 1
    played: int = field(default=0, init=False)
    held: list[Held] = field(default_factory=list, init=False)
    problems: list[str] = field(default_factory=list, init=False)
    requests: int = field(default=0, init=False)
    rejected: int = field(default=0, init=False)
    _tails: list[dict[str, Tails]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.legs < 3:
            raise MisuseError(f"A soak has at least three legs, not {self.legs}.")
        self._tails = [{t.name: Tails() for t in self.tenants if t.latency_sensitive} for _ in range(3)]

    @property
    def pieces(self) -> int:
        return max(self.legs // 3, 1)

    def play(self) -> RunRecord:
        """The next leg. What is wrong with it is noted, with its number."""
        piece, third = self.played % self.pieces, min(self.played // self.pieces, 2)
        tenants = [piece_of(tenant, piece, self.pieces) for tenant in self.tenants]
        seed = self.seed + piece
        record = self.serve(tenants, seed)
        self.problems += [f"leg {self.played + 1}: {text}" for text in problems_of(record, tenants, seed)]
        for row in record.tenants:
            self.requests += len(row.done)
            self.rejected += row.rejected
            if (tails := self._tails[third].get(row.name)) is not None:
                tails.add(row.latency)
        self.played += 1
        self.held.append(self.hold())
        return record

    def tails_ms(self, share: float = 0.99) -> Mapping[str, list[float | None]]:
        """By LS tenant, the quantile of each third."""
        return {
            name: [None if (ns := third[name].quantile(share)) is None else ns / 1e6 for third in self._tails]
            for name in self._tails[0]
        }

    def checks(self) -> list[Check]:
        """What holds, by what has been played so far."""
        lost = Check(
            "No request lost or twice there",
            not self.problems if self.played else None,
            "; ".join(self.problems[:3])
            or f"{self.requests} requests in {self.played} legs, {self.rejected} turned away",
        )
        checks = [lost]
        checks += [
            self._growth("host memory", [held.host_bytes for held in self.held], _HOST_BYTES, 1 << 20, " MiB"),
            self._growth("GPU memory", [held.device_bytes for held in self.held], _DEVICE_BYTES, 1 << 20, " MiB"),
            self._growth("open files", [held.handles for held in self.held], _HANDLES, 1, ""),
        ]
        for name, (first, _, last) in self.tails_ms().items():
            ratio = last / first if first and last else None
            found = "too few requests" if ratio is None else f"{first:.3g} ms, at the end {last:.3g} ms: {ratio:.3f} x"
            checks.append(Check(f"p99 of {name} does not drift", None if ratio is None else ratio <= _DRIFT, found))
        return checks

    def _growth(self, what: str, samples: Sequence[int], most: float, unit: int, name: str) -> Check:
        if self.played < 2 * self.pieces + 1:
            return Check(f"No growth: {what}", None, "not played for long enough")
        second = float(np.mean(samples[self.pieces : 2 * self.pieces]))
        last = float(np.mean(samples[2 * self.pieces :]))
        found = f"{second / unit:.1f}{name}, at the end {last / unit:.1f}{name}"
        return Check(f"No growth: {what}", last - second <= most, found)
