"""`missile compile --color` on a package that is there: needs no GPU, only the map of the one that the package is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ptx_cases import source

from missile.cli.app import main
from missile.coloring.usual import usual_shapes
from missile.compiler.colored import is_colored
from missile.compiler.overlap_table import Tuned
from missile.compiler.overlapped import is_overlapped
from missile.compiler.package import (
    Buffer,
    BufferKind,
    KernelImage,
    KernelStep,
    ModelPackage,
    PointerArgument,
    TensorSpec,
    read_package,
    write_package,
)
from missile.compiler.placements import PlacementTable
from missile.probe.map_file import read_map

MAP = Path(__file__).parents[2] / "benchmarks" / "results" / "probe-h200" / "map1.json"


def _write(directory: Path, gpu: str = "NVIDIA H200", name: str = "two") -> None:
    """A package of two kernels."""
    (directory / "kernels").mkdir(parents=True)
    names = ("add_relu", "gather")
    for kernel in names:
        (directory / "kernels" / f"{kernel}.ptx").write_text(source(kernel))
    spec = TensorSpec(name="x", buffer="in", dtype="float16", shape=(4,), strides=(1,))
    step = KernelStep(kernel="gather", grid=(1, 1, 1), block=(128, 1, 1), arguments=(PointerArgument(buffer="in"),))
    package = ModelPackage(
        name=name,
        batch=1,
        gpu=gpu,
        arch="sm_90",
        inputs=(spec,),
        outputs=(spec,),
        buffers=(Buffer(id="in", kind=BufferKind.INPUT, nbytes=8),),
        kernels=tuple(KernelImage(id=kernel, entry=kernel) for kernel in names),
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
    answer = json.loads(capsys.readouterr().out)
    rows = answer["colored"]
    assert {row["form"] for row in rows} >= {"pair", "shadow"}
    assert all(row["made"] for row in [*rows, answer["overlapped"]])
    for row in rows:
        names = {path.name for path in (tmp_path / "colored" / row["shape"]).glob("*.cubin")}
        assert names == {"add_relu.cubin", "gather.cubin", "transfer.cubin"}
    assert main(given) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not any(row["made"] for row in [*answer["colored"], answer["overlapped"]])


def test_what_an_ls_tenant_loads_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain and colored, as `load_tenants` asks for it."""
    pytest.importorskip("triton", reason="its wheel has the assembler")
    _write(tmp_path)
    assert main(["compile", str(tmp_path), "--color", "--map", str(MAP), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["overlapped"]["kernels"] == 2
    package = read_package(tmp_path)
    assert is_overlapped(tmp_path, Tuned())
    shadowed = PlacementTable.load(package.gpu).shadowed
    for shape in usual_shapes(read_map(MAP)):
        assert is_colored(tmp_path, shape)
        assert is_colored(tmp_path, shape, mixed=bool(shadowed.get(shape.form)), overlap=Tuned())


def test_a_be_model_gets_no_code_that_overlaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    _write(tmp_path, name="bert_large")
    assert main(["compile", str(tmp_path), "--color", "--map", str(MAP), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["overlapped"] is None
    assert not any(row["overlaps"] for row in answer["colored"])
    assert not (tmp_path / "overlapped").exists()


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
