"""Measuring a package on a GPU: the whole plan, and each kernel where it stands in it.

A kernel's time depends on what is in the L2 when it starts, so kernels are timed in place, one after another in the
plan's order, with an event between each two. The events cost time of their own, the same for every kernel; what is taken
off is what makes the kernels' times add up to the whole plan's, measured as one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from missile.compiler.bind import BoundModel, bind
from missile.compiler.package import Bound, KernelProfile, KernelStep, ModelPackage, Step
from missile.gpu.interface import Event, Gpu, GpuInfo, Stream

__all__ = ["Limits", "classify", "measure_steps", "profile_package", "share_total"]

_SHORTEST_NS = 400.0
_CHUNK = 60  # steps timed at once: their launches and events must fit into a stream's queue behind the work before
_HOLD_NS = 15_000_000  # how long the stream is kept busy while that chunk is enqueued

Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a GPU could do at best: VRAM bytes per ns, operations per ns with and without the matrix units (0: unknown)."""

    memory: float
    tensor: float
    scalar: float

    @classmethod
    def of(cls, info: GpuInfo) -> Limits:
        """From what the device reports; matrix operations per SM and clock as in NVIDIA's architecture papers (fp16)."""
        clock = info.clock_hz * 1e-9
        per_clock = {7: 1024, 8: 2048, 9: 4096, 10: 8192}.get(info.compute_capability[0], 0)
        memory = float(info.extra.get("memory_bytes_per_s", 0.0)) * 1e-9
        return cls(memory, info.sms * clock * per_clock, info.sms * clock * 256)


def profile_package(
    package: ModelPackage, directory: Path | None, gpu: Gpu, *, repeats: int = 7, runs: int = 30
) -> ModelPackage:
    """`package` with times measured on `gpu`, which nothing else should be using.

    repeats: timed passes over the kernels; runs: timed runs of the whole plan; the median of each counts.
    """
    with closing(bind(package, directory, gpu, tenant=package.name)) as model:
        total, times = measure_steps(model, gpu, repeats=repeats, runs=runs)
    limits = Limits.of(gpu.info)
    steps = tuple(_timed(step, float(time), limits) for step, time in zip(package.steps, times, strict=True))
    return package.model_copy(update={"steps": steps, "solo_ns": total})


def measure_steps(model: BoundModel, gpu: Gpu, *, repeats: int = 7, runs: int = 30) -> tuple[float, Times]:
    """Duration of `model`'s plan as one graph, and of each of its operations where it stands, shape (operations,), ns.

    The second add up to the first. repeats, runs: as `profile_package`'s.
    """
    stream = gpu.create_stream()
    events = [gpu.create_event() for _ in range(min(_CHUNK, len(model.operations)) + 1)]
    try:
        total = _whole(model, stream, events, runs)
        raw = np.median([_pass(model, gpu, stream, events, total) for _ in range(repeats)], axis=0)
    finally:
        stream.synchronize()
        for event in events:
            event.close()
        stream.close()
    return total, share_total(raw, total)


def share_total(raw: Times, total: float, shortest: float = _SHORTEST_NS) -> Times:
    """`raw` times less one constant overhead each, such that they add up to `total`; none below `shortest`.

    Where they add up to less already, or `shortest` alone to more, they are scaled instead. Times in ns.
    """
    raw = np.maximum(np.asarray(raw, np.float64), 1.0)
    if raw.sum() <= total or shortest * len(raw) >= total:
        scaled: Times = raw * (total / raw.sum())
        return scaled
    low, high = 0.0, float(raw.max())
    for _ in range(60):  # the sum falls steadily with the overhead: bisect
        middle = (low + high) / 2
        if np.maximum(raw - middle, shortest).sum() > total:
            low = middle
        else:
            high = middle
    shared = np.maximum(raw - high, shortest)
    exact: Times = shared * (total / shared.sum())
    return exact


def classify(profile: KernelProfile, limits: Limits) -> Bound:
    """What bounds the kernel: whichever limit it reaches at least a third of, the nearer one; else its latency."""
    time = max(profile.solo_ns, 1.0)
    peak = limits.tensor if profile.tensor_ops else limits.scalar
    compute = profile.operations / time / peak if peak else 0.0
    memory = profile.footprint_bytes / time / limits.memory if limits.memory else 0.0
    if max(compute, memory) < 1 / 3:
        return Bound.LATENCY
    return Bound.COMPUTE if compute > memory else Bound.MEMORY


def _whole(model: BoundModel, stream: Stream, events: Sequence[Event], runs: int) -> float:
    for _ in range(3):
        stream.launch_graph(model.graph)
    stream.synchronize()
    times = []
    for _ in range(runs):
        stream.record(events[0])
        stream.launch_graph(model.graph)
        stream.record(events[1])
        stream.synchronize()
        times.append(events[1].time_ns() - events[0].time_ns())
    return float(np.median(times))


def _pass(model: BoundModel, gpu: Gpu, stream: Stream, events: Sequence[Event], total: float) -> Times:
    """Time between the events around each step, ns."""
    out: list[float] = []
    hold = max(1, min(300, int(_HOLD_NS / max(total, 1.0))))
    operations = model.operations
    for start in range(0, len(operations), _CHUNK):
        chunk = operations[start : start + _CHUNK]
        prefix = gpu.create_graph(operations[:start]) if start else None
        for _ in range(hold):
            stream.launch_graph(model.graph)
        if prefix is not None:
            stream.launch_graph(prefix)
        stream.record(events[0])
        for operation, event in zip(chunk, events[1:], strict=False):
            stream.launch(operation)
            stream.record(event)
        stream.synchronize()
        stamps = [event.time_ns() for event in events[: len(chunk) + 1]]
        out.extend(float(after - before) for before, after in pairwise(stamps))
        if prefix is not None:
            prefix.close()
    return np.asarray(out)


def _timed(step: Step, time: float, limits: Limits) -> Step:
    if not isinstance(step, KernelStep) or step.profile is None:
        return step
    profile = step.profile.model_copy(update={"solo_ns": round(time, 1)})
    return step.model_copy(update={"profile": profile.model_copy(update={"bound": classify(profile, limits)})})
