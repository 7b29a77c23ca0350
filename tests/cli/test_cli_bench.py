"""`missile bench` on the simulated GPU: what it prints and writes, what it refuses, and what Ctrl-C leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from missile.bench.results import read_results
from missile.bench.run import Bench, Step, run_all
from missile.cli.app import main
from missile.gpu.sim import Faults, SimulatedGpu, load_spec
from missile.gpu.sim.spec import KernelFault

ROOT = Path(__file__).parents[2]
SCENARIO = str(ROOT / "examples" / "01_scenario.toml")
SHORT = ["bench", SCENARIO, "--device", "sim:h100", "--duration", "0.15", "--repeats", "1"]


def test_bench_from_scenario_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--policies", "streams, priority", "-o", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "simulated" in out
    assert "priority" in out
    assert "temporal" not in out
    assert err == ""
    results = read_results(tmp_path / "out" / "results.json")
    assert results.scenario.policies == ("streams", "priority")
    assert results.simulated
    page = (tmp_path / "out" / "report.html").read_text()

    assert main(["bench", "--report", str(tmp_path / "out" / "results.json"), "-o", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "report.html").read_text() == page


def test_the_default_scenario_runs_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "sim:h100", "--duration", "0.1", "--repeats", "1", "--policies", "partition"]
    assert main(["bench", *arguments, "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("detect", "classify", "rank", "reindex", "decode", "partition"))


def test_json_is_all_there_is_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--policies", "temporal", "--json", "-o", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert err == ""
    assert answer["simulated"] is True
    (temporal,) = answer["summary"]["policies"]
    assert temporal["ls"][0]["n"] > 0
    assert Path(answer["results"]).is_file()
    assert Path(answer["report"]).is_file()


def test_the_plan_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--policies", "missile", "--explain", "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Plan: missile" in out
    plan = read_results(tmp_path / "results.json").plan
    assert plan is not None
    assert plan["policy"].startswith("missile")
    assert main(["bench", "--report", str(tmp_path / "results.json"), "--json", "-o", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == plan


def test_the_same_seed_gives_the_same_simulated_results(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        assert main([*SHORT, "--policies", "priority", "-o", str(tmp_path / name)]) == 0
        runs.append(read_results(tmp_path / name / "results.json").runs)
    arrivals = [[run.tenants[0].arrival_ns for run in kept] for kept in runs]
    assert arrivals[0] == arrivals[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([SCENARIO, "--policies", "fair"], "'fair'"),
        ([SCENARIO, "--policies", ""], "policies"),
        ([SCENARIO, "--policies", "partition:size=3"], "'size'"),
        ([SCENARIO, "--device", "sim:none"], "'sim:none'"),
        ([SCENARIO, "--repeats", "0"], "repeats"),
        ([SCENARIO, "--duration", "x"], "--duration"),
        (["absent.toml"], "absent.toml"),
        (["--report", "absent.json"], "absent.json"),
        ([SCENARIO, "--report", "absent.json"], "--report"),
    ],
)
def test_misuse_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main(["bench", *arguments, "-o", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_tenant_that_does_not_fit_leaves_the_others_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = tmp_path / "s.toml"
    text = Path(SCENARIO).read_text()
    scenario.write_text(text.replace('model = "synthetic-copy"', 'model = "synthetic-copy"\nmemory_limit_mb = 10'))
    assert main(["bench", str(scenario), *SHORT[2:], "--policies", "streams", "-o", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "Tenant 'copy' did not run" in err
    assert "10 MiB" in err
    assert "10 MiB" in out
    tiny, copy = read_results(tmp_path / "results.json").runs[-1].tenants
    assert tiny.done_ns
    assert not copy.done_ns


def test_a_fault_is_kept_in_the_results_and_fails_naming_the_tenant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(kernels=(KernelFault(kernel="stream_copy", launch=40),))
    monkeypatch.setattr(
        "missile.bench.testbed.open_gpu", lambda device, seed: SimulatedGpu(load_spec("h100"), seed=seed, faults=faults)
    )
    assert main([*SHORT, "--policies", "streams", "-o", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "for tenant 'copy'" in err.replace("\n", " ")
    assert "Traceback" not in out + err
    last = read_results(tmp_path / "results.json").runs[-1]
    assert "'copy'" in last.fault
    assert not last.whole
    assert {tenant.name for tenant in last.tenants if tenant.error} == {"copy"}


def test_an_unknown_model_is_misuse_and_names_the_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = tmp_path / "s.toml"
    scenario.write_text(Path(SCENARIO).read_text().replace("synthetic-tiny", "resnet33"))
    assert main(["bench", str(scenario), "--device", "sim:h100"]) == 2
    err = capsys.readouterr().err
    assert "'resnet33'" in err
    assert "resnet34" in err


def test_an_interrupted_bench_keeps_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_until_interrupted(bench: Bench, on_step: Callable[[int, Step], None]) -> Any:
        def step(index: int, step: Step) -> None:
            on_step(index, step)
            if index == 4:  # after both solo runs and two policies
                raise KeyboardInterrupt

        return run_all(bench, step)

    monkeypatch.setattr("missile.cli.bench.run_all", run_until_interrupted)
    code = main(["bench", SCENARIO, "--device", "sim:h100", "--repeats", "1", "--duration", "0.2", "-o", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == 130
    assert err.strip().endswith("missile: Interrupted.")
    assert "interrupted" in out
    results = read_results(tmp_path / "results.json")
    assert results.interrupted
    assert [run.policy for run in results.runs] == ["solo", "solo", "temporal", "streams"]
    assert "Incomplete" in (tmp_path / "report.html").read_text()
