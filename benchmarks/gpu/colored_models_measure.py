"""What the benchmark of whole models measures: durations by turns, what a run leaves in memory, and moving data."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from colored_models_code import TRANSFER_BYTES

from missile.coloring.halves import find_halves
from missile.coloring.pool import ColoredPool, TenantMemory
from missile.coloring.shares import Demand, plan_shares
from missile.compiler.bind import BoundModel
from missile.compiler.bind_colored import bind_colored
from missile.compiler.colored import (
    colored_kernels,
)
from missile.compiler.mover import Mover
from missile.compiler.package import BufferKind, ModelPackage
from missile.compiler.planning import needed_bytes, place_buffers
from missile.gpu.interface import Copy, Fill, Gpu, Graph, Stream
from missile.probe import map_for
from missile.probe.channel_map import ChannelMap
from missile.runtime.coloring import ColoredTenants, Coloring

_BATCH = 10  # launches between two waits
_ROUNDS = 5


class Timer:
    """Durations of one graph's launches, ns."""

    def __init__(self, gpu: Gpu, stream: Stream) -> None:
        self._stream = stream
        self._events = [(gpu.create_event(), gpu.create_event()) for _ in range(_BATCH)]

    def batch(self, graph: Graph) -> list[int]:
        for start, end in self._events:
            self._stream.record(start)
            self._stream.launch_graph(graph)
            self._stream.record(end)
        self._stream.synchronize()
        return [end.time_ns() - start.time_ns() for start, end in self._events]

    def by_turns(self, graphs: dict[str, Graph]) -> dict[str, float]:
        """Median duration of each."""
        taken: dict[str, list[int]] = {name: [] for name in graphs}
        for graph in graphs.values():
            self.batch(graph)
        for _ in range(_ROUNDS):
            for name, graph in graphs.items():
                taken[name] += self.batch(graph)
        return {name: statistics.median(times) for name, times in taken.items()}


