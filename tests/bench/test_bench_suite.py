"""The suite: its cells, running and resuming it, and what its results say."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.bench.fidelity import Comparison
from missile.bench.results import Results, read_results
from missile.bench.scenario import Scenario
from missile.bench.suite.cells import BASELINES, SETTINGS, Cell, family, paper_cells, select, settings_of
from missile.bench.suite.claims import check_claims, compare_with_baselines
from missile.bench.suite.files import SuiteFolder, SuiteSettings, SuiteState
from missile.bench.suite.report import SuiteReport, write_suite_report
from missile.bench.suite.run import SuiteRun
from missile.bench.suite.sampling import sample, settings_that_won
from missile.bench.suite.summary import (
    CellSummary,
    Point,
    covered,
    free_share,
    geometric_mean,
    summarize_cells,
    summarize_families,
)
from missile.bench.summary import Spread
from missile.bench.testbed import describe_policy
from missile.cli.suite import _cut
from missile.errors import GpuError, MissileError, MisuseError, UnsupportedError
from missile.workloads.models import MODELS
from missile.workloads.traces import disb_tasks

CAPACITY = dict.fromkeys(MODELS, 1000.0)
RUN = {"duration_s": 1.0, "warmup_s": 0.1, "repeats": 1, "seed": 1, "policies": ("streams",)}


# --- the cells


def test_the_suite_has_every_pair_under_every_load() -> None:
    cells = paper_cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    pairs = {
        (ls, be) for ls, one in MODELS.items() for be, other in MODELS.items() if (one.kind, other.kind) == ("ls", "be")
    }
    for load in ("poisson30", "poisson60", "poisson90", "azure-code", "azure-conv"):
        found = {tuple(name.split("--")[1:]) for name in names if name.startswith(f"{load}--")}
        assert found == pairs
    assert {name for name in names if name.startswith("disb")} == {
        f"disb-{w}" for w in ("A", "B", "C", "D", "E", "REAL")
    }
    assert {model for cell in cells for model in cell.models} == set(MODELS)


def test_every_cell_is_a_scenario_with_its_load() -> None:
    for cell in paper_cells():
        scenario = cell.scenario(CAPACITY, **RUN)
        assert scenario.duration_s - scenario.warmup_s >= cell.least_s
        for tenant in scenario.tenants:
            assert tenant.slo_factor == (1.5 if tenant.latency_sensitive else None)
    by_name = {cell.name: cell for cell in paper_cells()}
    poisson = by_name["poisson30--resnet34--bert_large"].scenario({"resnet34": 812.34}, **RUN)
    assert poisson.tenants[0].arrivals.rate_per_s == 243.7
    disb = by_name["disb-REAL"].scenario(CAPACITY, **RUN)
    assert [t.latency_sensitive for t in disb.tenants] == [task.latency_sensitive for task in disb_tasks("REAL")]


def test_disb_s_cells_are_as_long_as_their_slowest_tenants_need_or_cut() -> None:
    by_name = {cell.name: cell for cell in paper_cells()}
    found = {name: by_name[f"disb-{name}"].duration_s(0.6, 0.1) for name in ("A", "B", "C", "D", "E", "REAL")}
    assert found == {"A": 1.3, "B": 1.1, "C": 1.3, "D": 6.1, "E": 6.1, "REAL": 6.1}
    assert by_name["disb-D"].scenario(CAPACITY, most_s=2.0, **RUN).duration_s == 2.0
    assert by_name["disb-A"].scenario(CAPACITY, most_s=2.0, **RUN).duration_s == 1.3
    cells = [by_name["disb-A"], by_name["disb-D"], by_name["poisson30--resnet34--bert_large"]]
    settings = SuiteSettings.given({"duration_s": 0.6, "most_s": 2.0})
    (said,) = _cut(cells, settings)
    assert "cut to 2 s in cells that would take longer: disb-D (6.1 s)." in said
    assert _cut(cells, SuiteSettings.given({"duration_s": 0.6})) == []
    assert _cut(cells[:1], settings) == []
    with pytest.raises(MisuseError, match="most_s"):
        SuiteSettings.given({"duration_s": 0.6, "most_s": 0.5})


def test_every_setting_is_a_policy() -> None:
    for name, settings in SETTINGS.items():
        for setting in settings:
            assert describe_policy(setting)
            assert family(setting) == name
        assert settings_of(settings) == settings  # none stands for a whole family


def test_settings_are_a_family_s_or_one_of_one_s_own() -> None:
    assert settings_of(["temporal", "partition:ls_share=0.4"]) == ("temporal", "partition:ls_share=0.4")
    assert settings_of(["orion", "orion"]) == SETTINGS["orion"]


def test_cells_are_chosen_by_name_and_model() -> None:
    cells = paper_cells()
    assert [c.name for c in select(cells, ["poisson60*"], ["resnet34", "bert_large"])] == [
        "poisson60--resnet34--bert_large"
    ]
    assert len(select(cells)) == len(cells)
    with pytest.raises(MisuseError, match="'resnet33'"):
        select(cells, models=["resnet33"])
    with pytest.raises(MisuseError, match="poisson60"):
        select(cells, ["gauss*"])


def test_a_sample_is_fair_to_models_and_loads() -> None:
    cells = paper_cells()
    ls = [name for name, info in MODELS.items() if info.kind == "ls"]
    whole = sample(cells, 32)
    for load in ("poisson30", "poisson60", "poisson90"):
        pairs = [cell.name.split("--")[1:] for cell in whole if cell.name.startswith(load)]
        assert sorted(one for one, _ in pairs) == sorted(ls)
        assert {[b for _, b in pairs].count(be) for be in MODELS if MODELS[be].kind == "be"} == {2}
    # Over the loads a LS model meets three BE models.
    for one in ls:
        assert len({cell.name.split("--")[2] for cell in whole if cell.name.split("--")[1:2] == [one]}) >= 3
    assert {"mix", "DISB", "Azure LLM, code", "Azure LLM, conversation"} < {cell.group for cell in whole}
    everything = sample(cells, 42)
    assert len({cell.name for cell in everything}) == 42
    assert everything[:32] == whole
    for count in (0, 43):
        with pytest.raises(MisuseError, match="1 to 42"):
            sample(cells, count)


@given(st.integers(1, 42))
def test_a_short_sample_is_balanced_too(count: int) -> None:
    groups = [cell.group for cell in sample(paper_cells(), count)]
    poisson = [groups.count(f"Poisson, {load}% of capacity") for load in (30, 60, 90)]
    assert max(poisson) - min(poisson) <= 1
    assert sum(poisson) >= min(3 * count // 4, 24)


def test_settings_that_never_won_are_left_out_and_others_stay() -> None:
    cells = [
        summary(
            point("mps:priority=off", 0.5, 9.0, 0.9),
            point("mps:be_share=0.5,priority=on", 0.995, 2.0, 0.4),
            point("streams", 0, 9, 1),
        ),
        summary(
            point("mps:priority=off", 0.995, 2.0, 0.9), point("orion:dur_threshold=2", 0.9, 2.0, 0.4), name="other"
        ),
    ]
    kept = settings_that_won(("mps", "orion", "partition:ls_share=0.4", "missile", "missile:preempt=off"), cells)
    assert kept == (
        "mps:priority=off", "mps:be_share=0.5,priority=on", "orion:dur_threshold=2", "partition:ls_share=0.4",
        "missile", "missile:preempt=off",
    )  # fmt: skip
    assert settings_that_won(("mps:be_share=0.25,priority=on",), cells) == ("mps:be_share=0.25,priority=on",)


# --- running them


def cell(name: str) -> Cell:
    """A cell of the toy testbed's tenants."""
    ls = {"name": "detect", "class": "LS", "model": "resnet34", "slo_factor": 1.5}
    arrivals = {"kind": "poisson", "load": 0.2 if name == "a" else 0.3}
    be = {"name": "reindex", "class": "BE", "model": "densenet161", "arrivals": {"kind": "closed"}}
    return Cell(name, name, ({**ls, "arrivals": arrivals}, be))


