"""Packages bound to a GPU object; the simulated one stands for both where nothing is read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from missile.compiler.bind import bind
from missile.compiler.package import ModelPackage, PointerArgument
from missile.compiler.weights import WEIGHTS_FILE, write_weights
from missile.errors import KernelFaultError, MisuseError, OutOfMemoryError
from missile.gpu import open_gpu
from missile.gpu.interface import Fill, Gpu, Launch
from missile.gpu.sim import Faults, SimulatedGpu, load_spec
from missile.gpu.sim.spec import KernelFault


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h100") as opened:
        yield opened


def test_plan_runs_and_takes_its_time(gpu: Gpu, package: ModelPackage) -> None:
    model = bind(package, None, gpu, tenant="toy")
    stream, start, end = gpu.create_stream(), gpu.create_event(), gpu.create_event()
    stream.record(start)
    stream.launch_graph(model.graph)
    stream.record(end)
    stream.synchronize()
    assert end.time_ns() - start.time_ns() >= 10_000
    model.close()
    model.close()


def test_arguments_are_addresses_of_disjoint_buffers(gpu: Gpu, package: ModelPackage) -> None:
    model = bind(package, None, gpu, tenant="toy")
    assert len(model.operations) == len(package.steps)
    for step, operation in zip(package.steps[1:], model.operations[1:], strict=True):
        assert isinstance(operation, Launch)
        assert operation.work is not None
        for argument, value in zip(step.arguments, operation.params, strict=True):
            if isinstance(argument, PointerArgument):
                assert int.from_bytes(value, "little") == model.addresses[argument.buffer] + argument.offset
            else:
                assert value == bytes.fromhex(argument.value)
    assert isinstance(model.operations[0], Fill)
    assert model.operations[0].address == model.addresses["s0"]
    shared = {"s0", "s1"}  # never alive together
    spans = [(model.addresses[b.id], b.nbytes) for b in package.buffers if b.id not in shared]
    spans.sort()
    assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
    assert (model.input_address, model.input_bytes) == (model.addresses["in"], 32)
    assert (model.output_address, model.output_bytes) == (model.addresses["out"], 16)
    model.close()


def test_memory_is_given_back(gpu: Gpu, package: ModelPackage) -> None:
    before = gpu.memory_free()
    model = bind(package, None, gpu, tenant="toy")
    assert model.nbytes > 0
    assert gpu.memory_free() <= before - model.nbytes
    model.close()
    assert gpu.memory_free() == before


def test_failing_bind_holds_nothing(gpu: Gpu, package: ModelPackage) -> None:
    before = gpu.memory_free()
    with pytest.raises(MisuseError, match="step 2 names '001_b'"):
        bind(package.model_copy(update={"kernels": package.kernels[:1]}), None, gpu, tenant="toy")
    with pytest.raises(MisuseError, match="step 3 names 's1'"):
        bind(package.model_copy(update={"buffers": package.buffers[:-1]}), None, gpu, tenant="toy")
    huge = package.buffers[2].model_copy(update={"nbytes": 1 << 50})
    with pytest.raises(OutOfMemoryError, match="toy"):
        bind(
            package.model_copy(update={"buffers": (*package.buffers[:2], huge, *package.buffers[3:])}),
            None,
            gpu,
            tenant="toy",
        )
    assert gpu.memory_free() == before


def test_unprofiled_package_is_refused_on_the_simulator(gpu: Gpu, package: ModelPackage) -> None:
    bare = tuple(s if s.kind == "fill" else s.model_copy(update={"profile": None}) for s in package.steps)
    with pytest.raises(MisuseError, match="never profiled"):
        bind(package.model_copy(update={"steps": bare}), None, gpu, tenant="toy")


class AsHardware:
    """A simulated GPU that says it is real, so that kernels are loaded one by one; remembers the modules' names."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu
        self.info = dataclasses.replace(gpu.info, simulated=False)
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gpu, name)

    def load_module(self, image: bytes, *, name: str = "") -> Any:
        self.names.append(name)
        return self._gpu.load_module(image, name=name)


@pytest.mark.parametrize("as_hardware", [False, True])
def test_a_fault_names_the_tenant_and_not_the_package(package: ModelPackage, tmp_path: Path, as_hardware: bool) -> None:
    (tmp_path / "kernels").mkdir()
    for image in package.kernels:
        (tmp_path / "kernels" / f"{image.id}.ptx").write_text(f".visible .entry {image.entry}() {{ ret; }}")
    write_weights({"w": np.zeros(1000, np.uint8)}, tmp_path / WEIGHTS_FILE)
    faults = Faults(kernels=(KernelFault(kernel="b", launch=2),))
    with SimulatedGpu(load_spec("h100"), faults=faults) as simulated:
        gpu: Any = AsHardware(simulated) if as_hardware else simulated
        first, second = (bind(package, tmp_path, gpu, tenant=tenant) for tenant in ("front", "back"))
        if as_hardware:
            assert gpu.names == [f"{tenant}/{kernel}" for tenant in ("front", "back") for kernel in ("000_a", "001_b")]
        stream = gpu.create_stream()
        stream.launch_graph(first.graph)
        stream.synchronize()
        stream.launch_graph(second.graph)
        with pytest.raises(KernelFaultError, match="'back'") as raised:
            stream.synchronize()
        assert raised.value.tenant == "back"


def test_work_that_two_tenants_share_is_still_told_apart(package: ModelPackage) -> None:
    with SimulatedGpu(load_spec("h100"), faults=Faults(kernels=(KernelFault(kernel="a", launch=2),))) as gpu:
        launches = [
            next(step for step in bind(package, None, gpu, tenant=tenant).operations if isinstance(step, Launch))
            for tenant in ("front", "back")
        ]
        stream = gpu.create_stream()
        for launch in launches:
            stream.launch(dataclasses.replace(launch, work=launches[0].work))
        with pytest.raises(KernelFaultError) as raised:
            stream.synchronize()
        assert raised.value.tenant == "back"
