"""What a suite keeps in its folder: `suite.json` (how it is run), and a results file for each cell that is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from missile.bench.results import Results, read_results, write_results
from missile.bench.scenario import Scenario
from missile.bench.suite.cells import SETTINGS, Cell
from missile.errors import MisuseError
from missile.files import write_whole
from missile.gpu.interface import GpuInfo
from missile.validation import first_problem

__all__ = ["SCHEMA", "SuiteFolder", "SuiteSettings", "SuiteState"]

SCHEMA = "missile-suite/1"
_STATE = "suite.json"
# Those that say nothing about what was run. The device is checked by the GPU's name.
_FREE = frozenset({"name", "description", "device"})


class SuiteSettings(BaseModel):
    """How every cell is run. Times in seconds; policies as families or single settings, in order. most_s: no run is longer,
    also where a cell's slowest tenants would need that; None: as long as they need."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    duration_s: float = Field(1.0, gt=0, le=3600)
    warmup_s: float = Field(0.1, ge=0)
    repeats: int = Field(3, ge=1, le=100)
    seed: int = Field(1, ge=0, lt=2**31)
    policies: tuple[str, ...] = Field(tuple(SETTINGS), min_length=1)
    most_s: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _warmup_fits(self) -> SuiteSettings:
        if self.warmup_s >= self.duration_s:
            raise ValueError(f"warmup_s ({self.warmup_s:g}) must be shorter than duration_s ({self.duration_s:g})")
        if self.most_s is not None and self.most_s < self.duration_s:
            raise ValueError(f"most_s ({self.most_s:g}) must be at least duration_s ({self.duration_s:g})")
        return self

    @classmethod
    def given(cls, fields: dict[str, Any]) -> SuiteSettings:
        """From the command line; a short duration takes a short warm-up with it. MisuseError names the first wrong field."""
        if "duration_s" in fields:
            fields = {"warmup_s": min(0.1, max(fields["duration_s"], 0.0) / 4), **fields}
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise MisuseError(f"The suite's settings: {first_problem(error)}.") from error


class SuiteState(BaseModel):
    """capacity: requests/s of LS models alone, by name, as first measured: later runs add to them and change none.
    chosen: how the cells, and the settings, were chosen where it was not all of them, a sentence each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_name: str = Field(SCHEMA, alias="schema")
    suite: str
    gpu: str
    simulated: bool
    settings: SuiteSettings
    capacity: dict[str, float] = Field(default_factory=dict)
    chosen: tuple[str, ...] = ()


class SuiteFolder:
    """The folder of one suite on one GPU. What is in it is never overwritten by another suite, GPU or settings."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def state(self) -> SuiteState | None:
        """What it was made with; None where nothing is there. MisuseError for a broken file."""
        path = self.path / _STATE
        try:
            return SuiteState.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise MisuseError(f"{path} is not a valid suite file: {first_problem(error)}.") from error
        except (OSError, ValueError) as error:
            raise MisuseError(f"{path} can't be read: {error}.") from error

    def keep_state(self, state: SuiteState) -> None:
        write_whole(self.path / _STATE, state.model_dump_json(by_alias=True, indent=1) + "\n")

    def require(self, suite: str, gpu: GpuInfo | None, given: dict[str, Any]) -> None:
        """MisuseError when the folder was made for another suite or GPU, or with other settings than those `given`."""
        if (state := self.state()) is None:
            return
        other = "choose another folder with -o"
        if state.suite != suite:
            raise MisuseError(f"{self.path} holds the suite {state.suite!r}, not {suite!r}: {other}.")
        if gpu is not None and (state.gpu, state.simulated) != (gpu.name, gpu.simulated):
            had, here = (
                f"{'a simulated ' if simulated else ''}{name}"
                for name, simulated in ((state.gpu, state.simulated), (gpu.name, gpu.simulated))
            )
            raise MisuseError(f"{self.path} holds results of {had}, and this is {here}: {other}.")
        for name, value in given.items():
            if (had := getattr(state.settings, name)) != value:
                raise MisuseError(f"{self.path} was made with {name} = {_said(had)}, not {_said(value)}: {other}.")

    def cell_path(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.name}.json.gz"

    def prediction_path(self, cell: Cell) -> Path:
        """Where the simulator's results of a measured cell lie."""
        return self.path / "simulated" / f"{cell.name}.json.gz"

    def keep(self, results: Results, path: Path) -> None:
        write_results(results, path)

    def read(self, cells: Sequence[Cell], *, simulated: bool = False) -> dict[str, Results]:
        """The results that are there, by cell."""
        paths = {cell.name: self.prediction_path(cell) if simulated else self.cell_path(cell) for cell in cells}
        return {name: read_results(path) for name, path in paths.items() if path.is_file()}

    def done(self, cell: Cell, scenario: Scenario, *, redo: bool = False) -> bool:
        """Whether `cell` is there as `scenario` has it. Made otherwise: no with `redo`, else MisuseError."""
        path = self.cell_path(cell)
        if not path.is_file():
            return False
        results = read_results(path)
        if results.interrupted:
            return False
        if changed := _changed(results.scenario, scenario):
            if redo:
                return False
            raise MisuseError(
                f"{path} was made with another {changed}: --redo makes such cells again, or choose another folder with -o."
            )
        return True


def _changed(old: Scenario, new: Scenario) -> str:
    """The first field in which two scenarios ask for different runs, "" where there is none."""
    before, after = (scenario.model_dump(mode="json", by_alias=True) for scenario in (old, new))
    return next((name for name in after if name not in _FREE and before.get(name) != after[name]), "")


def _said(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else f"{value}"
