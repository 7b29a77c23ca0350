"""A model on some SMs of a simulated GPU, another on the rest: as `benchmarks/gpu/overlap_tune.py` measures it on hardware.

What the constants of the simulator's contention were set by, and what holds them (docs/simulator.md).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from missile.compiler.bind import bind
from missile.compiler.library import find_package
from missile.compiler.overlap_table import Tuned
from missile.compiler.synthetic import bind_synthetic, is_synthetic
from missile.gpu import open_gpu
from missile.gpu.interface import Event, Gpu, Graph

__all__ = ["Pair", "service_ns"]

_WARM_UP = 2  # runs that are not counted: the first finds nothing in L2


@dataclass(frozen=True, slots=True)
class Pair:
    """model, neighbour: of the library, or synthetic; neighbour "" for none. sms: of the model; 0 for the whole GPU, which
    both share on plain streams then. overlaps: whether the model's launches do."""

    model: str
    neighbour: str = ""
    sms: int = 0
    overlaps: bool = False


def service_ns(pair: Pair, device: str, *, runs: int = 12) -> float:
    """Median time of a run of `pair.model` in a closed loop, first kernel's start to last one's end, ns; its neighbour runs
    in a closed loop as well and is never waited for."""
    with open_gpu(device) as gpu, ExitStack() as undo:
        split = gpu.split_sms([pair.sms]) if pair.sms else None
        mine = gpu.create_stream(partition=split.parts[0] if split else None)
        theirs = gpu.create_stream(partition=split.remainder if split else None)
        graph = _graph(gpu, pair.model, pair.overlaps, undo)
        load = _graph(gpu, pair.neighbour, False, undo) if pair.neighbour else None
        start, end = gpu.create_event(), gpu.create_event()
        ahead: list[Event] = []

        def keep() -> None:
            """Two runs of the neighbour are in flight."""
            if load is None:
                return
            while len(ahead) < 2 or ahead[-2].done():
                theirs.launch_graph(load)
                ahead.append(gpu.create_event())
                theirs.record(ahead[-1])

        taken = []
        for _ in range(_WARM_UP + runs):
            keep()
            mine.record(start)
            mine.launch_graph(graph)
            mine.record(end)
            while not end.done():
                gpu.wait([end, *ahead[-2:-1]])
                keep()
            taken.append(end.time_ns() - start.time_ns())
        return float(np.median(taken[_WARM_UP:]))


def _graph(gpu: Gpu, model: str, overlaps: bool, undo: ExitStack) -> Graph:
    if is_synthetic(model):
        bound = bind_synthetic(model, gpu, tenant=model)
    else:
        package, directory = find_package(model, None, gpu.info)
        bound = bind(package, directory, gpu, tenant=model, overlap=Tuned() if overlaps else None)
    undo.callback(bound.close)
    return bound.graph