CELLS = (cell("a"), cell("b"), cell("c"))


class Suite:
    """A suite of toy cells in a folder, run as often as asked."""

    def __init__(self, path: Path, testbed: Any) -> None:
        self.folder = SuiteFolder(path)
        self.testbed = testbed
        self.said: list[str] = []
        self.loaded: list[list[str]] = []
        self.settings = SuiteSettings(duration_s=1.0, warmup_s=0.1, repeats=2, seed=7, policies=("temporal", "streams"))

    @contextlib.contextmanager
    def open(self, scenario: Scenario) -> Iterator[Any]:
        self.loaded.append([tenant.name for tenant in scenario.tenants])
        yield self.testbed

    def run(self, budget: float | None = None, **more: Any) -> list[str]:
        state = self.folder.state() or SuiteState(
            schema="missile-suite/1", suite="paper", gpu="X", simulated=True, settings=self.settings
        )
        if "settings" in more:
            state = state.model_copy(update={"settings": more.pop("settings")})
        return SuiteRun(self.folder, state, CELLS, self.open, self.said.append, **more).run(budget)


@pytest.fixture
def suite(tmp_path: Path, toy_testbed: Any) -> Suite:
    return Suite(tmp_path / "out", toy_testbed())


def test_a_cell_has_its_solos_and_every_policy_on_the_same_arrivals(suite: Suite) -> None:
    assert suite.run() == []
    results = suite.folder.read(CELLS)
    assert list(results) == ["a", "b", "c"]
    runs = results["a"].runs
    assert [(run.kind, run.policy) for run in runs] == [("solo", "solo")] * 4 + [
        ("policy", "temporal"), ("policy", "streams"), ("policy", "temporal"), ("policy", "streams"),
    ]  # fmt: skip
    assert suite.loaded == [["detect", "reindex"]]
    # c has b's load, so its tenants were not run alone again.
    assert suite.testbed.calls.count("detect") == 1 + 2 + 2
    # The rate is a share of what was measured first.
    state = suite.folder.state()
    assert state is not None
    assert results["a"].scenario.tenants[0].arrivals.rate_per_s == round(0.2 * state.capacity["resnet34"], 1)


