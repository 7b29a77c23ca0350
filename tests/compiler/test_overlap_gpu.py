"""Overlapping launches on a real GPU: kernels that read what other blocks of the launch before wrote give the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from test_preempt_blocks import KERNEL
from test_preempt_gpu import BLOCKS, CELLS, GRID, STEPS, THREADS, reference

from missile.compiler.ptx.overlap import Dependents, Overlap, make_overlapping
from missile.errors import UnsupportedError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Launch

pytestmark = pytest.mark.gpu

REQUESTS = 60  # as the reference has


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


@pytest.mark.parametrize("dependents", Dependents)
@pytest.mark.parametrize("how", ["graph", "stream", "partition", "segments"])
def test_results_are_those_of_launches_one_after_another(gpu: Gpu, dependents: Dependents, how: str) -> None:
    source = KERNEL.replace("sm_90a", "sm_90").replace("8.7", "8.0")
    module = gpu.load_module(make_overlapping(source, Overlap(dependents)).encode(), name="step")
    kernel = module.kernel("step")
    assert BLOCKS * THREADS == CELLS
    buffers = [gpu.allocate(4 * CELLS) for _ in range(2)]
    host = gpu.allocate_host(4 * CELLS)
    split = gpu.split_sms([32]) if how == "partition" else None
    stream = gpu.create_stream(partition=None if split is None else split.parts[0])
    start = [np.arange(CELLS, dtype=np.uint32) * np.uint32(77 + number) for number in range(2)]
    for buffer, contents in zip(buffers, start, strict=True):
        host.array.view(np.uint32)[:] = contents
        stream.copy_to_device(buffer.address, host)
        stream.synchronize()
    launches = []
    for step in range(STEPS):
        acc, other = buffers[step % 2].address, buffers[(step + 1) % 2].address
        numbers = ((acc, 8), (other, 8), (CELLS, 4), (step + 1, 4))
        params = tuple(value.to_bytes(size, "little") for value, size in numbers)
        launches.append(Launch(kernel, GRID, (THREADS, 1, 1), 0, params, overlaps=True))
    # Requests that are cut run as several graphs: the first launch of each starts as usual, and its wait waits for nothing.
    cuts = (0, 1, 4, STEPS) if how == "segments" else (0, STEPS)
    graphs = [gpu.create_graph(launches[first:end]) for first, end in pairwise(cuts) if first < end]
    for _ in range(REQUESTS):
        if how == "stream":
            for launch in launches:
                stream.launch(launch)
        else:
            for graph in graphs:
                stream.launch_graph(graph)
    found = []
    for buffer in buffers:
        stream.copy_to_host(host, buffer.address)
        stream.synchronize()
        found.append(host.array.view(np.uint32).copy())
    assert all(np.array_equal(a, b) for a, b in zip(found, reference(start), strict=True))
    for graph in graphs:
        graph.close()
    stream.close()
