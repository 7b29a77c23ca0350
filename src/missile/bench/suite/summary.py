"""What a suite's results say: each policy's points, each family's best setting, and how they compare. Pure.

The best setting of a family in a cell is the one with the highest BE rate among those under which every LS tenant met its
objective in at least 99% of requests; where none did, the one with the highest attainment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from missile.bench.results import Results
from missile.bench.suite.cells import SETTINGS, Cell, family
from missile.bench.summary import PolicySummary, Spread, summarize

__all__ = [
    "ATTAINED",
    "LEFT_OUT",
    "CellSummary",
    "FamilySummary",
    "Point",
    "covered",
    "free_share",
    "geometric_mean",
    "summarize_cells",
    "summarize_families",
]

ATTAINED = 0.99
LEFT_OUT = re.compile(r"Policy (\S+) was left out: (.*)")
"""A note of results about a policy that was asked for and did not run: which, and why."""


@dataclass(frozen=True, slots=True)
class Point:
    """One policy, at one setting, in one cell.

    attainment: of the LS tenant that met its objective least often. p99: LS p99 / solo p99, geometric mean over LS tenants,
    and the smallest and largest of one repeat (None: too few requests). worst: of the most affected LS tenant.
    worst_of_all: the same with requests that were rejected or lost counted as slower than all, None above 1% of them.
    be: BE rate / solo rate, summed over BE tenants. queueing, service: p99 of these parts / solo p99, worst LS tenant.
    """

    policy: str
    attainment: float | None
    p99: Spread | None
    worst: float | None
    be: float | None
    queueing: float | None
    service: float | None
    worst_of_all: float | None = None

    @property
    def attained(self) -> bool:
        return self.attainment is not None and self.attainment >= ATTAINED


@dataclass(frozen=True, slots=True)
class CellSummary:
    """points: by family, in the order in which the settings were run. accepted: whether the planner of `missile` expected
    its plan to hold, None where it did not plan; plan: in the planner's words. free: as `free_share` gives."""

    cell: Cell
    points: Mapping[str, tuple[Point, ...]]
    best: Mapping[str, Point]
    ls: tuple[str, ...]
    be: tuple[str, ...]
    simulated: bool
    notes: tuple[str, ...]
    accepted: bool | None = None
    plan: str = ""
    free: float | None = None

    def left_out(self, policy: str) -> str:
        """Why `policy` was asked for and did not run; "" where it ran or nobody asked."""
        found = (LEFT_OUT.match(note) for note in self.notes)
        return "" if policy in self.best else next((note[2] for note in found if note and note[1] == policy), "")


@dataclass(frozen=True, slots=True)
class FamilySummary:
    """One family at its best settings over `cells` cells. attained: in how many every LS tenant met 99%.

    p99 and be as in `Point`; median, worst (over cells and LS tenants) and geometric mean. None: no cell says.
    """

    family: str
    cells: int
    attained: int
    lowest_attainment: float | None
    p99_median: float | None
    p99_worst: float | None
    be_mean: float | None


def summarize_cells(cells: Iterable[Cell], results: Mapping[str, Results]) -> list[CellSummary]:
    """Those of `cells` that have results, in order."""
    return [_cell(cell, results[cell.name]) for cell in cells if cell.name in results]


def _cell(cell: Cell, results: Results) -> CellSummary:
    summary = summarize(results)
    solo_p99 = {row.tenant: row.p99.value for row in summary.solo_ls if row.p99}
    points: dict[str, list[Point]] = {}
    for policy in summary.policies:
        points.setdefault(family(policy.policy), []).append(_point(policy, solo_p99))
    return CellSummary(
        cell=cell,
        points={name: tuple(some) for name, some in points.items()},
        best={name: _best(some) for name, some in points.items()},
        ls=tuple(t.name for t in results.tenants if t.tenant_class == "LS"),
        be=tuple(t.name for t in results.tenants if t.tenant_class == "BE"),
        simulated=results.simulated,
        notes=tuple(results.notes),
        accepted=None if results.plan is None else bool(results.plan["accepted"]),
        plan="" if results.plan is None else str(results.plan["text"]),
        free=free_share(results),
    )


