"""Models whose launches overlap: their code on disk, their plans, and that what is preempted does not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from missile.coloring.pool import ColoredPool
from missile.coloring.shape import Form, Shape
from missile.coloring.shares import Share
from missile.coloring.translation import InPageTranslation
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.colored import code_version, color_kernels, colored_kernels, is_colored
from missile.compiler.objective import Objective
from missile.compiler.overlap_table import PLAIN, OverlapTable, Tuned, memory_of
from missile.compiler.overlapped import (
    build_overlapped,
    is_overlapped,
    overlapped_kernels,
    prepare_overlapped,
    read_overlapped,
)
from missile.compiler.package import KernelImage, ModelPackage
from missile.compiler.preemptible import preempt_model
from missile.compiler.ptx.overlap import Dependents, Overlap
from missile.errors import MisuseError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Launch
from missile.probe.layout import PageLayout

INPUTS = Path(__file__).parents[1] / "ptx" / "inputs"
SHAPE = Shape(Form.IN_PAGE, PageLayout(2 << 20, (*range(8), 9)))
LATE = Overlap(Dependents.LATE)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h200") as opened:
        yield opened


@pytest.fixture
def kernels(package: ModelPackage, tmp_path: Path) -> ModelPackage:
    """The toy package with two real kernels on disk."""
    (tmp_path / "kernels").mkdir()
    for name in ("add_relu", "gather"):
        (tmp_path / "kernels" / f"{name}.ptx").write_text((INPUTS / f"{name}.ptx").read_text())
    images = tuple(KernelImage(id=name, entry=name) for name in ("add_relu", "gather"))
    return package.model_copy(update={"kernels": images})


def overlapping(model: BoundModel) -> set[bool]:
    return {operation.overlaps for operation in model.operations if isinstance(operation, Launch)}


def test_launches_overlap_only_where_it_is_asked_for(gpu: Gpu, package: ModelPackage) -> None:
    assert overlapping(bind(package, None, gpu, tenant="toy")) == {False}
    model = bind(package, None, gpu, tenant="toy", overlap=Overlap())
    assert overlapping(model) == {True}


def test_colored_launches_overlap_those_that_move_data_too(gpu: Gpu, package: ModelPackage) -> None:
    with ColoredPool(gpu, 2) as pool:
        places = np.random.default_rng(1).permutation(SHAPE.layout.granules)[:1000]
        memory = pool.attach(Share("toy", (1, 3), (0, 1), InPageTranslation(SHAPE, places, 2)))
        for overlap in (None, Overlap()):
            with_movers = bind_colored(package, None, gpu, memory, overlap=overlap)
            assert overlapping(with_movers) == {overlap is not None}
            with_movers.close()


def test_what_is_preempted_does_not_overlap(gpu: Gpu, package: ModelPackage) -> None:
    """Its code does not wait; a bound model that did loses it."""
    plan = package.model_copy(update={"steps": package.steps[1:]})
    model = preempt_model(bind(plan, None, gpu, tenant="toy", overlap=Overlap()), gpu, None)
    assert overlapping(model) == {False}


def test_code_is_kept_by_how_it_overlaps(kernels: ModelPackage, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    made = build_overlapped(kernels, tmp_path, Overlap())
    assert set(made.cubins) == {"add_relu", "gather"}
    assert not made.apart
    assert all(cubin[:4] == b"\x7fELF" for cubin in made.cubins.values())
    assert read_overlapped(kernels, tmp_path, Overlap()) == made
    assert not is_overlapped(tmp_path, LATE)
    with pytest.raises(MisuseError, match="has no code that overlaps"):
        read_overlapped(kernels, tmp_path, LATE)
    assert overlapped_kernels(kernels, tmp_path, LATE) != made
    (tmp_path / "overlapped" / "start" / "version").write_text("another")
    assert not is_overlapped(tmp_path, Overlap())


def test_packages_are_made_at_once_and_only_where_code_is_missing(kernels: ModelPackage, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "kernels", other / "kernels")
    prepare_overlapped([(kernels, tmp_path), (kernels, other)], LATE)
    made = read_overlapped(kernels, other, LATE)
    assert made == read_overlapped(kernels, tmp_path, LATE)
    (other / "kernels" / "gather.ptx").unlink()  # not looked at again
    prepare_overlapped([(kernels, tmp_path), (kernels, other)], LATE)
    assert overlapped_kernels(kernels, other, LATE) == made


def test_a_kernel_that_cant_overlap_is_launched_as_usual(kernels: ModelPackage, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    path = tmp_path / "kernels" / "gather.ptx"
    path.write_text(path.read_text().replace("sm_90a", "sm_80"))
    made = build_overlapped(kernels, tmp_path, LATE)
    assert set(made.cubins) == {"add_relu"}
    assert "'gather' is for sm_80" in made.apart["gather"]
    assert read_overlapped(kernels, tmp_path, LATE) == made
    path.unlink()
    assert "gather.ptx can't be read" in build_overlapped(kernels, tmp_path, LATE).apart["gather"]
    waits = "griddepcontrol.wait;\n\tret;"
    path.write_text((INPUTS / "gather.ptx").read_text().replace("ret;", waits))
    assert "waits for launches before it already" in build_overlapped(kernels, tmp_path, LATE).apart["gather"]


def test_a_colored_kernel_that_cant_overlap_is_colored_all_the_same(kernels: ModelPackage, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    path = tmp_path / "kernels" / "gather.ptx"
    path.write_text(path.read_text().replace("ret;", "griddepcontrol.wait;\n\tret;"))
    usual = color_kernels(kernels, tmp_path, SHAPE, keep=False)
    made = color_kernels(kernels, tmp_path, SHAPE, overlap=LATE)
    assert (made.overlaps("add_relu"), made.overlaps("gather"), made.overlaps()) == (True, False, True)
    assert made.cubins["add_relu"] != usual.cubins["add_relu"]
    assert made.cubins["gather"] == usual.cubins["gather"]
    assert colored_kernels(kernels, tmp_path, SHAPE, overlap=LATE) == made


def test_a_package_that_cant_be_written_to_keeps_nothing(kernels: ModelPackage, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    (tmp_path / "overlapped").write_text("in the way")
    assert set(overlapped_kernels(kernels, tmp_path, LATE).cubins) == {"add_relu", "gather"}
    assert not is_overlapped(tmp_path, LATE)


def test_tuned_code_has_each_kernel_as_the_table_says(
    kernels: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    tables = tmp_path / "tables"
    monkeypatch.setattr("missile.compiler.overlap_table.OVERLAPS", tables)
    monkeypatch.setattr("missile.compiler.colored.OVERLAPS", tables)
    code_version.cache_clear()
    table = OverlapTable(kernels.gpu)
    text = (tmp_path / "kernels" / "gather.ptx").read_text()
    table.note(Objective.ALONE, PLAIN, text, Dependents.START)
    table.note(Objective.ALONE, memory_of(SHAPE.form), text, Dependents.NEVER)
    table.save(tables)
    start, late = (
        build_overlapped(kernels, tmp_path, Overlap(place)).cubins for place in Dependents if place != "never"
    )
    made = overlapped_kernels(kernels, tmp_path, Tuned())
    assert made.cubins == {"add_relu": late["add_relu"], "gather": start["gather"]}
    assert overlapped_kernels(kernels, tmp_path, Tuned(Objective.BESIDE)).cubins == late
    late_colored, never_colored = (
        color_kernels(kernels, tmp_path, SHAPE, overlap=Overlap(place)) for place in (Dependents.LATE, Dependents.NEVER)
    )
    colored = colored_kernels(kernels, tmp_path, SHAPE, overlap=Tuned())
    assert colored.cubins["gather"] == never_colored.cubins["gather"]
    assert colored.cubins["add_relu"] == late_colored.cubins["add_relu"]
    assert colored.transfer == late_colored.transfer
    table.note(Objective.ALONE, PLAIN, text, Dependents.NEVER)
    table.save(tables)
    code_version.cache_clear()
    assert not is_overlapped(tmp_path, Tuned())
    assert is_overlapped(tmp_path, LATE)
    code_version.cache_clear()


def test_colored_code_that_overlaps_lies_apart(kernels: ModelPackage, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    usual = color_kernels(kernels, tmp_path, SHAPE)
    made = colored_kernels(kernels, tmp_path, SHAPE, overlap=Overlap())
    assert made.overlap == Overlap()
    assert usual.overlap is None
    assert made.transfer != usual.transfer
    assert all(made.cubins[name] != usual.cubins[name] for name in made.cubins)
    assert colored_kernels(kernels, tmp_path, SHAPE, overlap=Overlap()) == made
    assert colored_kernels(kernels, tmp_path, SHAPE) == usual
    assert not is_colored(tmp_path, SHAPE, overlap=LATE)
