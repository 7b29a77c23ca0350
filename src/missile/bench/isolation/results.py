"""`isolation.json`: every cell's raw samples, what they were taken on, and the numbers that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from missile.bench.isolation.lab import Sample
from missile.bench.isolation.plan import Cell, Scheme
from missile.bench.isolation.record import Record, Row
from missile.gpu.interface import Access

__all__ = [
    "IsolationResults",
    "MeasuredCell",
    "MeasuredScheme",
    "Outcome",
    "measured_schemes",
    "outcomes",
]


class MeasuredScheme(Row):
    """A scheme, and what share of the GPU's slices each side's colors have."""

    name: str
    victim: tuple[int, ...]
    aggressor: tuple[int, ...]
    victim_share: float
    aggressor_share: float

    @property
    def disjoint(self) -> bool:
        return Scheme(self.name, self.victim, self.aggressor).disjoint


class MeasuredCell(Row):
    """A cell of the plan (`plan.Cell`) with its sample (`lab.Sample`)."""

    scheme: str
    victim_sms: int
    aggressor_sms: int
    victim_bytes: int
    aggressor_bytes: int
    victim_access: Access | None
    aggressor_access: Access | None
    victim_ns: tuple[float, ...] = ()
    passes: int = 1
    victim_bytes_per_s: float = 0.0
    aggressor_bytes_per_s: float = 0.0

    @classmethod
    def from_sample(cls, cell: Cell, sample: Sample) -> MeasuredCell:
        return cls(
            **{name: getattr(cell, name) for name in Cell.__slots__},
            victim_ns=tuple(round(ns, 1) for ns in sample.victim_ns),
            passes=sample.passes,
            victim_bytes_per_s=round(sample.victim_bytes_per_s),
            aggressor_bytes_per_s=round(sample.aggressor_bytes_per_s),
        )

    @property
    def cell(self) -> Cell:
        return Cell(**{name: getattr(self, name) for name in Cell.__slots__})


class IsolationResults(Record):
    """One run of the micro-benchmark. channel_map: whose map, its colors (slices of each), seconds and witnesses' words."""

    rows: ClassVar[str] = "cells"
    derived: ClassVar[str] = "outcomes"

    schema_: Literal["missile-isolation/1"] = Field(default="missile-isolation/1", alias="schema")
    channel_map: dict[str, Any]
    schemes: tuple[MeasuredScheme, ...]
    cells: tuple[MeasuredCell, ...] = ()


class Outcome(Row):
    """One pair of sides. slowdown: the victim's median time over its median alone with the same colors.

    aggressor_kept: its rate over its share (by slice count) of what it moves alone on all colors with the same SMs.
    aggressor_of_solo: its rate over what it moves alone with the same colors. Rates in bytes/s; None: not measured.
    """

    scheme: str
    disjoint: bool
    victim_sms: int
    aggressor_sms: int
    victim_bytes: int
    aggressor_bytes: int
    victim_access: Access
    aggressor_access: Access
    slowdown: float | None
    victim_solo_ns: float | None
    aggressor_rate: float
    aggressor_kept: float | None
    aggressor_of_solo: float | None


def outcomes(results: IsolationResults) -> list[Outcome]:
    """What follows from the cells, in their order; pairs only."""
    by_cell = {measured.cell: measured for measured in results.cells}
    schemes = {scheme.name: scheme for scheme in results.schemes}
    uncolored = next((s.name for s in results.schemes if s.victim_share == s.aggressor_share == 1.0), None)
    found = []
    for measured in results.cells:
        cell, scheme = measured.cell, schemes[measured.scheme]
        if cell.victim_access is None or cell.aggressor_access is None:
            continue
        alone = by_cell.get(cell.victim_alone)
        other = by_cell.get(cell.aggressor_alone)
        everything = next(
            (
                one
                for one in results.cells
                if one.scheme == uncolored
                and one.cell.aggressor_alone == one.cell
                and (one.aggressor_sms, one.aggressor_bytes, one.aggressor_access)
                == (cell.aggressor_sms, cell.aggressor_bytes, cell.aggressor_access)
            ),
            None,
        )
        rate = measured.aggressor_bytes_per_s
        # One cell's passes differ from another's only with the working set, which both share.
        solo = float(np.median(alone.victim_ns)) if alone else None
        found.append(
            Outcome(
                scheme=scheme.name,
                disjoint=scheme.disjoint,
                victim_sms=cell.victim_sms,
                aggressor_sms=cell.aggressor_sms,
                victim_bytes=cell.victim_bytes,
                aggressor_bytes=cell.aggressor_bytes,
                victim_access=cell.victim_access,
                aggressor_access=cell.aggressor_access,
                slowdown=round(float(np.median(measured.victim_ns)) / solo, 4) if solo else None,
                victim_solo_ns=solo,
                aggressor_rate=rate,
                aggressor_kept=_ratio(rate, everything, scheme.aggressor_share),
                aggressor_of_solo=_ratio(rate, other, 1.0),
            )
        )
    return found


def _ratio(rate: float, alone: MeasuredCell | None, share: float) -> float | None:
    if alone is None or not alone.aggressor_bytes_per_s:
        return None
    return round(rate / (alone.aggressor_bytes_per_s * share), 4)


def measured_schemes(
    schemes: Sequence[Scheme], colors: Sequence[Sequence[int]], slices: int
) -> tuple[MeasuredScheme, ...]:
    """`schemes` with the shares that `colors` (slices of each) give them."""

    def share(of: Sequence[int]) -> float:
        return sum(len(colors[color]) for color in of) / slices

    return tuple(
        MeasuredScheme(
            name=s.name,
            victim=s.victim,
            aggressor=s.aggressor,
            victim_share=share(s.victim),
            aggressor_share=share(s.aggressor),
        )
        for s in schemes
    )
