"""Recorded arrivals that ship with Missile, and the DISB workloads. `trace_data/README.md` has origins and licences.

Names of traces are `FOLDER/MEMBER`: `disb-real/vgg19_rt`, `azure-llm-2023/code`, `azure-functions-2019/all`,
`azure-functions-2019/1` (the busiest function) to `/32`.
"""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError

__all__ = ["DisbTask", "DisbWorkload", "MinuteTrace", "PointTrace", "Trace", "disb_tasks", "load_trace", "trace_names"]

Times = npt.NDArray[np.int64]
DisbWorkload = Literal["A", "B", "C", "D", "E", "REAL"]

_SECOND = 1_000_000_000
_MINUTE = 60 * _SECOND
_FUNCTIONS = 32


class Trace(Protocol):
    """Recorded arrivals over [0, span_ns)."""

    @property
    def span_ns(self) -> int: ...
    def count(self, start_ns: int, end_ns: int) -> float:
        """How many arrivals lie in [start_ns, end_ns)."""

    def times(self, start_ns: int, end_ns: int, rng: np.random.Generator) -> Times:
        """Sorted times in [start_ns, end_ns), int64 ns, relative to `start_ns`. `rng` makes up what was not recorded."""


@dataclass(frozen=True, slots=True)
class PointTrace:
    """Every arrival's time was recorded. points: int64 ns, sorted, in [0, span_ns)."""

    points: Times
    span_ns: int

    def count(self, start_ns: int, end_ns: int) -> float:
        low, high = np.searchsorted(self.points, (start_ns, end_ns))
        return float(high - low)

    def times(self, start_ns: int, end_ns: int, rng: np.random.Generator) -> Times:
        low, high = np.searchsorted(self.points, (start_ns, end_ns))
        return self.points[low:high] - start_ns


@dataclass(frozen=True, slots=True)
class MinuteTrace:
    """Only counts per minute were recorded. counts: int64, shape (minutes,).

    Each arrival is placed uniformly at random within its minute: bursts below a minute are not the recorded ones.
    """

    counts: Times

    @property
    def span_ns(self) -> int:
        return len(self.counts) * _MINUTE

    def count(self, start_ns: int, end_ns: int) -> float:
        edges = np.concatenate(([0], np.cumsum(self.counts)))
        low, high = np.interp((start_ns / _MINUTE, end_ns / _MINUTE), np.arange(len(edges)), edges)
        return float(high - low)

    def times(self, start_ns: int, end_ns: int, rng: np.random.Generator) -> Times:
        # Whole minutes are drawn one after another, so that a later end never changes an earlier arrival.
        first, last = start_ns // _MINUTE, -(-end_ns // _MINUTE)
        parts = [
            minute * _MINUTE + np.sort(rng.integers(0, _MINUTE, self.counts[minute])) for minute in range(first, last)
        ]
        drawn = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return drawn[(drawn >= start_ns) & (drawn < end_ns)] - start_ns


@dataclass(frozen=True, slots=True)
class DisbTask:
    """One tenant of a DISB workload. load: "periodic", "poisson" (rate per second), "continuous" or "trace"."""

    id: str
    latency_sensitive: bool
    load: Literal["periodic", "poisson", "continuous", "trace"]
    rate_per_s: float = 0.0


def _data() -> Traversable:
    return resources.files("missile.workloads").joinpath("trace_data")


@cache
def _disb(workload: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(_data().joinpath("disb", f"{workload}.json").read_text())
    return parsed


@cache
def _functions() -> tuple[Times, ...]:
    path = _data().joinpath("azure-functions-2019", "minutes.csv.gz")
    rows = csv.reader(gzip.decompress(path.read_bytes()).decode().splitlines())
    next(rows)
    return tuple(np.array(row[1:], dtype=np.int64) for row in rows)


def disb_tasks(workload: DisbWorkload) -> tuple[DisbTask, ...]:
    """The tenants of a DISB workload, in its order."""
    return tuple(
        DisbTask(
            id=task["id"],
            latency_sensitive=task["id"].endswith("_rt"),
            load=task["load"]["type"],
            rate_per_s=float(task["load"].get("frequency", 0.0)),
        )
        for task in _disb(workload)["tasks"]
    )


def _disb_real(task_id: str) -> PointTrace:
    parsed = _disb("REAL")
    task = next(task for task in parsed["tasks"] if task["id"] == task_id)
    return PointTrace(np.array(task["load"]["trace"], dtype=np.int64) * 1_000_000, parsed["time"] * _SECOND)


def _timestamp_ns(text: str) -> int:
    # Seven digits of a second: more than datetime keeps.
    whole, _, fraction = text.partition(".")
    moment = datetime.fromisoformat(whole + "+00:00")
    return int(moment.timestamp()) * _SECOND + int(fraction.ljust(9, "0"))


def _azure_llm(kind: str) -> PointTrace:
    path = _data().joinpath("azure-llm-2023", f"{kind}.csv.gz")
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()[1:]
    points = np.array([_timestamp_ns(line.partition(",")[0]) for line in lines], dtype=np.int64)
    points -= points[0]
    # The recording has no stated end; one mean gap after the last arrival keeps the mean rate when it repeats.
    return PointTrace(points, int(points[-1] + points[-1] // (len(points) - 1)))


def trace_names() -> tuple[str, ...]:
    """Every name that `load_trace` takes."""
    return (
        *(f"disb-real/{task.id}" for task in disb_tasks("REAL") if task.load == "trace"),
        "azure-llm-2023/code",
        "azure-llm-2023/conv",
        "azure-functions-2019/all",
        *(f"azure-functions-2019/{rank}" for rank in range(1, _FUNCTIONS + 1)),
    )


@cache
def load_trace(name: str) -> Trace:
    """The recorded trace `name`. MisuseError names the known ones."""
    if name not in trace_names():
        known = [known for known in trace_names() if not known.startswith("azure-functions-2019/")]
        known += ["azure-functions-2019/all", f"azure-functions-2019/1 to /{_FUNCTIONS}"]
        raise MisuseError(f"Unknown trace {name!r}; known: {', '.join(known)}.")
    folder, _, member = name.partition("/")
    if folder == "disb-real":
        return _disb_real(member)
    if folder == "azure-llm-2023":
        return _azure_llm(member)
    return MinuteTrace(_functions()[0 if member == "all" else int(member)])
