"""On a GPU: a package gives the same bits in colored memory as in plain memory, in every form of translation."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ptx_cases import PAGES, SHAPES, source, translation

from missile.coloring.pool import ColoredPool
from missile.coloring.shares import Share
from missile.coloring.translation import Translation
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.package import (
    Buffer,
    BufferKind,
    BytesArgument,
    FillStep,
    KernelImage,
    KernelStep,
    ModelPackage,
    PointerArgument,
    TensorSpec,
)
from missile.compiler.planning import needed_bytes
from missile.compiler.weights import WEIGHTS_FILE, write_weights
from missile.errors import UnsupportedError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu

pytestmark = pytest.mark.gpu

pytest.importorskip("triton", reason="its wheel has the assembler")

COUNT = 5000  # half-precision values
BLOCK = 2048  # that a block of the kernel works on


def _add(x: str, y: str, out: str) -> KernelStep:
    pointers = tuple(PointerArgument(buffer=name) for name in (x, y, out))
    scalars = (struct.pack("<i", COUNT), bytes(8), bytes(8))
    arguments = (*pointers, *(BytesArgument(value=value.hex()) for value in scalars))
    return KernelStep(kernel="add_relu", grid=(-(-COUNT // BLOCK), 1, 1), block=(256, 1, 1), arguments=arguments)


def _package(gpu: Gpu, directory: Path) -> ModelPackage:
    """out = relu(relu(x + w) + (zeros but for what a fill of a part puts there)); a state is counted up."""
    kinds = {
        "x": BufferKind.INPUT,
        "w": BufferKind.WEIGHT,
        "s": BufferKind.SCRATCH,
        "t": BufferKind.SCRATCH,
        "state": BufferKind.STATE,
        "out": BufferKind.OUTPUT,
    }
    spec = TensorSpec(name="x", buffer="x", dtype="float16", shape=(COUNT,), strides=(1,))
    major, minor = gpu.info.compute_capability
    package = ModelPackage(
        name="sum",
        batch=1,
        gpu=gpu.info.name,
        arch=f"sm_{major}{minor}",
        inputs=(spec,),
        outputs=(spec.model_copy(update={"buffer": "out"}),),
        buffers=tuple(Buffer(id=name, kind=kind, nbytes=2 * COUNT, first=0, last=9) for name, kind in kinds.items()),
        kernels=(KernelImage(id="add_relu", entry="add_relu"),),
        steps=(
            FillStep(buffer="t", nbytes=2 * COUNT, value=0),
            FillStep(buffer="t", offset=1001, nbytes=777, value=0x3C),
            _add("x", "w", "s"),
            _add("state", "w", "state"),
            _add("s", "t", "s"),
            _add("s", "state", "out"),
        ),
    )
    (directory / "kernels").mkdir(parents=True)
    (directory / "kernels" / "add_relu.ptx").write_text(source("add_relu"))
    noise = np.random.default_rng(3).standard_normal(COUNT).astype(np.float16)
    write_weights({"w": noise.view(np.uint8)}, directory / WEIGHTS_FILE)
    return package


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    try:
        opened = open_gpu("cuda:0")
    except UnsupportedError as error:
        pytest.skip(str(error))
    with opened:
        yield opened


@pytest.fixture(scope="module")
def package(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPackage, Path]:
    if gpu.info.compute_capability != (9, 0):
        pytest.skip("the kernels are for Hopper")
    directory: Path = tmp_path_factory.mktemp("package")
    return _package(gpu, directory), directory


def _outputs(gpu: Gpu, model: BoundModel, runs: int = 2) -> list[bytes]:
    """What `runs` requests give, one after another."""
    stream = gpu.create_stream()
    given, got = gpu.allocate_host(model.input_bytes), gpu.allocate_host(model.output_bytes)
    given.array[:] = np.random.default_rng(4).standard_normal(COUNT).astype(np.float16).view(np.uint8)
    found = []
    for _ in range(runs):
        stream.copy_to_device(model.input_address, given)
        stream.launch_graph(model.graph)
        stream.copy_to_host(got, model.output_address)
        stream.synchronize()
        found.append(got.array.tobytes())
    given.free()
    got.free()
    stream.close()
    return found


def _large_enough(form: str, nbytes: int) -> Translation:
    for seed in range(1000):
        found = translation(SHAPES[form], np.random.default_rng(seed))
        if found.logical_bytes - found.shape.head_bytes >= nbytes:
            return found
    raise AssertionError("no translation of this shape is large enough")


@pytest.mark.parametrize("form", SHAPES)
def test_the_same_bits_in_colored_memory(gpu: Gpu, package: tuple[ModelPackage, Path], form: str) -> None:
    model, directory = package
    plain = bind(model, directory, gpu, tenant="plain")
    expected = _outputs(gpu, plain)
    plain.close()
    assert expected[0] != expected[1]  # the state counts
    bound = _large_enough(form, needed_bytes(model))
    with ColoredPool(gpu, PAGES) as pool:
        order = np.random.default_rng(5).permutation(PAGES)[: bound.pages]
        memory = pool.attach(Share("tenant", (0,), tuple(order.tolist()), bound))
        colored = bind_colored(model, directory, gpu, memory)
        assert _outputs(gpu, colored) == expected
        colored.close()
        assert memory.in_use == 0
