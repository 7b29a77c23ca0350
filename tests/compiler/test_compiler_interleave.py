"""Images from planes into pixels: the kernel's code, run thread by thread."""

from __future__ import annotations

import random

import numpy as np
import pytest
from preempt_machine import Machine, module

from missile.compiler.ptx.interleave import INTERLEAVE, THREADS, interleave_grid, interleave_ptx
from missile.gpu import open_gpu
from missile.gpu.interface import Launch


@pytest.mark.parametrize(
    ("images", "channels", "pixels", "nbytes"), [(2, 3, 300, 2), (1, 2, 1, 1), (3, 8, 5, 8), (1, 4, 257, 4)]
)
def test_every_value_lands_in_its_pixel(images: int, channels: int, pixels: int, nbytes: int) -> None:
    machine = Machine(random.Random(1))
    source, target = 0x7F00_0000_0000, 0x7F10_0000_0000
    values = np.random.default_rng(2).integers(0, 256, (images, channels, pixels, nbytes), np.uint8)
    for at, byte in enumerate(values.tobytes()):
        machine.memory[source + at] = byte
    before = set(machine.memory)
    grid = interleave_grid(images, pixels)
    params = (source.to_bytes(8, "little"), target.to_bytes(8, "little"))
    machine.launch(module(interleave_ptx(channels, pixels, nbytes)), params, grid[:2], THREADS)
    machine.drain()
    expected = values.transpose(0, 2, 1, 3).tobytes()
    assert bytes(machine.memory[target + at] for at in range(len(expected))) == expected
    assert set(machine.memory) - before == set(range(target, target + len(expected)))  # and nothing else is written


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("images", "channels", "pixels", "kind"), [(1, 3, 224 * 224, "float16"), (5, 8, 257, "float64")]
)
def test_a_gpu_does_the_same(images: int, channels: int, pixels: int, kind: str) -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal((images, channels, pixels)).astype(kind)
    with open_gpu("cuda:0") as gpu:
        target = "sm_{}{}".format(*min(gpu.info.compute_capability, (9, 0)))
        code = gpu.load_module(interleave_ptx(channels, pixels, values.itemsize, target).encode(), name="test/planes")
        planes, turned = gpu.allocate(values.nbytes), gpu.allocate(values.nbytes)
        given, taken = gpu.allocate_host(values.nbytes), gpu.allocate_host(values.nbytes)
        given.array[:] = values.reshape(-1).view(np.uint8)
        stream = gpu.create_stream()
        stream.copy_to_device(planes.address, given)
        params = tuple(buffer.address.to_bytes(8, "little") for buffer in (planes, turned))
        grid = interleave_grid(images, pixels)
        stream.launch(Launch(code.kernel(INTERLEAVE), grid, (THREADS, 1, 1), 0, params))
        stream.copy_to_host(taken, turned.address)
        stream.synchronize()
        np.testing.assert_array_equal(
            taken.array.view(kind).reshape(images, pixels, channels), values.transpose(0, 2, 1)
        )
