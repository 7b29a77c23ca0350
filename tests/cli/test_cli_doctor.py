"""`missile doctor`, on this machine and on machines that it is told about."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from missile.cli import main
from missile.cli.doctor import Findings, Need, look, places
from missile.gpu.cuda.driver import why_unavailable
from missile.gpu.interface import GpuInfo, Level

EVERYTHING = tuple(
    Need(name, "", "1.0") for name in ("torch", "triton", "nvrtc", "httptools", "uvloop", "orjson", "grpc", "textual")
)
GPU = GpuInfo("Some GPU", "cuda:0", False, Level.MEMORY_LAB, 132, 1, 1, 1, 8, 8, 2, (9, 0))
RICH = Findings({}, GPU, "", Need("simulator", "", "h100"), EVERYTHING)


def without(findings: Findings, *names: str) -> Findings:
    return replace(findings, needs=tuple(replace(n, version=None) if n.name in names else n for n in findings.needs))


def table(findings: Findings) -> dict[str, tuple[str | None, str | None, str | None]]:
    return {place.verb: (place.gpu, place.simulated, place.host) for place in places(findings)}


def test_with_everything_every_verb_works() -> None:
    assert all(place.works for place in places(RICH))


def test_what_is_missing_is_named_where_it_is_missed() -> None:
    bare = table(without(replace(RICH, gpu=None), "torch", "nvrtc", "textual"))
    assert bare["bench"] == ("no GPU", "", None)
    assert bare["compile"] == ("no GPU", None, None)
    assert bare["serve"] == ("no GPU", None, "no torch")
    assert bare["map"] == (None, None, "")
    assert bare["top"] == (None, None, "no textual")
    assert table(without(RICH, "nvrtc"))["probe"] == ("no nvrtc", "", None)


def test_it_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "Ready." in printed
    assert "bench" in printed


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["works"] is True
    assert said["verbs"]["bench"]["simulated"] == {"works": True, "lacks": ""}
    assert said["verbs"]["map"]["gpu"] is None
    assert (said["gpu"] is None) == (why_unavailable() is not None)


def test_without_a_place_for_bench_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = replace(look(), gpu=None, simulator=Need("simulator", "", None, "broken"))
    monkeypatch.setattr("missile.cli.doctor.look", lambda: broken)
    assert main(["doctor"]) == 1
    assert "can't run here" in capsys.readouterr().out
