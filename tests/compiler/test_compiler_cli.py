"""`missile compile` and `missile profile`, as far as they go without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from missile.cli.app import main
from missile.compiler.package import ModelPackage, read_package, write_package


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    return str(json.loads(capsys.readouterr().out)["error"]["message"])


def test_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "alexnet", "-o", str(tmp_path / "p"), "--json"]) == 2
    assert "resnet34" in _error(capsys)
    assert not (tmp_path / "p").exists()


def test_compiling_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "resnet34", "-o", str(tmp_path / "p"), "-d", "sim:h100", "--json"]) == 1
    assert "needs a GPU" in _error(capsys)


def test_profile_of_no_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(tmp_path), "--json"]) == 2
    assert "no package.json" in _error(capsys)


def test_profile_on_a_simulated_gpu_changes_nothing(
    package: ModelPackage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_package(package, tmp_path)
    assert main(["profile", str(tmp_path), "-d", "sim:h100", "--json"]) == 2
    assert "simulated" in _error(capsys)
    assert read_package(tmp_path) == package


def test_a_package_needs_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "resnet34", "--json"]) == 2
    assert "-o DIR" in _error(capsys)