def test_it_goes_on_where_it_was_broken_off(suite: Suite) -> None:
    suite.testbed.fail_at = {("streams", 8): KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        suite.run()
    assert suite.folder.read(CELLS) == {}
    suite.testbed.fail_at = {}
    now = iter(range(0, 10_000, 10))
    assert suite.run(15.0, clock=lambda: next(now)) == ["b", "c"]
    capacity = suite.folder.state().capacity
    before = suite.folder.cell_path(CELLS[0]).read_bytes()
    assert suite.run() == []
    assert suite.folder.cell_path(CELLS[0]).read_bytes() == before
    assert suite.folder.state().capacity == capacity
    suite.testbed.calls.clear()
    assert suite.run() == []
    assert suite.testbed.calls == []


def test_what_was_made_otherwise_is_refused_or_made_again(suite: Suite) -> None:
    suite.run()
    longer = suite.settings.model_copy(update={"duration_s": 2.0})
    with pytest.raises(MisuseError, match=r"a\.json\.gz was made with another duration_s"):
        suite.run(settings=longer)
    assert suite.run(settings=longer, redo=True) == []
    assert {r.scenario.duration_s for r in suite.folder.read(CELLS).values()} == {2.0}
    with pytest.raises(MisuseError, match="made with repeats = 2, not 3"):
        suite.folder.require("paper", None, {"repeats": 3})
    info = suite.testbed.info
    with pytest.raises(MisuseError, match="results of a simulated X, and this is a simulated NVIDIA H100"):
        suite.folder.require("paper", info, {})
    with pytest.raises(MisuseError, match="results of a simulated X, and this is X"):
        suite.folder.require("paper", dataclasses.replace(info, name="X", simulated=False), {})
    with pytest.raises(MisuseError, match="holds the suite 'paper'"):
        suite.folder.require("other", None, {})


def test_a_policy_that_fails_is_left_out_of_its_cell_alone(suite: Suite) -> None:
    suite.testbed.fail_at = {("temporal", 7): MissileError("no luck."), ("streams", 8): UnsupportedError("not here.")}
    assert suite.run() == []
    results = suite.folder.read(CELLS)["b"]
    assert [run.policy for run in results.runs if run.kind == "policy"] == ["streams"]
    assert results.notes == ["Policy temporal was left out: no luck.", "Policy streams was left out: not here."]


def test_a_lost_gpu_ends_it(suite: Suite) -> None:
    suite.testbed.fail_at = {("streams", 7): GpuError("cuX", "CUDA_ERROR_UNKNOWN", usable="nothing")}
    with pytest.raises(GpuError):
        suite.run()
    assert suite.folder.read(CELLS) == {}


def test_a_broken_folder_is_said(suite: Suite) -> None:
    suite.run()
    (suite.folder.path / "suite.json").write_text('{"schema": "missile-suite/1"}')
    with pytest.raises(MisuseError, match="suite: Field required"):
        suite.folder.state()


# --- what they say


def point(policy: str, attainment: float, p99: float, be: float) -> Point:
    return Point(policy, attainment, Spread(p99, p99, p99), p99, be, 0.2, p99, p99)


def summary(*points: Point, name: str = "poisson60--x--y") -> CellSummary:
    from missile.bench.suite.summary import _best

    families: dict[str, list[Point]] = {}
    for one in points:
        families.setdefault(family(one.policy), []).append(one)
    best = {key: _best(some) for key, some in families.items()}
    grouped = {key: tuple(some) for key, some in families.items()}
    return CellSummary(Cell(name, "g", ({"model": "x"}, {"model": "y"})), grouped, best, ("x",), ("y",), False, ())


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted), max_size=8), st.integers(0, 30))
def test_what_spans_cover_is_counted_once(spans: list[list[int]], begin: int) -> None:
    inside = {at for first, last in spans for at in range(first, last) if begin <= at < begin + 20}
    assert covered([(first, last) for first, last in spans], begin, begin + 20) == len(inside)


