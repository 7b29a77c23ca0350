"""`models.json`: every run of the models' isolation benchmark, raw, and the ratios that follow."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from missile.bench.isolation.models import RealCell, RealSample, Room
from missile.bench.isolation.record import Record, Row
from missile.compiler.objective import OverlapChoice

__all__ = ["PairOutcome", "RealResults", "RealRun", "pair_outcomes"]


class RealRun(Row):
    """A cell (`models.RealCell`) with its sample (`models.RealSample`)."""

    ls: str
    be: str
    room: Room
    colored: bool
    ls_ns: tuple[int, ...] = ()
    be_ns: tuple[int, ...] = ()
    be_per_s: float = 0.0
    error: str = ""

    @classmethod
    def from_sample(cls, cell: RealCell, sample: RealSample) -> RealRun:
        return cls(
            **{name: getattr(cell, name) for name in RealCell.__slots__},
            **{name: getattr(sample, name) for name in RealSample.__slots__},
        )

    @property
    def cell(self) -> RealCell:
        return RealCell(self.ls, self.be, self.room, self.colored)


class RealResults(Record):
    """One run of the benchmark. ls_sms, be_sms: SMs of the two sides. ls_colors, be_colors: of the channel map's.

    notes: what a reader has to know (weights that are stand-ins, say). overlap: of LS models' launches; off in files
    from before they could.
    """

    rows: ClassVar[str] = "runs"
    derived: ClassVar[str] = "pairs"

    schema_: Literal["missile-isolation-models/1"] = Field(default="missile-isolation-models/1", alias="schema")
    ls_sms: int
    be_sms: int
    ls_colors: tuple[int, ...]
    be_colors: tuple[int, ...]
    colors: tuple[tuple[int, ...], ...]
    duration_s: float
    overlap: OverlapChoice = OverlapChoice.OFF
    runs: tuple[RealRun, ...] = ()
    notes: tuple[str, ...] = ()


class PairOutcome(Row):
    """One pair, plain or colored. Times are medians, ns; None where a run is missing.

    of_share: service time over the LS model's alone on the same SMs in the same memory; of_whole: over its plain time alone
    on the whole GPU, which is what a user compares with. p99_of_share: the same of the 99th percentiles. be_of_share: the
    BE model's rate over its own alone on the same SMs in the same memory; be_of_whole: over its plain rate alone on the GPU.
    """

    ls: str
    be: str
    colored: bool
    ls_ns: float | None
    of_share: float | None
    p99_of_share: float | None
    of_whole: float | None
    be_per_s: float | None
    be_of_share: float | None
    be_of_whole: float | None
    error: str = ""


def pair_outcomes(results: RealResults) -> list[PairOutcome]:
    """What follows from the runs, in their order; pairs only."""
    by_cell = {run.cell: run for run in results.runs}
    return [_pair(run, by_cell) for run in results.runs if run.ls and run.be]


def _pair(run: RealRun, runs: dict[RealCell, RealRun]) -> PairOutcome:
    alone = runs.get(RealCell(run.ls, "", Room.SHARE, run.colored))
    whole = runs.get(RealCell(run.ls, "", Room.WHOLE, False))
    be_alone = runs.get(RealCell("", run.be, Room.SHARE, run.colored))
    be_whole = runs.get(RealCell("", run.be, Room.WHOLE, False))
    took = _percentile(run, 50)
    return PairOutcome(
        ls=run.ls,
        be=run.be,
        colored=run.colored,
        ls_ns=took,
        of_share=_ratio(took, _percentile(alone, 50)),
        p99_of_share=_ratio(_percentile(run, 99), _percentile(alone, 99)),
        of_whole=_ratio(took, _percentile(whole, 50)),
        be_per_s=run.be_per_s or None,
        be_of_share=_ratio(run.be_per_s, be_alone.be_per_s if be_alone else None),
        be_of_whole=_ratio(run.be_per_s, be_whole.be_per_s if be_whole else None),
        error=run.error,
    )


def _percentile(run: RealRun | None, percent: float) -> float | None:
    return float(np.percentile(run.ls_ns, percent)) if run is not None and run.ls_ns else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return round(value / base, 4) if value and base else None
