"""What the benchmark of overlapped launches measures: durations by turns, alone and beside a neighbour, and equal bits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from missile.compiler.bind import BoundModel
from missile.compiler.package import BufferKind
from missile.compiler.planning import place_buffers
from missile.gpu.interface import Event, Fill, Gpu, Graph, HostBuffer, Launch, SmPartition, Stream

_KEPT = (BufferKind.SCRATCH, BufferKind.STATE)
_AHEAD_NS = 4e6  # work that a neighbour has in flight, so that it never runs dry while the host looks elsewhere
_CHUNK = 64 << 20


def summary(samples: Sequence[int]) -> dict[str, float]:
    """Of durations in ns."""
    values = np.asarray(samples, float)
    return {
        "median_ns": float(np.median(values)),
        "p99_ns": float(np.percentile(values, 99)),
        "mean_ns": float(values.mean()),
        "least_ns": float(values.min()),
        "samples": len(samples),
    }


class Turns:
    """Durations of graphs that run by turns on one stream, alone."""

    def __init__(self, gpu: Gpu, batch: int = 10) -> None:
        self._events = [(gpu.create_event(), gpu.create_event()) for _ in range(batch)]

    def measure(self, stream: Stream, graphs: Mapping[str, Graph], rounds: int = 20) -> dict[str, list[int]]:
        for graph in graphs.values():
            self._batch(stream, graph)
        taken: dict[str, list[int]] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name, graph in graphs.items():
                taken[name] += self._batch(stream, graph)
        return taken

    def _batch(self, stream: Stream, graph: Graph) -> list[int]:
        for start, end in self._events:
            stream.record(start)
            stream.launch_graph(graph)
            stream.record(end)
        stream.synchronize()
        return [end.time_ns() - start.time_ns() for start, end in self._events]

    def close(self) -> None:
        for pair in self._events:
            for event in pair:
                event.close()


class Neighbour:
    """A graph that runs again and again on its own stream; `keep` it going while something else is measured."""

    def __init__(self, gpu: Gpu, stream: Stream, graph: Graph) -> None:
        self._gpu, self._stream, self._graph = gpu, stream, graph
        self._free: list[Event] = []
        self._flying: deque[Event] = deque()
        self.ends: list[int] = []
        start, end = gpu.create_event(), gpu.create_event()
        for _ in range(2):
            stream.record(start)
            stream.launch_graph(graph)
            stream.record(end)
            stream.synchronize()
        self.alone_ns = end.time_ns() - start.time_ns()
        self._free += [start, end]
        self._depth = max(2, min(64, int(_AHEAD_NS / max(self.alone_ns, 1)) + 1))

    def keep(self) -> None:
        while self._flying and self._flying[0].done():
            event = self._flying.popleft()
            self.ends.append(event.time_ns())
            self._free.append(event)
        while len(self._flying) < self._depth:
            event = self._free.pop() if self._free else self._gpu.create_event()
            self._stream.launch_graph(self._graph)
            self._stream.record(event)
            self._flying.append(event)

    def rate(self, since: int) -> float | None:
        """Runs per second between the first and the last end that were seen since there were `since` of them."""
        ends = self.ends[since:]
        return (len(ends) - 1) / (ends[-1] - ends[0]) * 1e9 if len(ends) > 2 else None

    def stop(self) -> None:
        self._stream.synchronize()
        for event in (*self._flying, *self._free):
            event.close()
        self._flying.clear()
        self._free.clear()


class Beside:
    """Durations of graphs on one stream, one at a time, while a neighbour runs on another."""

    def __init__(self, gpu: Gpu) -> None:
        self._start, self._end = gpu.create_event(), gpu.create_event()

    def measure(
        self, stream: Stream, graphs: Mapping[str, Graph], neighbour: Neighbour | None, seconds: float, most: int = 100
    ) -> dict[str, dict[str, Any]]:
        """Each graph in turn for its share of `seconds`, twice over, at most `most` samples of each."""
        taken: dict[str, list[int]] = {name: [] for name in graphs}
        rates: dict[str, list[float]] = {name: [] for name in graphs}
        for graph in graphs.values():
            self._once(stream, graph, neighbour)
        for _ in range(2):
            for name, graph in graphs.items():
                until = time.monotonic() + seconds / 2 / len(graphs)
                before = 0 if neighbour is None else len(neighbour.ends)
                for _ in range(most // 2):
                    taken[name].append(self._once(stream, graph, neighbour))
                    if time.monotonic() > until:
                        break
                if neighbour is not None and (rate := neighbour.rate(before)) is not None:
                    rates[name].append(rate)
        return {
            name: summary(samples) | ({"neighbour_per_s": float(np.mean(rates[name]))} if rates[name] else {})
            for name, samples in taken.items()
        }

    def _once(self, stream: Stream, graph: Graph, neighbour: Neighbour | None) -> int:
        if neighbour is not None:
            neighbour.keep()
        stream.record(self._start)
        stream.launch_graph(graph)
        stream.record(self._end)
        self._end.synchronize()
        return self._end.time_ns() - self._start.time_ns()

    def close(self) -> None:
        self._start.close()
        self._end.close()


class Bits:
    """Compares what two models of one package leave in memory: the same input, scratch poisoned alike before each run."""

    def __init__(self, gpu: Gpu, stream: Stream) -> None:
        self._stream = stream
        self._hosts: tuple[HostBuffer, HostBuffer] = (gpu.allocate_host(_CHUNK), gpu.allocate_host(_CHUNK))

    def feed(self, model: BoundModel) -> None:
        """Noise where inputs are floating point, zeros where they are indices."""
        view = self._hosts[0].array
        view[:] = 0
        if all(spec.dtype in ("float16", "torch.float16") for spec in model.package.inputs):
            noise = np.random.default_rng(0).standard_normal(model.input_bytes // 2 + 1).astype(np.float16)
            view[: noise.nbytes] = noise.view(np.uint8)
        if model.input_bytes:
            self._stream.copy_to_device(model.input_address, self._hosts[0], nbytes=model.input_bytes)
            self._stream.synchronize()

    def run(self, model: BoundModel, graph: Graph, poison: int, stream: Stream | None = None) -> None:
        """Scratch is poisoned first: a kernel that reads too early then reads no result of the run before."""
        stream = stream or self._stream
        for address, nbytes in _regions(model, (BufferKind.SCRATCH,)):
            stream.launch(Fill(address, nbytes, poison))
        stream.launch_graph(graph)
        stream.synchronize()

    def whole(self, one: BoundModel, other: BoundModel) -> bool:
        """Output, scratch and state, byte for byte."""
        pairs = list(zip(_regions(one, _KEPT), _regions(other, _KEPT), strict=True))
        pairs.append(((one.output_address, one.output_bytes), (other.output_address, other.output_bytes)))
        return all(self._equal(a, b, nbytes) for (a, nbytes), (b, _) in pairs)

    def output(self, model: BoundModel) -> bytes:
        stream, host = self._stream, self._hosts[0]
        stream.copy_to_host(host, model.output_address, nbytes=min(model.output_bytes, _CHUNK))
        stream.synchronize()
        return host.array[: min(model.output_bytes, _CHUNK)].tobytes()

    def _equal(self, one: int, other: int, nbytes: int) -> bool:
        for offset in range(0, nbytes, _CHUNK):
            size = min(_CHUNK, nbytes - offset)
            for host, address in zip(self._hosts, (one, other), strict=True):
                self._stream.copy_to_host(host, address + offset, nbytes=size)
            self._stream.synchronize()
            if not np.array_equal(self._hosts[0].array[:size], self._hosts[1].array[:size]):
                return False
        return True

    def close(self) -> None:
        for host in self._hosts:
            host.free()


def _regions(model: BoundModel, kinds: Sequence[BufferKind]) -> list[tuple[int, int]]:
    """(address, bytes) of the used part of each kind's region."""
    found = []
    for kind, place in place_buffers(model.package).items():
        if kind in kinds:
            name, offset = next(iter(place.offsets.items()))
            found.append((model.addresses[name] - offset, place.nbytes))
    return found


def programmatic_edges(gpu: Any, launches: Sequence[Launch], partition: SmPartition | None) -> dict[str, int] | str:
    """Of the graph that the driver makes of `launches`: how many edges it has, and how many let launches overlap."""
    try:
        cu = gpu._cu
        graph = gpu._capture(launches, partition)
        try:
            answer = cu.api.cuGraphGetEdges(graph, len(launches) + 8)
            if int(answer[0]):
                return f"cuGraphGetEdges: {answer[0]}"
            kind = cu.api.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
            data = answer[3][: int(answer[4])]
            return {"edges": len(data), "programmatic": sum(int(edge.type) == int(kind) for edge in data)}
        finally:
            cu.release("cuGraphDestroy", graph)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
