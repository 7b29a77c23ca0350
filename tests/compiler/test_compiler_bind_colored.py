"""Packages bound in colored memory, on a simulated GPU: addresses, what is launched around the plan, what is given back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from missile.coloring.pool import ColoredPool, TenantMemory
from missile.coloring.shape import LOGICAL_BASE, Form, Shape
from missile.coloring.shares import Share
from missile.coloring.translation import InPageTranslation
from missile.compiler.bind_colored import bind_colored
from missile.compiler.package import Buffer, BufferKind, ModelPackage, PointerArgument
from missile.compiler.planning import needed_bytes, place_buffers
from missile.errors import MisuseError, OutOfMemoryError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Launch
from missile.probe.layout import PageLayout

SHAPE = Shape(Form.IN_PAGE, PageLayout(2 << 20, (*range(8), 9)))
COLORS = (1, 3)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h100") as opened:
        yield opened


@pytest.fixture
def pool(gpu: Gpu) -> Iterator[ColoredPool]:
    with ColoredPool(gpu, 2) as made:
        yield made


def _memory(pool: ColoredPool, quota: int | None = None) -> TenantMemory:
    places = np.random.default_rng(1).permutation(SHAPE.layout.granules)[:1000]
    return pool.attach(Share("toy", COLORS, (0, 1), InPageTranslation(SHAPE, places, 2)), quota=quota)


def _u64(value: bytes) -> int:
    return int.from_bytes(value, "little")


def test_every_buffer_lies_in_the_tenants_logical_memory(gpu: Gpu, pool: ColoredPool, package: ModelPackage) -> None:
    memory = _memory(pool)
    model = bind_colored(package, None, gpu, memory)
    shared = {"s0", "s1"}  # never alive together
    spans = sorted((model.addresses[b.id], b.nbytes) for b in package.buffers if b.id not in shared)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
    for buffer in package.buffers:
        assert model.addresses[buffer.id] >= LOGICAL_BASE
        assert model.addresses[buffer.id] + buffer.nbytes <= LOGICAL_BASE + memory.limit
    assert model.weights_address == model.addresses["w"]
    model.close()


def test_inputs_are_scattered_first_and_outputs_gathered_last(
    gpu: Gpu, pool: ColoredPool, package: ModelPackage
) -> None:
    memory = _memory(pool)
    model = bind_colored(package, None, gpu, memory)
    scatter, fill, *steps, gather = model.operations
    assert isinstance(scatter, Launch)
    assert isinstance(gather, Launch)
    assert [_u64(p) for p in scatter.params[:3]] == [model.input_address, model.addresses["in"], 32]
    assert [_u64(p) for p in gather.params[:3]] == [model.output_address, model.addresses["out"], 16]
    # Where PCIe copies go is plain memory.
    assert model.input_address < LOGICAL_BASE
    assert model.output_address < LOGICAL_BASE
    assert isinstance(fill, Launch)
    assert fill.kernel.name == "missile_fill"
    assert [_u64(p) for p in fill.params[:3]] == [model.addresses["s0"], 600, 0]
    for step, launch in zip(package.steps[1:], steps, strict=True):
        assert isinstance(launch, Launch)
        assert launch.params[-1] == memory.constants
        for argument, value in zip(step.arguments, launch.params[:-1], strict=True):
            if isinstance(argument, PointerArgument):
                assert _u64(value) == model.addresses[argument.buffer] + argument.offset
            else:
                assert value == bytes.fromhex(argument.value)
        assert launch.work is not None
        assert launch.work.bytes_by_color == {1: 0.5, 3: 0.5}
    model.close()


def test_everything_is_given_back(gpu: Gpu, pool: ColoredPool, package: ModelPackage) -> None:
    memory = _memory(pool)
    free = gpu.memory_free()
    model = bind_colored(package, None, gpu, memory)
    assert memory.in_use == needed_bytes(package)
    assert model.nbytes >= memory.in_use
    model.close()
    model.close()
    assert memory.in_use == 0
    assert gpu.memory_free() == free


def test_what_is_missing_is_said_and_nothing_is_kept(gpu: Gpu, pool: ColoredPool, package: ModelPackage) -> None:
    needed = needed_bytes(package)
    memory = _memory(pool, quota=needed - 100)
    with pytest.raises(OutOfMemoryError, match=r"'toy' needs \d+ bytes .* 100 are missing") as caught:
        bind_colored(package, None, gpu, memory)
    assert (caught.value.requested, caught.value.available) == (needed, needed - 100)
    assert memory.in_use == 0


def test_a_broken_plan_is_refused(gpu: Gpu, pool: ColoredPool, package: ModelPackage) -> None:
    memory = _memory(pool)
    broken = package.model_copy(update={"buffers": package.buffers[1:]})
    with pytest.raises(MisuseError, match="names 'in'"):
        bind_colored(broken, None, gpu, memory)
    assert memory.in_use == 0


def test_the_plan_runs(gpu: Gpu, pool: ColoredPool, package: ModelPackage) -> None:
    model = bind_colored(package, None, gpu, _memory(pool))
    stream, start, end = gpu.create_stream(), gpu.create_event(), gpu.create_event()
    stream.record(start)
    stream.launch_graph(model.graph)
    stream.record(end)
    stream.synchronize()
    assert end.time_ns() - start.time_ns() >= 10_000
    assert model.graph.kernels == len(package.steps) + 2
    model.close()


def test_weights_lie_in_order_of_first_use(package: ModelPackage) -> None:
    """Swapping relies on it."""
    late = Buffer(id="w-late", kind=BufferKind.WEIGHT, nbytes=64, first=3, last=3)
    early = Buffer(id="w-early", kind=BufferKind.WEIGHT, nbytes=64, first=0, last=3)
    more = package.model_copy(update={"buffers": (late, *package.buffers, early)})
    offsets = place_buffers(more)[BufferKind.WEIGHT].offsets
    first = {buffer.id: buffer.first for buffer in more.buffers}
    order = sorted(offsets, key=lambda name: offsets[name])
    assert [first[name] for name in order] == sorted(first[name] for name in order)
