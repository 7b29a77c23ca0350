"""`missile bench --suite` on the simulated GPU: run, resume, predict, report, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from missile.bench.results import Results, read_results
from missile.bench.suite.files import SuiteFolder
from missile.cli.app import main
from missile.cli.stopping import stopping_on_sigterm

CELL = "poisson30--resnet34--decoder_1b"
SHORT = ["bench", "--suite", "paper", "--device", "sim:h200", "--duration", "0.15", "--repeats", "1"]
POLICIES = ["--policies", "temporal,streams,mps:be_share=0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of which one cell was run and predicted."""
    out = tmp_path_factory.mktemp("suite") / "out"
    assert main([*SHORT, *POLICIES, "--cells", CELL, "--predict", "sim:h100", "-o", str(out)]) == 0
    return out


def test_one_cell_from_command_to_report(folder: Path) -> None:
    results = read_results(folder / "cells" / f"{CELL}.json.gz")
    assert results.scenario.policies == ("temporal", "streams", "mps:be_share=0.5")
    assert [run.policy for run in results.runs] == ["solo", "solo", "temporal", "streams"]
    page = (folder / "report.html").read_text()
    assert "1 of its 170 cells" in page
    assert "Policy mps was left out" in page
    assert "on the simulated GPU sim:h100" in page
    assert json.loads((folder / "suite.json").read_text())["capacity"].keys() == {"resnet34"}


def test_what_is_there_is_not_run_again_and_settings_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "cells" / f"{CELL}.json.gz"
    before = path.stat().st_mtime_ns
    assert (
        main(["bench", "--suite", "paper", "--device", "sim:h200", "--cells", CELL, "--json", "-o", str(folder)]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["cells"] == [CELL]
    assert answer["simulated"] is True
    assert [family["family"] for family in answer["families"]] == ["temporal", "streams"]
    assert path.stat().st_mtime_ns == before


def test_a_sample_with_settings_that_won_says_how_it_was_chosen(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sample"
    chosen = ["--sample", "1", "--tuned-by", str(folder), "--policies", "temporal,partition:ls_share=0.5"]
    assert main([*SHORT, *chosen, "-o", str(out)]) == 0
    tables = (out / "tables.md").read_text()
    assert "1 cells asked for: a fixed sample" in tables
    assert "in at least one of 1 cells measured before" in tables
    assert "| poisson60--mobilenet_v3_large--resnet152 | temporal |" in tables
    assert "Latin square" in (out / "report.html").read_text()


def test_a_suite_that_is_terminated_reports_the_cells_that_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = SuiteFolder.keep

    def keep_and_be_terminated(folder: SuiteFolder, results: Results, path: Path) -> None:
        keep(folder, results, path)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SuiteFolder, "keep", keep_and_be_terminated)
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "out"
    settings = ["--policies", "temporal", "--cells", "poisson30--resnet34--*", "--duration", "0.5"]
    assert main([*SHORT[:-4], "--repeats", "1", *settings, "-o", str(out)]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(list((out / "cells").iterdir())) == 1
    assert "1 of its 170 cells" in (out / "report.html").read_text()
    assert "1 of 170 cells" in (out / "tables.md").read_text()
    assert capsys.readouterr().err.strip().endswith("missile: Interrupted.")


def test_sigterm_ends_the_run_that_lasts_and_nothing_else() -> None:
    ended = []
    before = signal.getsignal(signal.SIGINT)
    with stopping_on_sigterm() as check:
        check()
        signal.raise_signal(signal.SIGTERM)  # no run lasts: nothing happens here and now
        signal.signal(signal.SIGINT, lambda *_: ended.append(1))
        try:
            assert not ended
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGINT, before)
        assert ended == [1]
        with pytest.raises(KeyboardInterrupt):
            check()


def test_a_report_can_be_predicted_without_the_gpu(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "simulated")
    assert main(["bench", "--report", str(tmp_path / "copy"), "--predict", "sim:v100"]) == 0
    assert "on the simulated GPU sim:v100" in (tmp_path / "copy" / "report.html").read_text()


def test_the_report_can_be_made_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--report", str(folder), "-o", str(tmp_path)]) == 0
    assert "1 of 170 cells" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text() == (folder / "report.html").read_text()
    assert main(["bench", "--report", str(folder / "cells" / f"{CELL}.json.gz"), "-o", str(tmp_path / "one")]) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--suite", "thesis"], "'thesis'"),
        (["--suite", "paper", "--cells", "nothing*"], "--cells"),
        (["--suite", "paper", "--models", "resnet33"], "'resnet33'"),
        (["--suite", "paper", "--budget-s", "-1"], "--budget-s"),
        (["--suite", "paper", "--predict", "cuda:0"], "cuda:0"),
        (["--suite", "paper", "--device", "sim:none"], "sim:none"),
        (["--suite", "paper", "--duration", "-1"], "duration_s"),
        (["--suite", "paper", "--repeats", "0"], "repeats"),
        (["--suite", "paper", "--policies", "fair"], "'fair'"),
        (["--suite", "paper", "scenario.toml"], "one of them"),
        (["--budget-s", "3"], "--suite"),
        (["--sample", "3"], "--suite"),
        (["--suite", "paper", "--sample", "0"], "1 to 42"),
        (["--suite", "paper", "--tuned-by", "nowhere"], "suite.json"),
        (["--predict", "sim:h100"], "--suite"),
        (["--suite", "paper", "--overlap", "off"], "--overlap goes with a scenario"),
    ],
)
def test_misuse_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main(["bench", "--device", "sim:h100", *arguments, "-o", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--repeats", "3"], "repeats = 1, not 3"),
        (["--device", "sim:h100"], "H200"),
        (["--policies", "orion"], "policies"),
    ],
)
def test_a_folder_is_for_one_gpu_and_one_way_of_running(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    device = [] if "--device" in arguments else ["--device", "sim:h200"]
    assert main(["bench", "--suite", "paper", *device, *arguments, "-o", str(folder)]) == 2
    assert named in capsys.readouterr().err.replace("\n", " ")