def test_the_time_without_ls_requests_is_what_bounds_be_that_never_runs_beside_them(toy_results: Results) -> None:
    def busy(name: str) -> float:
        runs = [run for run in toy_results.runs if run.kind == "solo" and run.tenants[0].name == name]
        spans = [list(zip(r.tenants[0].arrival_ns, r.tenants[0].done_ns, strict=True)) for r in runs]
        times = [covered(some, run.warmup_ns, run.duration_ns) for some, run in zip(spans, runs, strict=True)]
        return sum(times) / sum(run.duration_ns - run.warmup_ns for run in runs)

    free = free_share(toy_results)
    assert free is not None
    assert max(busy("detect"), busy("rank")) < 1.0 - free < busy("detect") + busy("rank")
    without = toy_results.model_copy(update={"runs": [run for run in toy_results.runs if run.kind != "solo"]})
    assert free_share(without) is None
    only_be = [tenant for tenant in toy_results.tenants if tenant.tenant_class == "BE"]
    assert free_share(toy_results.model_copy(update={"tenants": only_be})) is None


def test_the_best_setting_attains_and_does_most_be_work() -> None:
    points = [
        point("mps", 0.5, 9.0, 0.9),
        point("mps:be_share=0.5", 0.995, 2.0, 0.4),
        point("mps:ls_share=0.5", 0.99, 3.0, 0.5),
    ]
    assert summary(*points).best["mps"].policy == "mps:ls_share=0.5"
    assert summary(*points[:1], point("mps:be_share=0.5", 0.7, 2.0, 0.4)).best["mps"].policy == "mps:be_share=0.5"


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 9), st.floats(0.01, 1)), min_size=1, max_size=8))
def test_no_setting_beats_the_best_by_its_own_rule(settings: list[tuple[float, float, float]]) -> None:
    points = [point(f"mps:ls_share={i}", *values) for i, values in enumerate(settings)]
    best = summary(*points).best["mps"]
    for other in points:
        if best.attained:
            assert not other.attained or other.be <= best.be
        else:
            assert not other.attained
            assert other.attainment <= best.attainment


