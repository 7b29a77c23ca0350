"""Bound models made preemptible: their plan, their marks, their code on disk, and what they refuse."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from missile.coloring.pool import ColoredPool
from missile.coloring.shape import Form, Shape
from missile.coloring.shares import Share
from missile.coloring.translation import InPageTranslation
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.package import KernelImage, KernelStep, ModelPackage
from missile.compiler.preemptible import control_of, long_blocks, preempt_model
from missile.compiler.preemptible_code import (
    PreemptibleKernels,
    build_preemptible,
    decision_places,
    preemptible_kernels,
    read_preemptible,
)
from missile.compiler.ptx.preempt import Place
from missile.errors import MisuseError, UnsupportedError
from missile.gpu import open_gpu
from missile.gpu.interface import Launch
from missile.probe.layout import PageLayout

INPUTS = Path(__file__).parents[1] / "ptx" / "inputs"
SHAPE = Shape(Form.IN_PAGE, PageLayout(2 << 20, (*range(8), 9)))


@pytest.fixture
def plan(package: ModelPackage) -> ModelPackage:
    """The toy package without its fill."""
    return package.model_copy(update={"steps": package.steps[1:]})


class Hardware:
    """A simulated GPU that takes code as hardware does, and remembers which."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self.info = replace(gpu.info, simulated=False)
        self.images: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gpu, name)

    def load_module(self, image: bytes, *, name: str = "") -> Any:
        self.images.append(image)
        return SimpleNamespace(kernel=lambda entry: f"preemptible {entry}", close=lambda: None)

    def create_graph(self, operations: Any) -> Any:
        return SimpleNamespace(close=lambda: None)


def bound(plan: ModelPackage, gpu: Any) -> BoundModel:
    return bind(plan, None, gpu, tenant="toy")


def test_on_a_simulated_gpu_launches_only_name_their_control(plan: ModelPackage) -> None:
    with open_gpu("sim:h100") as gpu:
        plain = bound(plan, gpu)
        model = preempt_model(plain, gpu, None)
        control = control_of(model)
        for step, (before, after) in enumerate(zip(plain.operations, model.operations, strict=True)):
            assert isinstance(before, Launch)
            assert isinstance(after, Launch)
            assert after.preempt is not None
            assert (after.preempt.control, after.preempt.step) == (control, step)
            assert replace(after, preempt=None) == before
        model.close()
        model.close()


def test_on_hardware_launches_take_three_more_arguments_and_marks_of_their_own(plan: ModelPackage) -> None:
    with open_gpu("sim:h100") as gpu:
        plain = bound(plan, gpu)
        hardware: Any = Hardware(gpu)
        model = preempt_model(plain, hardware, PreemptibleKernels(None, {"000_a": b"A", "001_b": b"B"}))
        assert hardware.images == [b"A", b"B"]
        spans = []
        for step, (before, after) in enumerate(zip(plain.operations, model.operations, strict=True)):
            assert isinstance(before, Launch)
            assert isinstance(after, Launch)
            assert after.kernel == f"preemptible {before.kernel.name}"
            assert after.params[: len(before.params)] == before.params
            control, marks, number = (int.from_bytes(value, "little") for value in after.params[len(before.params) :])
            assert (control, number) == (control_of(model).address, step + 1)
            spans.append((marks, marks + after.grid[0] * after.grid[1] * after.grid[2]))
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert model.nbytes == plain.nbytes + spans[-1][1] - spans[0][0]


def test_a_model_in_colored_memory_has_its_moves_and_fills_preempted_too(package: ModelPackage) -> None:
    with open_gpu("sim:h100") as gpu, ColoredPool(gpu, 2) as pool:
        translation = InPageTranslation(SHAPE, np.arange(1000), 2)
        plain = bind_colored(package, None, gpu, pool.attach(Share("toy", (1, 3), (0, 1), translation)))
        assert plain.shape == SHAPE
        hardware: Any = Hardware(gpu)
        with pytest.raises(MisuseError, match="is in colored memory and its preemptible code is for plain memory"):
            preempt_model(plain, hardware, PreemptibleKernels(None, {"000_a": b"A", "001_b": b"B"}))
        model = preempt_model(plain, hardware, PreemptibleKernels(SHAPE, {"000_a": b"A", "001_b": b"B"}, b"T"))
        names = [str(launch.kernel) for launch in model.operations if isinstance(launch, Launch)]
        assert names == [
            f"preemptible {name}" for name in ("missile_scatter", "missile_fill", "a", "b", "a", "missile_gather")
        ]
        steps = [
            int.from_bytes(launch.params[-1], "little") for launch in model.operations if isinstance(launch, Launch)
        ]
        assert steps == [1, 2, 3, 4, 5, 6]
        simulated = preempt_model(plain, gpu, None)
        stream = gpu.create_stream()
        stream.launch_graph(simulated.graph)
        stream.synchronize()
        model.close()


