"""Real models' packages with their weights on the host, on the simulated GPU: more of them than fit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from missile.compiler.library import find_package
from missile.compiler.package import BufferKind
from missile.errors import MisuseError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.pcie.engine import CopyEngine, EngineOptions
from missile.pcie.swap import Swapper, SwapRun
from missile.runtime.hosted import host_model, weight_bytes

RATE = 54e9


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h100") as opened:
        yield opened


def _run(gpu: Gpu, engine: CopyEngine, swapper: Swapper, run: SwapRun) -> SwapRun:
    while not run.done:
        due = engine.step()
        swapper.poll()
        soon = gpu.now_ns() + 20_000
        gpu.wait([*engine.events(), *swapper.events()], soon if due is None else min(due, soon))
    assert run.error is None
    return run


def test_two_models_share_memory_for_one_and_start_as_their_bytes_arrive(gpu: Gpu) -> None:
    package, directory = find_package("mobilebert", 1, gpu.info)
    budget = weight_bytes(package)
    with CopyEngine(gpu, EngineOptions(h2d_rate=RATE, d2h_rate=RATE)) as engine:
        swapper = Swapper(gpu, engine, budget)
        models = []
        for name in ("one", "two"):
            engine.admit(name)
            models.append(host_model(package, directory, gpu, swapper, gpu.create_stream(), tenant=name))
        cold = [_run(gpu, engine, swapper, swapper.start(name)) for name in ("one", "two", "one")]
        for run, evicted in zip(cold, [(), ("one",), ("two",)], strict=True):
            assert run.evicted == evicted
            # Everything but the padding between buffers.
            used = sum(b.nbytes for b in package.buffers if b.kind is BufferKind.WEIGHT)
            assert used <= run.copied_bytes <= budget
            assert run.weights_ns - run.started_ns >= run.copied_bytes / RATE * 1e9 * 0.98
        warm = _run(gpu, engine, swapper, swapper.start("one"))
        assert warm.copied_bytes == 0
        alone = warm.finished_ns - warm.started_ns
        copying = cold[2].copied_bytes / RATE * 1e9
        assert cold[2].finished_ns - cold[2].started_ns < 1.15 * max(copying, alone) + 0.5 * min(copying, alone)
        swapper.close()
        for model in models:
            model.close()
            model.close()


def test_operations_never_run_before_their_weights(gpu: Gpu) -> None:
    """Each segment ends before the first operation that reads beyond it."""
    package, directory = find_package("resnet34", 1, gpu.info)
    with CopyEngine(gpu, EngineOptions(h2d_rate=RATE, d2h_rate=RATE)) as engine:
        swapper = Swapper(gpu, engine, weight_bytes(package))
        engine.admit("one")
        model = host_model(package, directory, gpu, swapper, gpu.create_stream(), tenant="one")
        parts = model.hosted.parts
        assert len(parts) > 1
        base = model.model.weights_address
        for buffer in package.buffers:
            if buffer.kind is not BufferKind.WEIGHT or not buffer.nbytes:
                continue
            offset = model.model.addresses[buffer.id] - base
            part = next(p for p in parts if p.offset <= offset and offset + buffer.nbytes <= p.offset + p.nbytes)
            assert part.first <= buffer.first
        assert len(model.hosted.operations(base)) == len(package.steps)
        swapper.close()
        model.close()


def test_a_budget_that_is_too_small_is_refused_and_nothing_is_held(gpu: Gpu) -> None:
    package, directory = find_package("resnet34", 1, gpu.info)
    with CopyEngine(gpu, EngineOptions(h2d_rate=RATE, d2h_rate=RATE)) as engine:
        swapper = Swapper(gpu, engine, weight_bytes(package) - 1)
        engine.admit("one")
        free = gpu.memory_free()
        with pytest.raises(MisuseError, match="budget"):
            host_model(package, directory, gpu, swapper, gpu.create_stream(), tenant="one")
        assert gpu.memory_free() == free
        swapper.close()
