"""Tables of the models' isolation results: LS models down, BE models across, plain and colored memory in each cell."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from missile.bench.isolation.models import RealCell, Room
from missile.bench.isolation.models_results import PairOutcome, RealResults, pair_outcomes

__all__ = ["Grid", "grids_of", "render_real", "render_real_markdown"]


@dataclass(frozen=True, slots=True)
class Grid:
    """One table. cells: by LS model, one text for each of `be`."""

    title: str
    be: tuple[str, ...]
    cells: tuple[tuple[str, tuple[str, ...]], ...]


def grids_of(results: RealResults) -> list[Grid]:
    """LS time against alone on the same SMs, against alone on the whole GPU, and the BE model's rate."""
    pairs = {(pair.ls, pair.be, pair.colored): pair for pair in pair_outcomes(results)}
    models = tuple(dict.fromkeys(ls for ls, _, _ in pairs)), tuple(dict.fromkeys(be for _, be, _ in pairs))

    def grid(title: str, of: Callable[[PairOutcome], float | None], form: str) -> Grid:
        def cell(ls: str, be: str) -> str:
            texts = []
            for colored in (False, True):
                pair = pairs.get((ls, be, colored))
                value = of(pair) if pair else None
                texts.append("-" if value is None else format(value, form))
            return " > ".join(texts)

        return Grid(title, models[1], tuple((ls, tuple(cell(ls, be) for be in models[1])) for ls in models[0]))

    sides = f"{results.ls_sms} + {results.be_sms} SMs"
    return [
        grid(f"LS time over alone on the same SMs ({sides})", lambda pair: pair.of_share, ".2f"),
        grid("LS time over alone on the whole GPU, plain memory", lambda pair: pair.of_whole, ".2f"),
        grid("BE rate, of alone on the whole GPU, plain memory", lambda pair: pair.be_of_whole, ".0%"),
    ]


def _head(results: RealResults) -> str:
    what = " (simulated)" if results.simulated else ""
    unfinished = ", unfinished" if results.interrupted else ""
    return f"Isolation of models on {results.gpu}{what}{unfinished}: plain > colored memory"


def _alone(results: RealResults) -> list[tuple[str, ...]]:
    """Medians of the LS models alone, us: whole GPU and share, plain and colored."""
    took = {run.cell: run.ls_ns for run in results.runs if run.ls and not run.be}
    order = [(Room.WHOLE, False), (Room.SHARE, False), (Room.SHARE, True), (Room.WHOLE, True)]
    return [
        (name, *(_median(took.get(RealCell(name, "", room, colored), ())) for room, colored in order))
        for name in dict.fromkeys(cell.ls for cell in took)
    ]


def _median(values: tuple[int, ...]) -> str:
    return f"{statistics.median(values) / 1e3:.0f}" if values else "-"


_ALONE_TITLE = "LS alone, us"
_ALONE_HEAD = ("model", "whole GPU", "share", "share, colored", "whole GPU, colored")


def render_real(results: RealResults) -> Group:
    """The terminal's tables."""
    tables = [Text(_head(results))]
    alone = Table(*_ALONE_HEAD, title=_ALONE_TITLE, title_justify="left")
    for row in _alone(results):
        alone.add_row(*row)
    grids = []
    for grid in grids_of(results):
        table = Table("", *grid.be, title=grid.title, title_justify="left")
        for ls, cells in grid.cells:
            table.add_row(ls, *cells)
        grids.append(table)
    return Group(*tables, alone, *grids, *map(Text, (*results.notes, *_errors(results))))


def render_real_markdown(results: RealResults) -> str:
    """The same tables for a page."""
    lines = [f"# {_head(results)}", ""]
    lines += [f"**{_ALONE_TITLE}**", "", *_rows(_ALONE_HEAD, _alone(results)), ""]
    for grid in grids_of(results):
        rows = [(ls, *cells) for ls, cells in grid.cells]
        lines += [f"**{grid.title}**", "", *_rows(("", *grid.be), rows), ""]
    lines += [f"- {note}" for note in (*results.notes, *_errors(results))]
    return "\n".join(lines) + "\n"


def _rows(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _errors(results: RealResults) -> list[str]:
    return list(dict.fromkeys(run.error for run in results.runs if run.error))
