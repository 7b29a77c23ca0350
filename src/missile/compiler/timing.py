"""Timing work that PyTorch launches, on the GPU's clock and free of launch overhead: as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

__all__ = ["capture_graph", "graph_ns", "quick_ns"]


def graph_ns(run: Callable[[], object], *, runs: int = 30) -> float:
    """Median duration of `run` as one CUDA graph, ns. On the current stream, which must not be the default one."""
    for _ in range(3):
        run()
    graph = capture_graph(run)
    for _ in range(3):
        graph.replay()
    return float(np.median([_elapsed_ns(graph.replay) for _ in range(runs)]))


def quick_ns(run: Callable[[], object]) -> float:
    """Shortest duration of `run` in a row of itself (so with a warm L2), ns: cheap, for comparing variants.

    On the current stream, which must not be the default one.
    """
    run()
    once = min(_elapsed_ns(run) for _ in range(2))
    count = int(np.clip(400e3 / max(once, 1.0), 2, 20))

    def row() -> None:
        for _ in range(count):
            run()

    graph = capture_graph(row)
    return min(_elapsed_ns(graph.replay) for _ in range(4)) / count


def capture_graph(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run`, captured on the current stream. Other threads may use the GPU meanwhile."""
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        run()
    finally:
        graph.capture_end()
    return graph


def _elapsed_ns(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e6
