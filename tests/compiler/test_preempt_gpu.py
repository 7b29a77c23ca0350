"""Preemption on a real GPU: kernels that work in place, stopped at random instants, give what they give undisturbed."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
from test_preempt_blocks import KERNEL

from missile.compiler.ptx.preempt import Look, Place, arguments, make_preemptible
from missile.errors import UnsupportedError
from missile.gpu import open_gpu
from missile.gpu.interface import Fill, Gpu, Launch, Preemption

pytestmark = pytest.mark.gpu

THREADS = 3  # as the kernel requires
GRID = (400, 50, 1)
BLOCKS = GRID[0] * GRID[1]
CELLS = BLOCKS * THREADS
STEPS = 12
REQUESTS = 60


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    try:
        opened = open_gpu("cuda:0")
    except UnsupportedError as error:
        pytest.skip(str(error))
    with opened:
        if opened.info.compute_capability < (9, 0):
            pytest.skip("the kernel is for Hopper")
        yield opened


def reference(start: list[np.ndarray]) -> list[np.ndarray]:
    cells = [array.copy() for array in start]
    for _ in range(REQUESTS):
        for step in range(STEPS):
            cells[step % 2] = 3 * cells[step % 2] + np.roll(cells[(step + 1) % 2], -5) + np.uint32(step + 1)
    return cells


@pytest.mark.parametrize(("look", "place"), [(Look.FRESH, Place.EARLY), (Look.CACHED, Place.LATE)])
def test_random_flags_change_nothing(gpu: Gpu, look: Look, place: Place) -> None:
    source = KERNEL.replace("sm_90a", "sm_90").replace("8.7", "8.0")
    module = gpu.load_module(make_preemptible(source, look=look, place=place).encode(), name="step")
    kernel = module.kernel("step")
    control = gpu.create_preempt_control()
    buffers = [gpu.allocate(4 * CELLS) for _ in range(2)]
    marks = gpu.allocate(STEPS * BLOCKS)
    host = gpu.allocate_host(4 * CELLS)
    stream = gpu.create_stream()
    stream.launch(Fill(marks.address, marks.nbytes))
    start = [np.arange(CELLS, dtype=np.uint32) * np.uint32(77 + number) for number in range(2)]
    for buffer, contents in zip(buffers, start, strict=True):
        host.array.view(np.uint32)[:] = contents
        stream.copy_to_device(buffer.address, host)
        stream.synchronize()
    launches = []
    for step in range(STEPS):
        acc, other = buffers[step % 2].address, buffers[(step + 1) % 2].address
        params = (
            acc.to_bytes(8, "little"),
            other.to_bytes(8, "little"),
            CELLS.to_bytes(4, "little"),
            (step + 1).to_bytes(4, "little"),
            *arguments(control.address, marks.address + step * BLOCKS, step),
        )
        launches.append(Launch(kernel, GRID, (THREADS, 1, 1), 0, params, preempt=Preemption(control, step)))
    graph = gpu.create_graph(launches)
    rng = random.Random(1)
    resumed = 0
    for _ in range(REQUESTS):
        control.begin(stream)
        stream.launch_graph(graph)
        while True:
            _spin(rng.uniform(0, 150e-6))
            control.raise_flag()
            _spin(rng.uniform(0, 30e-6))
            control.lower_flag()
            stream.synchronize()
            gpu.synchronize()
            left = control.left()
            if left is None:
                break
            resumed += 1
            control.resume(stream, left)
            stream.launch_graph(graph)
    assert resumed > 5
    found = []
    for buffer in buffers:
        stream.copy_to_host(host, buffer.address)
        stream.synchronize()
        found.append(host.array.view(np.uint32).copy())
    assert all(np.array_equal(a, b) for a, b in zip(found, reference(start), strict=True))
    graph.close()
    control.close()


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
