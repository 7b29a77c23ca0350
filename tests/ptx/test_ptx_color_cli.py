"""`missile compile --color` on a package that is there: needs no GPU, only the map of the one that the package is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ptx_cases import source

from missile.cli.app import main
from missile.compiler.package import (
    Buffer,
    BufferKind,
    KernelImage,
    KernelStep,
    ModelPackage,
    PointerArgument,
    TensorSpec,
    write_package,
)

MAP = Path(__file__).parents[2] / "benchmarks" / "results" / "probe-h200" / "map1.json"


def _write(directory: Path, gpu: str = "NVIDIA H200") -> None:
    """A package of two kernels."""
    (directory / "kernels").mkdir(parents=True)
    names = ("add_relu", "gather")
    for name in names:
        (directory / "kernels" / f"{name}.ptx").write_text(source(name))
    spec = TensorSpec(name="x", buffer="in", dtype="float16", shape=(4,), strides=(1,))
    step = KernelStep(kernel="gather", grid=(1, 1, 1), block=(128, 1, 1), arguments=(PointerArgument(buffer="in"),))
    package = ModelPackage(
        name="two",
        batch=1,
        gpu=gpu,
        arch="sm_90",
        inputs=(spec,),
        outputs=(spec,),
        buffers=(Buffer(id="in", kind=BufferKind.INPUT, nbytes=8),),
        kernels=tuple(KernelImage(id=name, entry=name) for name in names),
        steps=(step,),
    )
    write_package(package, directory)


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    return str(json.loads(capsys.readouterr().out)["error"]["message"])


def test_a_package_is_colored_where_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    _write(tmp_path)
    given = ["compile", str(tmp_path), "--color", "--map", str(MAP), "--json"]
    assert main(given) == 0
    rows = json.loads(capsys.readouterr().out)["colored"]
    assert {row["form"] for row in rows} >= {"pair", "shadow"}
    assert all(row["made"] for row in rows)
    for row in rows:
        names = {path.name for path in (tmp_path / "colored" / row["shape"]).glob("*.cubin")}
        assert names == {"add_relu.cubin", "gather.cubin", "transfer.cubin"}
    assert main(given) == 0
    assert not any(row["made"] for row in json.loads(capsys.readouterr().out)["colored"])


def test_a_kernel_that_can_not_be_colored_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    _write(tmp_path)
    (tmp_path / "kernels" / "gather.ptx").write_text(source("gather").replace("ld.global.b32", "ld.b32"))
    assert main(["compile", str(tmp_path), "--color", "--map", str(MAP), "--json"]) == 1
    assert "'gather' can't be colored: ld.b32" in _error(capsys)
    assert not (tmp_path / "colored").exists() or not list((tmp_path / "colored").iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--color", "-o", "elsewhere"], "-o is for a new one"),
        ([], "--color would add colored code"),
        (["--map", str(MAP)], "it goes with --color"),
        (["--color", "--map", "no-such.json"], "no channel map at"),
    ],
)
def test_misused(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path)
    assert main(["compile", str(tmp_path), *arguments, "--json"]) == 2
    assert says in _error(capsys)


def test_a_map_of_another_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path, gpu="NVIDIA L4")
    assert main(["compile", str(tmp_path), "--color", "--map", str(MAP), "--json"]) == 2
    assert "is of 'NVIDIA H200', the package is for 'NVIDIA L4'" in _error(capsys)
