"""The report and the table: complete, self-contained and well formed, for whole and for broken-off runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from missile.bench.charts import bars, distribution, timeline, tradeoff
from missile.bench.report import render_report, write_report
from missile.bench.results import Results
from missile.bench.summary import summarize
from missile.bench.svg import linear_axis, log_axis, nines_axis
from missile.bench.table import render_table

VOID = {"meta", "br", "link", "img"}


class _Checker(HTMLParser):
    """Collects text and attributes, and fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def _read(html: str) -> _Checker:
    checker = _Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def test_the_report_stands_alone_and_names_everything(toy_results: Results, tmp_path: Path) -> None:
    path = write_report(toy_results, summarize(toy_results), tmp_path / "out" / "report.html")
    html = path.read_text(encoding="utf-8")
    page = _read(html)
    assert page.links == []
    assert "url(" not in html
    assert "@import" not in html
    assert "<script" not in html
    text = " ".join(page.words)
    for word in ("detect", "rank", "reindex", "decode", "temporal", "streams", "priority", "resnet34", "H100"):
        assert word in text
    assert "Policy partition was left out" in text
    assert "nan" not in html.lower().replace("tenant", "")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_simulated_results_say_so_in_every_section(toy_results: Results) -> None:
    html = render_report(toy_results, summarize(toy_results))
    headings = re.findall(r"<h[12]>.*?</h[12]>", html)
    measured = [heading for heading in headings if not re.search("policies|Method|Environment", heading)]
    assert len(measured) >= 7
    assert all("simulated" in heading for heading in measured)
    hardware = toy_results.model_copy(update={"simulated": False})
    html = render_report(hardware, summarize(hardware))
    assert ">simulated<" not in html
    assert "Simulated." not in html
    assert "measured on hardware" in html


def test_foreign_text_is_escaped(toy_results: Results) -> None:
    nasty = toy_results.model_copy(update={"gpu": "<script>alert(1)</script>", "notes": ["a < b & c"]})
    html = render_report(nasty, summarize(nasty))
    _read(html)
    assert "<script>" not in html
    assert "a &lt; b &amp; c" in html


@pytest.mark.parametrize("kept", [0, 1, 4, 14, 17])
def test_a_broken_off_run_still_gives_table_and_report(toy_results: Results, kept: int) -> None:
    part = toy_results.model_copy(update={"runs": toy_results.runs[:kept], "interrupted": True})
    summary = summarize(part)
    page = _read(render_report(part, summary))
    assert "Incomplete." in " ".join(page.words)
    Console(file=StringIO(), width=80).print(render_table(part, summary))


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_the_terminal(toy_results: Results, width: int) -> None:
    console = Console(width=width, record=True, file=StringIO())
    console.print(render_table(toy_results, summarize(toy_results)))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    for word in ("simulated", "detect", "reindex", "p99", "SLO met", "of solo", "priority"):
        assert word in text


def test_pictures_are_well_formed_and_have_one_series_for_each_policy(toy_results: Results) -> None:
    summary, tenants = summarize(toy_results), toy_results.tenants
    scatter = tradeoff(summary, toy_results.scenario.policies)
    assert scatter.count("<circle") == len(summary.policies) == 3
    curves = distribution(toy_results, tenants[0])
    assert curves.count("<polyline") == 1 + 3  # alone, and each policy that ran
    run = next(run for run in toy_results.runs if run.policy == "streams")
    window = (500_000_000, 540_000_000)
    lanes = timeline(run, tenants, window)
    inside = [
        (start, end)
        for tenant in run.tenants
        for start, end in zip(tenant.start_ns, tenant.end_ns, strict=True)
        if start <= window[1] and end >= window[0]
    ]
    assert lanes.count('class="run ') == len(inside)
    for markup in (scatter, curves, lanes, bars(summary, tenants)):
        _read(markup)


@given(st.floats(1e-6, 1e6), st.floats(1.0, 1e6), st.lists(st.floats(1e-6, 1e9), min_size=2, max_size=9))
def test_axes_keep_order_and_stay_inside(low: float, ratio: float, values: list[float]) -> None:
    axes = (linear_axis(low * ratio, 10, 300), log_axis(low, low * ratio, 10, 300), nines_axis(3.0, 10, 300))
    for axis in axes:
        places = [axis(value) for value in sorted(values)]
        assert places == sorted(places)
        assert all(10 - 1e-6 <= place <= 300 + 1e-6 for place in places)
        assert all(10 - 1e-6 <= axis(value) <= 300 + 1e-6 for value, _ in axis.ticks)
