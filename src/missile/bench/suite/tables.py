"""A suite's tables, each once: for the page as HTML, for the repository as Markdown, for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from rich import box
from rich.table import Table as RichTable

from missile.bench.fidelity import Comparison
from missile.bench.suite.cells import family
from missile.bench.suite.claims import Claim
from missile.bench.suite.summary import CellSummary, FamilySummary, Point, geometric_mean
from missile.bench.table import format_share, three_digits

__all__ = [
    "Table",
    "best_table",
    "claim_table",
    "family_table",
    "prediction_table",
    "setting_table",
    "to_html",
    "to_markdown",
    "to_terminal",
]


@dataclass(frozen=True, slots=True)
class Table:
    """`texts` leading columns are text, the others figures. An empty first cell continues the row above."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    caption: str = ""


def family_table(families: Sequence[FamilySummary]) -> Table:
    """Every policy at its best setting, over all cells."""
    heads = (
        "policy",
        "cells",
        "99% met in",
        "least met",
        "LS p99 / solo, median",
        "worst",
        "BE / solo, mean",
    )
    rows = tuple(
        (
            row.family,
            str(row.cells),
            str(row.attained),
            format_share(row.lowest_attainment),
            three_digits(row.p99_median),
            three_digits(row.p99_worst),
            format_share(row.be_mean),
        )
        for row in families
    )
    caption = (
        "Each policy at its best setting of each cell. BE: shares of solo, summed over BE tenants; geometric mean."
    )
    return Table(heads, rows, 1, caption)


def best_table(cells: Sequence[CellSummary]) -> Table:
    """Every cell, every family at its best setting there."""
    heads = (
        "cell",
        "policy at its best setting",
        "SLO met",
        "LS p99 / solo",
        "repeats",
        "BE / solo",
        "time free of LS",
    )
    rows = []
    for cell in cells:
        for index, point in enumerate(cell.best.values()):
            free = format_share(cell.free) if index == 0 else ""
            rows.append((cell.cell.name if index == 0 else "", point.policy, *_figures(point), free))
    caption = (
        "SLO met: of the LS tenant that met it least often. Time free of LS: without any LS request, as these take alone: "
        "what BE can have under a policy that never runs it beside them."
    )
    return Table(heads, tuple(rows), 2, caption)


def setting_table(cells: Sequence[CellSummary]) -> Table:
    """Every cell, every setting: the points of the curves."""
    heads = ("cell", "policy", "SLO met", "LS p99 / solo", "repeats", "BE / solo")
    rows = []
    for cell in cells:
        points = [point for some in cell.points.values() for point in some]
        rows += [(cell.cell.name if i == 0 else "", p.policy, *_figures(p)) for i, p in enumerate(points)]
    return Table(heads, tuple(rows), 2)


def _figures(point: Point) -> tuple[str, str, str, str]:
    p99 = point.p99
    spread = f"{three_digits(p99.low)}–{three_digits(p99.high)}" if p99 and p99.low < p99.high else ""
    return format_share(point.attainment), three_digits(p99.value if p99 else None), spread, format_share(point.be)


def claim_table(claims: Sequence[Claim]) -> Table:
    verdicts = {True: "holds", False: "does not hold", None: "not known"}
    return Table(("claim", "", "found"), tuple((c.title, verdicts[c.holds], c.found) for c in claims), 3)


def prediction_table(comparisons: Iterable[Comparison]) -> Table:
    """The simulator's error by family: at how many settings in cells LS p99 and BE rate are within 20% of the measured."""
    groups: dict[str, dict[str, list[Comparison]]] = {}
    for one in comparisons:
        if one.figure in ("p99", "rate"):
            groups.setdefault(family(one.policy), {"p99": [], "rate": []})[one.figure].append(one)
    rows = tuple((policy, *_closeness(found["p99"]), *_closeness(found["rate"])) for policy, found in groups.items())
    heads = (
        "policy",
        "LS p99: n",
        "within 20%",
        "simulated / measured",
        "BE rate: n",
        "within 20%",
        "simulated / measured",
    )
    return Table(heads, rows, 1, "n: settings in cells. Simulated / measured: geometric means.")


def _closeness(found: Sequence[Comparison]) -> tuple[str, str, str]:
    close = sum(one.close for one in found) / len(found) if found else None
    return str(len(found)), format_share(close), three_digits(geometric_mean([one.ratio for one in found]))


def to_terminal(table: Table) -> RichTable:
    shown = RichTable(title=table.caption or None, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for index, head in enumerate(table.heads):
        # Policies whose names were cut off would be alike; claims are sentences, which wrap.
        names = index == 0 and table.texts == 1
        shown.add_column(head, justify="left" if index < table.texts else "right", no_wrap=names)
    for row in table.rows:
        shown.add_row(*row)
    return shown


def to_html(table: Table) -> str:
    """ "" where the table has no rows."""
    if not table.rows:
        return ""

    def cell(index: int, content: str) -> str:
        kind = "text wrap" if index == 2 and table.texts == 3 else "text" if index < table.texts else ""
        return f'<td class="{kind}">{escape(content)}</td>'

    head = "".join(
        f'<th scope="col" class="{"text" if index < table.texts else ""}">{escape(name)}</th>'
        for index, name in enumerate(table.heads)
    )
    body = "".join(
        f'<tr class="{"first" if row[0] else ""}">{"".join(cell(*numbered) for numbered in enumerate(row))}</tr>'
        for row in table.rows
    )
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def to_markdown(table: Table) -> str:
    lines = [table.caption, ""] if table.caption else []
    lines.append(f"| {' | '.join(table.heads)} |")
    lines.append("|" + "".join(" --- |" if index < table.texts else " ---: |" for index in range(len(table.heads))))
    above = ""
    for row in table.rows:
        above = row[0] or above  # Markdown tables are read by line: say it again
        lines.append(f"| {' | '.join((above, *row[1:]))} |")
    return "\n".join(lines) + "\n"
