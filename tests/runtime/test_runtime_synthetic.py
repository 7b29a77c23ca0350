from __future__ import annotations

import numpy as np
import pytest

from missile.compiler.package import BytesArgument, KernelStep, PointerArgument
from missile.compiler.synthetic import SYNTHETIC, bind_synthetic, is_synthetic, synthetic_package
from missile.errors import MisuseError
from missile.gpu.cuda import nvrtc


@pytest.mark.parametrize("model", SYNTHETIC)
def test_plans_stay_inside_their_buffers(gpu, model):
    package = synthetic_package(model, gpu.info)
    sizes = {buffer.id: buffer.nbytes for buffer in package.buffers}
    for step in package.steps:
        assert isinstance(step, KernelStep)
        profile = step.profile
        assert profile is not None
        assert profile.solo_ns == 0.0  # never measured, so never claimed
        assert profile.blocks == step.grid[0]
        pointers = [argument for argument in step.arguments if isinstance(argument, PointerArgument)]
        assert all(pointer.offset < sizes[pointer.buffer] for pointer in pointers)
        assert profile.footprint_bytes <= sum(sizes.values())
    gemv = package.steps[-1]
    if model == "synthetic-gemv":
        rows, columns = (
            int.from_bytes(bytes.fromhex(a.value), "little") for a in gemv.arguments if isinstance(a, BytesArgument)
        )
        assert gemv.arguments[0].offset + 2 * rows * columns <= sizes["weights"]


@pytest.mark.parametrize("model", SYNTHETIC)
def test_they_run_on_a_simulated_gpu_and_give_their_memory_back(gpu, model):
    before = gpu.memory_free()
    bound = bind_synthetic(model, gpu, tenant="x")
    assert before - gpu.memory_free() >= sum(buffer.nbytes for buffer in bound.package.buffers)
    stream = gpu.create_stream()
    start, end = gpu.create_event(), gpu.create_event()
    stream.record(start)
    stream.launch_graph(bound.graph)
    stream.record(end)
    stream.synchronize()
    assert 10_000 < end.time_ns() - start.time_ns() < 5_000_000
    bound.close()
    assert gpu.memory_free() == before


def test_names():
    assert is_synthetic("synthetic-copy")
    assert not is_synthetic("resnet34")


def test_an_unknown_one_names_the_known(gpu):
    with pytest.raises(MisuseError, match="synthetic-copy, synthetic-gemv, synthetic-spin, synthetic-tiny"):
        synthetic_package("synthetic-nothing", gpu.info)


@pytest.mark.skipif(nvrtc.why_unavailable() is not None, reason="NVRTC is not installed")
def test_kernels_compile_and_have_the_entries_that_packages_name(gpu):
    image = nvrtc.cubin("synthetic", "sm_90")
    for model in SYNTHETIC:
        for kernel in synthetic_package(model, gpu.info).kernels:
            assert kernel.entry.encode() in image


@pytest.mark.gpu
def test_the_gemv_chain_computes_matrix_vector_products():
    from missile.gpu import open_gpu

    with open_gpu("cuda:0") as gpu:
        bound = bind_synthetic("synthetic-gemv", gpu, tenant="x")
        stream = gpu.create_stream()
        stream.launch(bound.operations[0])
        side = 8192

        def read(buffer: str, count: int) -> np.ndarray:
            host = gpu.allocate_host(2 * count)
            stream.copy_to_host(host, bound.addresses[buffer])
            stream.synchronize()
            return host.array.view(np.float16).astype(np.float32)

        matrix, source, target = read("weights", side * side), read("even", side), read("odd", side)
        expected = matrix.reshape(side, side) @ source
        np.testing.assert_allclose(target, expected, rtol=2e-3, atol=2e-6)
        assert np.abs(expected).max() > 1e-4
        bound.close()
