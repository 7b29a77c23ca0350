"""What the bench and the worker processes of the `mps` policy say to each other. Both ends are of one installation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from missile.compiler.objective import Objective
from missile.runtime.records import RunRecord
from missile.runtime.tenant import Tenant

__all__ = ["Armed", "Done", "Failed", "Go", "Load", "Ready", "Serve"]


@dataclass(frozen=True, slots=True)
class Load:
    """Parent to worker, first of all."""

    device: str
    seed: int
    tenant: Tenant
    cache: Path | None
    overlap: Objective | None = Objective.ALONE


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is on the GPU, of which this process sees `sms` SMs."""

    sms: int


@dataclass(frozen=True, slots=True)
class Serve:
    """Parent to worker: get a run ready. tenant: the loaded one, perhaps with other arrivals."""

    tenant: Tenant
    seed: int
    duration_ns: int
    warmup_ns: int


@dataclass(frozen=True, slots=True)
class Armed:
    """All is ready; the worker waits for `Go`."""


@dataclass(frozen=True, slots=True)
class Go:
    """Start at `at_ns` on the monotonic clock, which all processes of a host share; None: don't."""

    at_ns: int | None


@dataclass(frozen=True, slots=True)
class Done:
    record: RunRecord


@dataclass(frozen=True, slots=True)
class Failed:
    """An error, by its class's name and its sentence. The worker ends."""

    kind: str
    text: str