def test_claims_hold_where_they_should() -> None:
    good = summary(
        point("streams", 0.5, 4.0, 0.95),
        point("temporal", 0.3, 8.0, 0.9),
        point("orion", 0.999, 1.1, 0.3),
        point("missile", 0.999, 1.05, 0.8),
    )
    assert [claim.holds for claim in check_claims([good])] == [True] * 6
    (streams,) = [rival for rival in compare_with_baselines([good]) if rival.baseline == "streams"]
    assert (streams.compared, streams.halved) == (1, 1)
    assert streams.ratio == pytest.approx(1.05 / 4)
    # Orion has a lower BE rate, so its short tail is no comparison.
    assert [r.compared for r in compare_with_baselines([good]) if r.baseline == "orion"] == [0]


def test_exceptions_are_named_with_a_reason() -> None:
    bad = summary(
        point("streams", 0.995, 1.2, 0.6),
        point("missile", 0.9, 1.4, 0.5),
        name="poisson90--x--y",
    )
    attainment, median, worst, share, half, times = check_claims([bad])
    assert [claim.holds for claim in (attainment, median, worst, share, half, times)] == [False] * 6
    assert "poisson90--x--y: 90.0%" in attainment.exceptions[0]
    assert "attained by streams" in attainment.exceptions[0]
    assert "running" in worst.exceptions[0]
    assert "does not attain" in times.exceptions[0]
    close = summary(point("streams", 0.995, 1.2, 0.6), point("missile", 0.995, 1.1, 0.9))
    (line,) = check_claims([close])[5].exceptions
    assert "1.50 ×" in line
    assert "more than the GPU gives" in line


def test_a_cell_in_which_missile_failed_is_counted_against_it() -> None:
    held = summary(point("streams", 0.5, 4.0, 0.95), point("missile", 0.999, 1.05, 0.8))
    note = "Policy missile was left out: it broke: badly."
    failed = dataclasses.replace(summary(point("streams", 0.5, 4.0, 0.95), name="p--x--z"), notes=(note,))
    claim = check_claims([held, failed])[0]
    assert claim.holds is False
    assert claim.found == "in 1 of 1 cells; it failed to run in 1 more"
    assert claim.exceptions == ("p--x--z: it did not run: it broke: badly.",)
    assert check_claims([failed])[0].holds is False
    other = dataclasses.replace(held, notes=("Policy missile:elastic=off was left out: it broke.",))
    assert check_claims([other])[0].holds is True
    assert check_claims([dataclasses.replace(failed, notes=())]) == []  # nobody asked for it


def test_tails_are_told_with_the_requests_that_were_turned_away_too() -> None:
    def one(p99: float, of_all: float | None) -> CellSummary:
        return summary(dataclasses.replace(point("missile", 0.995, p99, 0.8), worst_of_all=of_all))

    _, median, worst, *_ = check_claims([one(1.0, 1.1), one(1.04, 1.2), one(1.08, None)])
    assert "1.04 × over 3 pairs; 1.20 × with requests that were turned away" in median.found
    assert "without bound with requests" in worst.found
    assert "turned away" not in check_claims([one(1.0, 1.0)])[1].found  # none were