def test_fills_and_missing_code_are_refused_and_leave_the_model_as_it_was(
    package: ModelPackage, plan: ModelPackage
) -> None:
    with open_gpu("sim:h100") as gpu:
        with pytest.raises(UnsupportedError, match="'toy' can't be preempted: step 0 is a fill"):
            preempt_model(bound(package, gpu), gpu, None)
        plain = bound(plan, gpu)
        hardware: Any = Hardware(gpu)
        for kernels in (None, PreemptibleKernels(None, {"000_a": b"A"})):
            with pytest.raises(MisuseError, match="no preemptible code for kernel"):
                preempt_model(plain, hardware, kernels)
        with pytest.raises(MisuseError, match="'toy' can't be preempted"):
            control_of(plain)
        stream = gpu.create_stream()
        stream.launch_graph(plain.graph)
        stream.synchronize()
        plain.close()


def test_kernels_decide_late_when_all_their_launches_are_short(plan: ModelPackage) -> None:
    assert decision_places(plan, 6000.0) == {"000_a": Place.EARLY, "001_b": Place.LATE}
    assert decision_places(plan, 9000.0) == {"000_a": Place.LATE, "001_b": Place.LATE}
    unknown = tuple(
        step.model_copy(update={"profile": None}) if isinstance(step, KernelStep) else step for step in plan.steps
    )
    assert set(decision_places(plan.model_copy(update={"steps": unknown})).values()) == {Place.EARLY}


def test_long_blocks_are_named_longest_first(plan: ModelPackage) -> None:
    # 8 blocks, all at once: a block takes as long as the launch.
    assert [(entry.step, entry.block_ns) for entry in long_blocks(plan, 132, 1000.0)] == [
        (2, 9000.0),
        (0, 5000.0),
        (1, 5000.0),
    ]
    # On one SM 4 of 8 run at once.
    assert [entry.block_ns for entry in long_blocks(plan, 1, 4000.0)] == [4500.0]
    assert long_blocks(plan, 132) == ()


@pytest.mark.parametrize("shape", [None, SHAPE], ids=["plain", "colored"])
def test_code_is_kept_by_shape_and_read_again(plan: ModelPackage, tmp_path: Path, shape: Shape | None) -> None:
    pytest.importorskip("triton", reason="its wheel has the assembler")
    names = ("add_relu", "gather")
    plan = plan.model_copy(update={"kernels": tuple(KernelImage(id=name, entry=name) for name in names)})
    (tmp_path / "kernels").mkdir()
    for name in names:
        (tmp_path / "kernels" / f"{name}.ptx").write_text((INPUTS / f"{name}.ptx").read_text())
    with pytest.raises(MisuseError, match="not compiled to be preempted"):
        read_preemptible(plan, tmp_path, shape)
    with ThreadPoolExecutor(2) as pool:
        made = build_preemptible(plan, tmp_path, shape, executor=pool)
    assert set(made.cubins) == set(names)
    assert bool(made.transfer) == (shape is not None)
    assert preemptible_kernels(plan, tmp_path, shape) == made
    with pytest.raises(MisuseError, match="not compiled to be preempted"):
        read_preemptible(plan, tmp_path, None if shape else SHAPE)
    broken = (
        (tmp_path / "kernels" / "gather.ptx").read_text().replace("ld.global", "barrier.cluster.wait;\n\tld.global", 1)
    )
    (tmp_path / "kernels" / "gather.ptx").write_text(broken)
    with ThreadPoolExecutor(1) as pool, pytest.raises(UnsupportedError, match="gather"):
        build_preemptible(plan, tmp_path, shape, executor=pool)
    assert read_preemptible(plan, tmp_path, shape) == made
