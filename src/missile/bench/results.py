"""`results.json`: everything a bench run measured, raw, with what is needed to understand and repeat it.

The report and the table are computed from this file alone, so that both can be made again later.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from missile.bench.scenario import Scenario
from missile.errors import MisuseError
from missile.files import write_whole
from missile.runtime.records import RunRecord, TenantRecord
from missile.validation import first_problem

__all__ = ["SCHEMA", "Results", "Run", "TenantInfo", "TenantRun", "read_results", "write_results"]

SCHEMA = "missile-bench/1"

Nanoseconds = Annotated[list[int], Field(default_factory=list)]
_TIMES = ("arrival", "dispatch", "start", "end", "done")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TenantRun(_Strict):
    """One tenant's requests in one run: `TenantRecord` with times in ns since the run's start, one entry per request."""

    name: str
    arrival_ns: Nanoseconds
    dispatch_ns: Nanoseconds
    start_ns: Nanoseconds
    end_ns: Nanoseconds
    done_ns: Nanoseconds
    lane: list[int] = Field(default_factory=list)
    unfinished: int = 0
    rejected: int = 0
    cold_ns: list[tuple[int, int]] = Field(default_factory=list)
    cold_bytes: int = 0
    cold_ideal_ns: int = 0
    error: str = ""

    @model_validator(mode="after")
    def _same_length(self) -> TenantRun:
        lengths = {len(getattr(self, f"{time}_ns")) for time in _TIMES} | {len(self.lane)}
        if len(lengths) > 1:
            raise ValueError(f"tenant {self.name!r} has lists of different lengths")
        return self

    @classmethod
    def from_record(cls, record: TenantRecord) -> TenantRun:
        return cls(
            name=record.name,
            **{f"{time}_ns": getattr(record, time).tolist() for time in _TIMES},
            lane=record.lane.tolist(),
            unfinished=record.unfinished,
            rejected=record.rejected,
            cold_ns=[(begun, arrived) for begun, arrived in record.cold.tolist()],
            cold_bytes=record.cold_bytes,
            cold_ideal_ns=record.cold_ideal_ns,
            error=record.error,
        )

    def record(self) -> TenantRecord:
        return TenantRecord(
            name=self.name,
            **{time: np.asarray(getattr(self, f"{time}_ns"), np.int64) for time in _TIMES},
            lane=np.asarray(self.lane, np.int64),
            unfinished=self.unfinished,
            rejected=self.rejected,
            cold=np.asarray(self.cold_ns, np.int64).reshape(-1, 2),
            cold_bytes=self.cold_bytes,
            cold_ideal_ns=self.cold_ideal_ns,
            error=self.error,
        )


_MOST_JITTER = 256


def _thinned(times: npt.NDArray[np.int64]) -> list[int]:
    """`times` in order, or if they are many, evenly spaced ones of them, the smallest and the largest among them."""
    ordered = np.sort(times)
    if len(ordered) > _MOST_JITTER:
        ordered = ordered[np.linspace(0, len(ordered) - 1, _MOST_JITTER).round().astype(np.int64)]
    return [int(time) for time in ordered]


class Run(_Strict):
    """One run: all tenants under `policy` (as the scenario wrote it), or (kind "solo") one tenant alone.

    jitter_ns: the engine's long passes (`Engine.jitter`), sorted; of more than 256 so many order statistics, evenly spaced.
    """

    kind: Literal["solo", "policy"]
    policy: str
    repeat: int
    seed: int
    duration_ns: int
    warmup_ns: int
    lanes: list[str]
    tenants: list[TenantRun]
    jitter_ns: list[int] = Field(default_factory=list)
    interrupted: bool = False
    fault: str = ""
    notes: list[str] = Field(default_factory=list)

    @classmethod
    def from_record(cls, record: RunRecord, *, kind: Literal["solo", "policy"], policy: str, repeat: int) -> Run:
        return cls(
            kind=kind,
            policy=policy,
            repeat=repeat,
            seed=record.seed,
            duration_ns=record.duration_ns,
            warmup_ns=record.warmup_ns,
            lanes=list(record.lanes),
            tenants=[TenantRun.from_record(tenant) for tenant in record.tenants],
            jitter_ns=_thinned(record.jitter_ns),
            interrupted=record.interrupted,
            fault=record.fault,
            notes=list(record.notes),
        )

    def record(self) -> RunRecord:
        """What it was made from, but for the device."""
        return RunRecord(
            policy=self.policy,
            device="",
            simulated=False,
            duration_ns=self.duration_ns,
            warmup_ns=self.warmup_ns,
            seed=self.seed,
            tenants=tuple(tenant.record() for tenant in self.tenants),
            lanes=tuple(self.lanes),
            jitter_ns=np.asarray(self.jitter_ns, np.int64),
            interrupted=self.interrupted,
            fault=self.fault,
            notes=tuple(self.notes),
        )

    @property
    def whole(self) -> bool:
        """Whether it ran to its planned end; else it has samples, but no full span to judge rates and losses by."""
        return not self.interrupted and not self.fault

    @property
    def span_s(self) -> float:
        """The measured span, seconds: what follows the warm-up."""
        return (self.duration_ns - self.warmup_ns) / 1e9


class TenantInfo(_Strict):
    """A tenant as it was run. `slo_ms` is the objective in force, also where the scenario gave a factor of the solo p99."""

    name: str
    tenant_class: Literal["LS", "BE"]
    model: str
    batch: int
    arrivals: str
    slo_ms: float | None = None
    slo_text: str = ""


class Results(_Strict):
    """A bench run. `policies`: name -> what it does, in words. `environment`: strings and numbers for people.

    plan: what the planner of `missile` chose, as `explanation.plan_data` has it, with the explanation as "text".
    """

    schema_name: str = Field(SCHEMA, alias="schema")
    created: str
    simulated: bool
    gpu: str
    device: str
    interrupted: bool = False
    environment: dict[str, Any]
    scenario: Scenario
    policies: dict[str, str]
    tenants: list[TenantInfo]
    runs: list[Run]
    notes: list[str] = Field(default_factory=list)
    plan: dict[str, Any] | None = None

    @property
    def failures(self) -> dict[str, str]:
        """Tenants that never started or stopped early in some run, and why."""
        return {tenant.name: tenant.error for run in reversed(self.runs) for tenant in run.tenants if tenant.error}


def write_results(results: Results, path: Path) -> None:
    """Write `path` whole or not at all; compressed when its name ends in .gz."""
    content = (results.model_dump_json(by_alias=True) + "\n").encode()
    write_whole(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def read_results(path: Path) -> Results:
    """Read a results file. MisuseError when it is missing, truncated, edited out of form or of another schema."""
    try:
        content = path.read_bytes()
        raw: Any = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except FileNotFoundError:
        raise MisuseError(f"There is no results file at {path}.") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise MisuseError(f"{path} can't be read: {error}.") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise MisuseError(f"{path} has schema {schema!r}; this Missile reads {SCHEMA!r}.")
    if isinstance(scenario := raw.get("scenario"), dict):
        scenario.setdefault("overlap", "off")  # results from before launches could overlap
    try:
        return Results.model_validate(raw)
    except ValidationError as error:
        raise MisuseError(f"{path} is not a valid results file: {first_problem(error)}.") from error