def test_what_the_planner_refuses_is_not_counted_and_listed() -> None:
    missed = summary(point("streams", 0.5, 4.0, 0.95), point("missile", 0.9, 1.4, 0.5))
    held = dataclasses.replace(missed, accepted=False)
    assert check_claims([missed])[0].holds is False
    refused = check_claims([held])[0]
    assert refused.holds is None
    assert "not accepted" in refused.exceptions[0]


def test_predictions_are_judged_by_policy() -> None:
    def one(policy: str, figure: str, simulated: float) -> Comparison:
        return Comparison(policy, "x", "y", figure, 1.0, simulated)  # type: ignore[arg-type]

    good = [one("mps:be_share=0.5", "p99", 1.1)] * 3 + [one("mps", "p99", 0.9), one("mps", "p99", 3.0)]
    (claim,) = check_claims([], good)
    assert claim.holds  # four of five
    (claim,) = check_claims([], [*good, one("mps", "p99", 1.3), one("orion", "rate", 1.0), one("orion", "p50", 9.0)])
    assert not claim.holds
    assert claim.found == "of 2 figures by policy, 1"
    assert claim.exceptions == ("mps, LS p99: 66.7%",)


def test_a_cell_in_which_be_finished_nothing_does_not_hide_the_others() -> None:
    cells = [summary(point("missile", 1.0, 1.0, be)) for be in (0.9, 0.4, 0.0)]
    claim = next(claim for claim in check_claims(cells) if claim.title.startswith("BE rate at least 0.70"))
    assert not claim.holds
    assert claim.found.startswith("0% over 3 cells; it finished nothing in 1, and over the others it is 60.0%")


def test_without_missile_there_is_no_claim() -> None:
    assert check_claims([summary(point("streams", 0.5, 4.0, 0.95))]) == []


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.floats(0.1, 10))
def test_a_geometric_mean_scales_and_lies_between(values: list[float], scale: float) -> None:
    mean = geometric_mean(values)
    assert min(values) * 0.999999 <= mean <= max(values) * 1.000001
    assert geometric_mean([value * scale for value in values]) == pytest.approx(mean * scale)
    assert geometric_mean([*values, 0.0]) == 0.0


def test_the_report_says_what_is_there(suite: Suite, tmp_path: Path) -> None:
    suite.testbed.fail_at = {("streams", 8): UnsupportedError("not <here>.")}
    suite.run()
    results: dict[str, Results] = suite.folder.read(CELLS)
    cells = summarize_cells(CELLS, results)
    assert [c.cell.name for c in cells] == ["a", "b", "c"]
    families = summarize_families(cells)
    assert [(f.family, f.cells) for f in families] == [("temporal", 3), ("streams", 3)]
    state = suite.folder.state()
    assert state is not None
    page = write_suite_report(SuiteReport(state, 170, cells, results), tmp_path).read_text()
    assert "3 of its 170 cells" in page
    assert "Simulated" in page
    assert "not &lt;here&gt;." in page
    assert page.count("<svg") >= 3
    assert "missile</code> was not run" in page
    tables = (tmp_path / "tables.md").read_text()
    assert "Simulated" in tables.splitlines()[0]
    assert all(f"| {name} | temporal |" in tables for name in "abc")
    counts = {line.count("|") for line in tables.splitlines() if line.startswith("| a |")}
    assert counts == {7, 8}  # of every setting, and of the best with the time free of LS requests


def test_baselines_are_those_of_the_settings() -> None:
    assert set(BASELINES) < set(SETTINGS)


def test_a_cell_s_file_is_an_ordinary_results_file(suite: Suite) -> None:
    suite.run()
    results = read_results(suite.folder.cell_path(CELLS[0]))
    assert results.scenario.name == "a"
    assert results.tenants[0].slo_ms is not None
