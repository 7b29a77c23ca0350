"""The command line's contract: exit codes, one sentence, pure JSON, and verbs that load only when asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from missile import __version__
from missile.cli.app import _EXTRAS, VERBS, main
from missile.errors import GpuError, MisuseError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a verb `probe` whose body is the given exception (or nothing)."""

    def install(raises: BaseException | None = None) -> None:
        def command(target: str = "x", json: Annotated[bool, typer.Option("--json")] = False) -> None:
            if raises is not None:
                raise raises

        module = types.ModuleType("missile.cli.probe")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "missile.cli.probe", module)

    return install


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"missile {__version__}"
    for arguments in (["--help"], []):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in VERBS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from missile.cli import main; main(['--help']); "
        "print(sorted({'numpy', 'torch', 'scipy', 'matplotlib', 'pydantic'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bogus"], "bogus"),
        (["--bogus"], "--bogus"),
        (["probe", "--bogus"], "--bogus"),
        (["probe", "--target"], "--target"),
    ],
)
def test_misuse_of_the_command_line(
    verb: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    verb()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MisuseError("Unknown policy 'x'; known: a, b."), 2, "Unknown policy 'x'"),
        (GpuError("cuInit", "CUDA_ERROR_NOT_FOUND"), 1, "cuInit failed"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "pip install 'missile[torch]'"),
        (KeyError("oops"), 1, "KeyError: 'oops'. (cli/test_cli_app.py:"),
    ],
)
def test_every_error_is_one_sentence_and_a_code(
    verb: Any, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    verb(error)
    assert main(["probe"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert main(["probe", "--json"]) == code
    out, err = capsys.readouterr()
    assert err == ""
    answer = json.loads(out)["error"]
    assert said in answer["message"]
    assert answer["exit_code"] == code


# Distributions whose module has another name.
_MODULES = {
    "cuda-bindings": "cuda",
    "grpcio": "grpc",
    "nvidia-cuda-nvrtc": "nvidia",
    "nvidia-ml-py": "pynvml",
    "protobuf": "google",
}


def _extras() -> dict[str, str]:
    """Module -> extra, for all that users install, from pyproject.toml."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    found = {}
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in requirements if extra != "dev" else ():
            name = re.match(r"[\w.-]+", requirement)
            assert name
            found[_MODULES.get(name[0], name[0].replace("-", "_"))] = extra
    return found


@pytest.mark.parametrize(("module", "extra"), sorted(_extras().items()))
def test_a_missing_dependency_names_its_extra(
    verb: Any, capsys: pytest.CaptureFixture[str], module: str, extra: str
) -> None:
    verb(ModuleNotFoundError(f"No module named '{module}.part'", name=f"{module}.part"))
    assert main(["probe"]) == 1
    assert f"`missile probe` needs {module}: pip install 'missile[{extra}]'." in capsys.readouterr().err.replace(
        "\n", " "
    )


def test_no_extra_is_named_for_what_it_does_not_bring() -> None:
    brought = {"triton": "torch"}  # a dependency of torch
    assert _extras() | brought == _EXTRAS


def test_a_verb_without_a_module_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(VERBS, "absent", "Not there.")
    assert main(["absent"]) == 1
    assert "`missile absent` is planned" in capsys.readouterr().err