class Contents:
    """What a run left in a model's memory: scratch, state and output, by kind."""

    def __init__(self, gpu: Gpu, stream: Stream, package: ModelPackage) -> None:
        self._gpu, self._stream, self._package = gpu, stream, package
        self._places = place_buffers(package)
        kinds = (BufferKind.SCRATCH, BufferKind.STATE, BufferKind.OUTPUT)
        self.regions = {kind: self._places[kind].nbytes for kind in kinds if kind in self._places}
        self._host = gpu.allocate_host(max(self.regions.values()), tenant="check")
        self._input = gpu.allocate_host(max(package.input_bytes * 2, 1 << 20), tenant="check")
        view = self._input.array
        view[:] = 0
        if all(spec.dtype in ("float16", "torch.float16") for spec in package.inputs):
            noise = np.random.default_rng(0).standard_normal(view.nbytes // 2, dtype=np.float32).astype(np.float16)
            view[:] = noise.view(np.uint8)

    def base(self, model: BoundModel, kind: BufferKind) -> int:
        name, offset = next(iter(self._places[kind].offsets.items()))
        return model.addresses[name] - offset

    def feed(self, model: BoundModel) -> None:
        """Give the model its input: without one, what an embedding looks up lies anywhere, and its assertion ends all."""
        if model.input_bytes:
            self._stream.copy_to_device(model.input_address, self._input, nbytes=model.input_bytes)
            self._stream.synchronize()

    def run(self, model: BoundModel, mover: Mover | None) -> dict[BufferKind, Any]:
        """The same input on cleared scratch; call it on a model that has not run yet."""
        stream = self._stream
        if BufferKind.SCRATCH in self.regions:
            base, nbytes = self.base(model, BufferKind.SCRATCH), self.regions[BufferKind.SCRATCH]
            stream.launch(Fill(base, nbytes) if mover is None else mover.fill(base, nbytes, 0))
        self.feed(model)
        stream.launch_graph(model.graph)
        stream.synchronize()
        found = {}
        for kind, nbytes in self.regions.items():
            if kind is BufferKind.OUTPUT:  # as it leaves
                stream.copy_to_host(self._host, model.output_address, nbytes=model.output_bytes)
                nbytes = model.output_bytes
            elif mover is None:
                stream.copy_to_host(self._host, self.base(model, kind), nbytes=nbytes)
            else:
                plain = self._gpu.allocate(nbytes, tenant="check")
                stream.launch(mover.gather(plain.address, self.base(model, kind), nbytes))
                stream.copy_to_host(self._host, plain.address, nbytes=nbytes)
                stream.synchronize()
                plain.free()
            stream.synchronize()
            found[kind] = self._host.array[:nbytes].copy()
        return found

    def close(self) -> None:
        self._host.free()
        self._input.free()


def transfer_speed(gpu: Gpu, timer: Timer, mover: Mover, memory: TenantMemory) -> dict[str, float]:
    """Bytes moved per second by the scatter and the gather kernel, and by the driver's copy in plain memory."""
    nbytes = min(TRANSFER_BYTES, memory.limit - memory.in_use)
    if nbytes < 1 << 20:
        return {}
    logical, plain = memory.allocate(nbytes), gpu.allocate(nbytes, tenant="check")
    out = {}
    other = gpu.allocate(nbytes, tenant="check")
    for name, operation in (
        ("scatter", mover.scatter(plain.address, logical.address, nbytes)),
        ("gather", mover.gather(plain.address, logical.address, nbytes)),
        ("copy", Copy(other.address, plain.address, nbytes)),
    ):
        graph = gpu.create_graph([operation])
        timer.batch(graph)
        out[f"{name}_bytes_per_s"] = nbytes / statistics.median(timer.batch(graph)) * 1e9
        graph.close()
    logical.free()
    plain.free()
    other.free()
    return out


def startup(gpu: Gpu, channel_map: ChannelMap, packages: dict[str, tuple[ModelPackage, Path]]) -> dict[str, Any]:
    """Seconds until the largest of the models runs in one half of the colors: map verified, pages classified, weights in."""
    package, directory = max(packages.values(), key=lambda entry: needed_bytes(entry[0]))
    clock = time.perf_counter
    marks = [clock()]
    verified = map_for(gpu, known=channel_map)
    marks.append(clock())
    halves = find_halves(verified)
    assert halves is not None
    coloring = Coloring(verified, {"tenant": halves.sets[0]})
    with ColoredTenants(gpu, coloring, [Demand("tenant", halves.sets[0], needed_bytes(package))]) as tenants:
        marks.append(clock())
        memory = tenants.memories["tenant"]
        code = colored_kernels(package, directory, memory.translation.shape)
        marks.append(clock())
        bind_colored(package, directory, gpu, memory, kernels=code).close()
        marks.append(clock())
        seconds = dict(zip(("map", "memory", "code", "bind"), np.diff(marks).tolist(), strict=True))
        pages = tenants.pages
    with ExitStack() as undo:  # the same once more, in parts
        marks = [clock()]
        pool = undo.enter_context(ColoredPool(gpu, pages))
        marks.append(clock())
        constants = verified.classify(gpu, pool.addresses)
        marks.append(clock())
        (share,) = plan_shares(verified, constants, [Demand("tenant", halves.sets[0], needed_bytes(package))])
        marks.append(clock())
        memory = pool.attach(share)
        marks.append(clock())
        parts = dict(zip(("pages", "classify", "share out", "map"), np.diff(marks).tolist(), strict=True))
        before = memory.table_bytes
        memory.shadow()
        return {
            "model": package.name,
            "bytes": needed_bytes(package),
            "seconds_per_gib": (seconds["memory"] + seconds["bind"]) / needed_bytes(package) * (1 << 30),
            "steps": {"seconds": clock() - marks[-1], "bytes": memory.table_bytes - before},
            "parts": parts,
            "weight_bytes": package.weight_bytes,
            "pages": pages,
            "form": str(memory.translation.shape.form),
            "table_bytes": before,
            "same_chip": verified.uuid == channel_map.uuid,
            "seconds": seconds,
        }
