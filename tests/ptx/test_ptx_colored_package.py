"""A package's kernels, colored: once for a shape, whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ptx_cases import SHAPES, source

from missile.compiler import color_worker
from missile.compiler.color_worker import Task, color, color_all
from missile.compiler.colored import color_kernels, colored_kernels, read_colored, shadow_shape, shape_name
from missile.compiler.package import (
    Buffer,
    BufferKind,
    KernelImage,
    KernelStep,
    ModelPackage,
    PointerArgument,
    TensorSpec,
)
from missile.compiler.placements import PlacementTable
from missile.errors import MisuseError, UnsupportedError

pytest.importorskip("triton", reason="its wheel has the assembler")

SHAPE = SHAPES["in-page-xors"]


@pytest.fixture
def package(tmp_path: Path) -> ModelPackage:
    """Two kernels, as a package on disk has them."""
    (tmp_path / "kernels").mkdir()
    names = ("add_relu", "gather")
    for name in names:
        (tmp_path / "kernels" / f"{name}.ptx").write_text(source(name))
    spec = TensorSpec(name="x", buffer="in", dtype="float16", shape=(4,), strides=(1,))
    return ModelPackage(
        name="two",
        batch=1,
        gpu="test",
        arch="sm_90",
        inputs=(spec,),
        outputs=(spec,),
        buffers=(Buffer(id="in", kind=BufferKind.INPUT, nbytes=8),),
        kernels=tuple(KernelImage(id=name, entry=name) for name in names),
        steps=(
            KernelStep(kernel="gather", grid=(1, 1, 1), block=(128, 1, 1), arguments=(PointerArgument(buffer="in"),)),
        ),
    )


def test_code_is_kept_and_read_again(package: ModelPackage, tmp_path: Path) -> None:
    made = color_kernels(package, tmp_path, SHAPE)
    again = read_colored(package, tmp_path, SHAPE)
    assert again == made
    assert set(made.cubins) == {"add_relu", "gather"}


def test_a_kernel_that_can_not_be_colored_leaves_nothing(package: ModelPackage, tmp_path: Path) -> None:
    path = tmp_path / "kernels" / "gather.ptx"
    path.write_text(source("gather").replace("ld.global.b32", "ld.b32"))
    with pytest.raises(UnsupportedError, match=r"'gather' can't be colored: ld\.b32"):
        color_kernels(package, tmp_path, SHAPE)
    assert not (tmp_path / "colored").exists()
    path.unlink()
    with pytest.raises(MisuseError, match=r"gather\.ptx can't be read"):
        color_kernels(package, tmp_path, SHAPE)


def test_code_that_is_not_there_is_named(package: ModelPackage, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="was not compiled for colors in the form in-page"):
        read_colored(package, tmp_path, SHAPE)
    color_kernels(package, tmp_path, SHAPE)
    (tmp_path / "colored" / shape_name(SHAPE) / "gather.cubin").unlink()
    with pytest.raises(MisuseError, match=r"gather\.cubin can't be read"):
        read_colored(package, tmp_path, SHAPE)


def test_shapes_that_differ_have_names_that_differ() -> None:
    assert len({shape_name(shape) for shape in SHAPES.values()}) == len(SHAPES)


def test_processes_of_their_own_give_the_same_code_and_the_first_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(color_worker, "_FEWEST", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    tasks = [Task(name, source(name), SHAPE, None, "sm_90a") for name in ("add_relu", "gather", "softmax")]
    assert color_all(tasks) == [color(task) for task in tasks]
    broken = [replace(task, ptx=task.ptx.replace("ld.global", "ld")) for task in tasks[1:]]
    with pytest.raises(UnsupportedError, match="'gather' can't be colored"):
        color_all([tasks[0], *broken])


def test_kernels_that_are_faster_with_a_shadow_page_table_get_one(
    package: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SHAPES["pair"]
    table = PlacementTable(package.gpu)
    table.note_shadowed(shape.form, source("gather"), True)
    monkeypatch.setattr(PlacementTable, "load", lambda gpu: table)
    mixed = colored_kernels(package, tmp_path, shape, mixed=True)
    assert mixed.shadowed == {"gather"}
    assert (
        mixed
        == colored_kernels(package, tmp_path, shape, mixed=True)
        == read_colored(package, tmp_path, shape, mixed=True)
    )
    usual = colored_kernels(package, tmp_path, shape)
    assert not usual.shadowed
    assert usual.cubins["add_relu"] == mixed.cubins["add_relu"]
    shadow = color(Task("gather", source("gather"), shadow_shape(shape), None, "sm_90a"))
    assert mixed.cubins["gather"] == shadow != usual.cubins["gather"]