def free_share(results: Results) -> float | None:
    """Share of the time in which no LS tenant's request is there, each tenant alone on its arrivals: what BE has at most
    under a policy that never runs it beside LS requests. Mean over repeats; None where a run alone is missing.

    From a request's arrival to its output on the host. Tenants that slow each other leave less.
    """
    names = [tenant.name for tenant in results.tenants if tenant.tenant_class == "LS"]
    shares = []
    for repeat in dict.fromkeys(run.repeat for run in results.runs):
        runs = [run for run in results.runs if run.kind == "solo" and run.repeat == repeat and run.whole]
        alone = {run.tenants[0].name: run for run in runs if run.tenants[0].name in names}
        if not names or len(alone) < len(names):
            continue
        spans = [
            span
            for run in alone.values()
            for span in zip(run.tenants[0].arrival_ns, run.tenants[0].done_ns, strict=True)
        ]
        begin, end = runs[0].warmup_ns, runs[0].duration_ns
        shares.append(1.0 - covered(spans, begin, end) / (end - begin))
    return sum(shares) / len(shares) if shares else None


def covered(spans: Iterable[tuple[int, int]], begin: int, end: int) -> int:
    """How much of [begin, end) lies in one of `spans`."""
    total, reached = 0, begin
    for first, last in sorted(spans):
        first, last = max(first, reached), min(last, end)
        if last > first:
            total += last - first
        reached = max(reached, last)
    return total


def _point(policy: PolicySummary, solo_p99: Mapping[str, float]) -> Point:
    met = [row.attainment for row in policy.ls if row.attainment is not None]
    ratios = [row.over_solo for row in policy.ls if row.over_solo is not None]
    of_all = [row.over_solo_of_all for row in policy.ls if row.over_solo_of_all is not None]
    whole = len(ratios) == len(policy.ls) > 0
    spread = None
    if whole:
        rows = [(row.p99, solo_p99[row.tenant]) for row in policy.ls if row.p99]
        spread = Spread(
            geometric_mean(ratios) or 0.0,
            geometric_mean([p99.low / solo for p99, solo in rows]) or 0.0,
            geometric_mean([p99.high / solo for p99, solo in rows]) or 0.0,
        )

    def worst_part(name: str) -> float | None:
        found = [
            value / solo_p99[row.tenant]
            for row in policy.ls
            if (value := getattr(row, name)) is not None and row.tenant in solo_p99
        ]
        return max(found, default=None)

    return Point(
        policy=policy.policy,
        attainment=min(met) if len(met) == len(policy.ls) > 0 else None,
        p99=spread,
        worst=max(ratios) if whole else None,
        be=policy.be_share,
        queueing=worst_part("queueing_p99"),
        service=worst_part("service_p99"),
        worst_of_all=max(of_all) if whole and len(of_all) == len(ratios) else None,
    )


def _best(points: Sequence[Point]) -> Point:
    """By the rule above; of equals, the one with the shorter LS tail."""
    attained = [point for point in points if point.attained]
    if attained:
        return max(attained, key=lambda p: (p.be or 0.0, -_tail(p)))
    return max(points, key=lambda p: (p.attainment or 0.0, -_tail(p), p.be or 0.0))


def _tail(point: Point) -> float:
    return point.p99.value if point.p99 else math.inf


def summarize_families(cells: Sequence[CellSummary]) -> list[FamilySummary]:
    """Every family that was run in some cell, in the order of `SETTINGS`, others after them."""
    present = dict.fromkeys(name for cell in cells for name in cell.best)
    order = [name for name in SETTINGS if name in present] + [name for name in present if name not in SETTINGS]
    return [_family(name, [cell.best[name] for cell in cells if name in cell.best]) for name in order]


def _family(name: str, points: Sequence[Point]) -> FamilySummary:
    met = [point.attainment for point in points if point.attainment is not None]
    tails = [point.p99.value for point in points if point.p99]
    return FamilySummary(
        family=name,
        cells=len(points),
        attained=sum(point.attained for point in points),
        lowest_attainment=min(met, default=None),
        p99_median=float(np.median(tails)) if tails else None,
        p99_worst=max((point.worst for point in points if point.worst is not None), default=None),
        be_mean=geometric_mean([point.be for point in points if point.be is not None]),
    )


def geometric_mean(values: Sequence[float]) -> float | None:
    """0.0 where one of them is; None of none."""
    if not values:
        return None
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0
