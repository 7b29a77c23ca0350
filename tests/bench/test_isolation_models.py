"""`missile bench isolation --part models`: LS models beside BE models, plain and colored, on a simulated GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from missile.bench.isolation.models import RealCell, RealPlan, Room, real_cells
from missile.bench.isolation.models_plot import plot_models
from missile.bench.isolation.models_results import RealResults, RealRun, pair_outcomes
from missile.bench.isolation.models_run import _setting, run_real
from missile.bench.isolation.models_table import grids_of, render_real_markdown
from missile.cli.app import main
from missile.compiler.objective import OverlapChoice
from missile.errors import MisuseError
from missile.gpu import open_gpu
from missile.probe import ChannelMap, map_for

PLAN = RealPlan(ls=("synthetic-tiny",), be=("synthetic-copy",), duration_s=0.02, warmup_s=0.004)
DEVICE = "sim:a5500"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> ChannelMap:
    with open_gpu(DEVICE) as gpu:
        return map_for(gpu, cache=tmp_path_factory.mktemp("maps"), pages=32, interference=False)


@pytest.fixture(scope="module")
def results(known: ChannelMap, tmp_path_factory: pytest.TempPathFactory) -> RealResults:
    with open_gpu(DEVICE) as gpu:
        return run_real(gpu, PLAN, tmp_path_factory.mktemp("out") / "models.json", known=known, notes=["said so"])


def test_every_pair_has_what_it_is_compared_with(results: RealResults) -> None:
    assert [run.cell for run in results.runs] == list(real_cells(PLAN))
    assert {run.error for run in results.runs} == {""}
    pairs = pair_outcomes(results)
    assert [pair.colored for pair in pairs] == [False, True]
    for pair in pairs:
        assert None not in (pair.of_share, pair.p99_of_share, pair.of_whole, pair.be_of_share, pair.be_of_whole)
    assert results.simulated
    assert set(results.ls_colors).isdisjoint(results.be_colors)
    assert results.ls_sms + results.be_sms == 80


def test_ratios_are_of_the_right_runs() -> None:
    def took(ls: str, be: str, room: Room, colored: bool, ns: int, rate: float) -> RealRun:
        return RealRun(
            ls=ls, be=be, room=room, colored=colored, ls_ns=(ns,) * 3 if ls else (), be_per_s=rate if be else 0.0
        )

    runs = (
        took("a", "", Room.WHOLE, False, 100, 0),
        took("a", "", Room.SHARE, False, 200, 0),
        took("a", "", Room.SHARE, True, 250, 0),
        took("", "b", Room.SHARE, False, 0, 8),
        took("", "b", Room.SHARE, True, 0, 5),
        took("", "b", Room.WHOLE, False, 0, 10),
        took("a", "b", Room.SHARE, False, 500, 6),
        took("a", "b", Room.SHARE, True, 275, 4),
    )
    made = RealResults(
        created="now",
        simulated=True,
        gpu="g",
        device="d",
        uuid="",
        environment={},
        ls_sms=1,
        be_sms=2,
        ls_colors=(0,),
        be_colors=(1,),
        colors=((0,), (1,)),
        duration_s=1.0,
        runs=runs,
    )
    plain, colored = pair_outcomes(made)
    assert (plain.of_share, plain.of_whole, plain.be_of_share, plain.be_of_whole) == (2.5, 5.0, 0.75, 0.6)
    assert (colored.of_share, colored.of_whole, colored.be_of_share, colored.be_of_whole) == (1.1, 2.75, 0.8, 0.4)
    assert [grid.cells[0] for grid in grids_of(made)] == [
        ("a", ("2.50 > 1.10",)),
        ("a", ("5.00 > 2.75",)),
        ("a", ("60% > 40%",)),
    ]


def test_a_run_goes_on_where_it_stopped_and_takes_more_models(known: ChannelMap, tmp_path: Path) -> None:
    path = tmp_path / "models.json"

    def stop(done: int, count: int, text: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with open_gpu(DEVICE) as gpu:
        with pytest.raises(KeyboardInterrupt):
            run_real(gpu, PLAN, path, known=known, progress=stop)
        (tmp_path / "before").write_bytes(path.read_bytes())
        more = RealPlan(ls=PLAN.ls, be=("synthetic-gemv",), duration_s=PLAN.duration_s, warmup_s=PLAN.warmup_s)
        whole = run_real(gpu, more, path, known=known)
    kept = [run for run in whole.runs if run.be == "synthetic-copy"]
    assert kept
    assert RealCell("synthetic-tiny", "synthetic-gemv", Room.SHARE, True) in {run.cell for run in whole.runs}
    assert not whole.interrupted
    assert RealResults.read(path) == whole


def test_a_model_that_can_not_be_loaded_does_not_stop_the_others(known: ChannelMap, tmp_path: Path) -> None:
    plan = RealPlan(ls=("synthetic-tiny", "no-such-model"), be=PLAN.be, duration_s=0.02, warmup_s=0.004)
    with open_gpu(DEVICE) as gpu:
        results = run_real(gpu, plan, tmp_path / "models.json", known=known)
    assert {run.ls for run in results.runs if run.error} == {"no-such-model"}
    assert "no-such-model" in render_real_markdown(results)
    assert all(pair.of_share for pair in pair_outcomes(results) if pair.ls == "synthetic-tiny")


@pytest.mark.parametrize(
    "bad",
    [{"ls": ()}, {"be": ()}, {"ls": ("a",), "be": ("a",)}, {"warmup_s": 1.0}, {"ls_share": 0.0}],
)
def test_plans_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(MisuseError):
        RealPlan(**bad)


def test_the_picture_is_drawn_where_there_are_pairs(results: RealResults, tmp_path: Path) -> None:
    assert plot_models(results, tmp_path / "models.png")
    assert [path.name for path in tmp_path.iterdir()] == ["models.png"]
    assert not plot_models(results.model_copy(update={"runs": ()}), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_broken_files_are_refused(results: RealResults, tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    results.write(path, pair_outcomes(results))
    assert RealResults.read(path) == results
    path.write_text(path.read_text()[:-200])
    with pytest.raises(MisuseError, match="truncated"):
        RealResults.read(path)
    with pytest.raises(MisuseError, match="no isolation results"):
        RealResults.read(tmp_path / "none.json")


def test_the_command_says_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MISSILE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    arguments = ["-d", DEVICE, "--part", "models", "--ls", "synthetic-tiny", "--be", "synthetic-copy"]
    assert main(["bench", "isolation", *arguments, "--duration", "0.02", "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["simulated"] is True
    assert "(simulated)" in (out / "models.md").read_text()


def test_runs_with_other_launches_are_not_taken_for_the_same(results: RealResults, tmp_path: Path) -> None:
    """Results from before launches could overlap are off, and a run with the default does not go on there."""
    assert results.overlap is OverlapChoice.ALONE
    path = tmp_path / "models.json"
    results.write(path, pair_outcomes(results))
    raw = json.loads(path.read_text())
    del raw["overlap"]
    path.write_text(json.dumps(raw))
    assert RealResults.read(path).overlap is OverlapChoice.OFF
    assert _setting(results) != _setting(results.model_copy(update={"overlap": OverlapChoice.OFF}))
