"""Images come from clients in planes, and models want them channels-last: the GPU turns them, not the engine's thread.

On a processor it is a copy of single values with strides, ten times as slow as a plain one, and no request is launched
meanwhile. On the GPU it is one kernel in front of the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from missile.compiler.bind import BoundModel
from missile.compiler.package import TensorSpec
from missile.compiler.ptx.interleave import INTERLEAVE, MOST_CHANNELS, THREADS, interleave_grid, interleave_ptx
from missile.gpu.interface import Gpu, Launch
from missile.gpu.work import KernelWork
from missile.serving.engine.packages import item_bytes

__all__ = ["in_planes", "takes_planes"]

_MOST_BYTES = 1 << 31  # the kernel counts values with 32 bits, and finds planes by offsets of 31


def takes_planes(specs: Sequence[TensorSpec]) -> bool:
    """Whether all of a model's inputs are images of few channels, channels-last without gaps."""
    return bool(specs) and all(_is_pixels(spec) for spec in specs)


def _is_pixels(spec: TensorSpec) -> bool:
    if len(spec.shape) < 3 or not 1 < spec.shape[1] <= MOST_CHANNELS:
        return False
    images, channels, *sizes = spec.shape
    pixels = math.prod(sizes)
    within = (channels * math.prod(sizes[index + 1 :]) for index in range(len(sizes)))
    fits = images * channels * pixels * item_bytes(spec) < _MOST_BYTES and images < 1 << 16
    return pixels > 1 and fits and spec.strides == (channels * pixels, 1, *within)


def in_planes(bound: BoundModel, gpu: Gpu, undo: ExitStack) -> BoundModel:
    """`bound`, a model in plain memory that `takes_planes`, with inputs in planes: its input range is another one, where
    each tensor lies as before but contiguous. The model itself stays `bound`'s; what is made here is given to `undo`.
    """
    plain = gpu.allocate(bound.input_bytes, tenant=bound.tenant)
    undo.callback(plain.free)
    major, minor = min(gpu.info.compute_capability, (9, 0))  # code for it runs on what came later
    turns = []
    for spec in bound.package.inputs:
        images, channels, *sizes = spec.shape
        pixels, nbytes = math.prod(sizes), item_bytes(spec)
        module = gpu.load_module(
            interleave_ptx(channels, pixels, nbytes, f"sm_{major}{minor}").encode(), name=f"{bound.tenant}/planes"
        )
        undo.callback(module.close)
        grid = interleave_grid(images, pixels)
        moved = images * channels * pixels * nbytes
        work = KernelWork(
            blocks=grid[0] * grid[1],
            threads=THREADS,
            blocks_per_sm=8,
            read_bytes=moved,
            write_bytes=moved,
            footprint_bytes=2 * moved,
        )
        target = bound.addresses[spec.buffer] + spec.offset
        places = (plain.address + target - bound.input_address, target)
        params = tuple(place.to_bytes(8, "little") for place in places)
        turns.append(Launch(module.kernel(INTERLEAVE), grid, (THREADS, 1, 1), 0, params, work))
    operations = (*turns, *bound.operations)
    graph = gpu.create_graph(operations)
    undo.callback(graph.close)
    nbytes = bound.nbytes + bound.input_bytes
    return replace(bound, operations=operations, graph=graph, input_address=plain.address, nbytes=nbytes)
