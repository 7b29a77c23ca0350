"""A scenario with weights on the host from its file to its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from missile.bench.cold import cold_starts
from missile.bench.report import render_report
from missile.bench.results import Results, read_results, write_results
from missile.bench.run import Bench, run_all
from missile.bench.scenario import parse_scenario
from missile.bench.summary import summarize
from missile.bench.table import render_table
from missile.bench.testbed import open_testbed
from missile.compiler.bind import BoundModel
from missile.compiler.preemptible import control_of

SCENARIO = """
device = "sim:h100"
duration_s = 0.3
policies = ["streams", "missile", "missile:colors=on", "mps"]
swap_mb = 128
[[tenant]]
name = "one"
class = "BE"
model = "mobilebert"
residency = "host"
arrivals = { kind = "closed" }
[[tenant]]
name = "two"
class = "BE"
model = "resnet152"
residency = "host"
arrivals = { kind = "closed" }
"""


@pytest.fixture(scope="module")
def results() -> Results:
    scenario = parse_scenario(SCENARIO)
    with open_testbed(scenario) as testbed:
        found, stopped = run_all(Bench(scenario, testbed), lambda *_: None)
    assert stopped is None
    return found


def test_cold_starts_are_in_the_file_and_in_both_tables(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path / "results.json")
    again = read_results(tmp_path / "results.json")
    rows = cold_starts(again)
    assert rows == cold_starts(results)
    assert [(row.policy, row.tenant) for row in rows] == [
        ("streams", "one"),
        ("streams", "two"),
        ("missile", "one"),
        ("missile", "two"),
    ]
    for row in rows:
        assert row.starts >= 2
        assert row.worst >= row.median >= 0.97 * row.ideal > 0
        assert row.nbytes >= 45_000_000
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_table(again, summarize(again)))
    text = console.export_text()
    assert "Weights from the host" in text
    assert "Weights from the host" in render_report(again, summarize(again))


def test_policies_that_cannot_have_them_are_left_out_and_say_why(results: Results) -> None:
    notes = [note for note in results.notes if "keeps its weights on the host" in note]
    assert len(notes) == 2
    assert any("mps" in note and "processes" in note for note in notes)
    assert any("missile:colors=on" in note and "colored memory" in note for note in notes)


def test_missile_stops_them_like_others_and_their_weights_are_there_once() -> None:
    ls = (
        '[[tenant]]\nname = "ls"\nclass = "LS"\nmodel = "resnet34"\nslo_ms = 3\n'
        'arrivals = { kind = "poisson", rate_per_s = 300 }\n'
    )
    scenario = parse_scenario(SCENARIO + ls)
    with open_testbed(scenario) as testbed:
        free = testbed.gpu.memory_free()
        variant = testbed._variants.of("missile")
        assert variant is not None
        assert [loaded.tenant.name for loaded in variant.roster.tenants] == ["one", "two"]
        assert not variant.refused
        for mine, plain in zip(variant.roster.tenants, testbed.roster.tenants, strict=False):
            assert isinstance(mine.model, BoundModel)
            assert control_of(mine.model)
            assert mine.weights is plain.weights
        assert free - testbed.gpu.memory_free() < 32 << 20  # marks, no weights
        for policy in ("missile", "streams", "missile"):
            record = testbed.shared(scenario.tenants, policy, seed=1, duration_ns=300_000_000, warmup_ns=0)
            assert not record.fault
            assert all(len(tenant.done) > 1 for tenant in record.tenants)


def test_an_ls_request_does_not_cost_others_the_weights_that_are_on_their_way() -> None:
    """LS requests come ten times as often as a model's weights take to come: stopped each time, none would ever finish."""
    text = SCENARIO.replace("mobilebert", "decoder_1b").replace("resnet152", "bert_large").replace("= 128", "= 2304")
    ls = (
        '[[tenant]]\nname = "ls"\nclass = "LS"\nmodel = "resnet34"\nslo_ms = 3\n'
        'arrivals = { kind = "poisson", rate_per_s = 300 }\n'
    )
    scenario = parse_scenario(text + ls)
    with open_testbed(scenario) as testbed:
        record = testbed.shared(scenario.tenants, "missile", seed=1, duration_ns=500_000_000, warmup_ns=0)
        one, two, _ = record.tenants
        assert min(len(one.done), len(two.done)) >= 3
        assert len(one.cold) <= len(one.done) + 2  # each comes once for a request


def test_without_such_tenants_nothing_is_said(toy_results: Any) -> None:
    assert cold_starts(toy_results) == []
    assert "Weights from the host" not in render_report(toy_results, summarize(toy_results))
