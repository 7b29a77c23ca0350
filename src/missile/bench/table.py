"""The bench's answer as tables for a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from missile.bench.cold import cold_starts
from missile.bench.results import Results
from missile.bench.summary import Spread, Summary

__all__ = ["format_share", "render_table", "three_digits"]


def three_digits(value: float | None) -> str:
    """`value` to about three significant digits; "–" where there is none (too few samples to say)."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def format_share(value: float | None) -> str:
    """A share as a percentage. Never rounded up to 100%: 99.96% is not all."""
    if value is None:
        return "–"
    percent = value * 100
    return f"{percent:.0f}%" if percent in (0, 100) or percent > 100 else f"{min(percent, 99.9):.1f}%"


def render_table(results: Results, summary: Summary) -> RenderableType:
    """LS latencies and BE throughput, policy by policy, with each tenant's solo figures on top."""
    return Group(
        Text.assemble(("simulated " if results.simulated else "", "bold yellow"), (_title(results), "bold")),
        Text(""),
        _ls_table(summary),
        Text(""),
        _be_table(summary),
        *_cold_table(results),
        *_remarks(results),
    )


def _title(results: Results) -> str:
    scenario = results.scenario
    return f"{results.gpu} · scenario {scenario.name} · {scenario.repeats} × {scenario.duration_s:g} s per policy"


def _ls_table(summary: Summary) -> Table:
    table = _table("LS: arrival to output, ms", "Policy", "Tenant")
    for heading in ("p50", "p95", "p99", "p99 range", "× solo", "SLO met"):
        table.add_column(heading, justify="right", no_wrap=True)
    for policy, index, row in summary.ls_rows():
        if index == 0:
            table.add_section()
        table.add_row(
            policy if index == 0 else "",
            row.tenant,
            three_digits(row.p50),
            three_digits(row.p95),
            Text(three_digits(row.p99.value if row.p99 else None), "bold"),
            _range(row.p99),
            three_digits(row.over_solo) if row.over_solo else "",
            format_share(row.attainment),
        )
    return table


def _be_table(summary: Summary) -> Table:
    table = _table("BE: finished requests", "Policy", "Tenant")
    for heading in ("per s", "range", "of solo"):
        table.add_column(heading, justify="right", no_wrap=True)
    for policy, index, row in summary.be_rows():
        if index == 0:
            table.add_section()
        table.add_row(
            policy if index == 0 else "",
            row.tenant,
            three_digits(row.rate.value),
            _range(row.rate),
            Text(format_share(row.share.value), "bold") if row.share else "",
        )
    return table


def _cold_table(results: Results) -> list[RenderableType]:
    found = cold_starts(results)
    if not found:
        return []
    table = _table("Weights from the host: cold starts, ms", "Policy", "Tenant")
    for heading in ("starts", "median", "worst", "link alone", "× link"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = ""
    for row in found:
        if row.policy != last:
            table.add_section()
        table.add_row(
            row.policy if row.policy != last else "",
            row.tenant,
            str(row.starts),
            Text(three_digits(row.median), "bold"),
            three_digits(row.worst),
            three_digits(row.ideal),
            three_digits(row.median / row.ideal),
        )
        last = row.policy
    return [Text(""), table]


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in headings:
        table.add_column(heading, overflow="fold")  # names give way where a terminal is narrow, figures never
    return table


def _range(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{three_digits(spread.low)}–{three_digits(spread.high)}"


def _remarks(results: Results) -> list[Text]:
    """What a reader must know before believing the numbers, one line each."""
    lines = [Text(note, "yellow") for note in results.notes]
    if results.simulated:
        lines.append(Text("Simulated: a model of this GPU ran, not the GPU.", "yellow"))
    told = " ".join(results.notes)
    failures = {name: error for name, error in results.failures.items() if error not in told}
    lines += [Text(f"Tenant {name} stopped early: {error}", "red") for name, error in failures.items()]
    return [Text(""), *lines] if lines else []
