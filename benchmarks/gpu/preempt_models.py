"""Models of the preemption benchmark: as they are and preemptible, in plain or in colored memory, and segments of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from missile.coloring.pool import ColoredPool, TenantMemory
from missile.coloring.shape import WINDOW, Form, Shape
from missile.coloring.shares import Share
from missile.coloring.translation import InPageTranslation, PairTranslation, Translation
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.colored import ColoredKernels
from missile.compiler.library import find_package
from missile.compiler.mover import Mover
from missile.compiler.package import BufferKind, ModelPackage
from missile.compiler.placements import PlacementTable
from missile.compiler.planning import needed_bytes
from missile.compiler.preemptible import control_of, preempt_model
from missile.compiler.preemptible_code import PreemptibleKernels, build_preemptible, preemptible_kernels
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.fill import fill_entry
from missile.compiler.ptx.preempt import Look, Place
from missile.compiler.ptx.transfer import transfer_ptx
from missile.gpu.cuda.gpu import CudaGpu
from missile.gpu.interface import Graph, Launch, Priority, Stream
from missile.probe.layout import PageLayout

__all__ = ["COLORED", "SEGMENT_NS", "Loaded", "gpu_ns", "translation_for"]

SEGMENT_NS = 300_000.0
PAGE_BYTES = 2 << 20
GRANULES = PageLayout(PAGE_BYTES, (*range(8), 9))  # Hopper's
PIECES = PageLayout(PAGE_BYTES, tuple(range(8)))  # two of them, 512 bytes apart, are a granule
COLORED = ("colored", "windows")
"""Variants in colored memory: by a table of one page's frames; by pairs, where windows may be read."""


def translation_for(variant: str, nbytes: int) -> Translation:
    """Frames in random order, or one of each pair at random (two neighbours alike), with room for `nbytes`."""
    rng = np.random.default_rng(5)
    if variant == "colored":
        pages = -(-nbytes // PAGE_BYTES) + 2
        return InPageTranslation(Shape(Form.IN_PAGE, GRANULES), rng.permutation(GRANULES.granules), pages)
    shape = Shape(Form.PAIR, PIECES, alike=True, wide=True)
    spare = shape.head_bytes + shape.guards * shape.unit_bytes
    pages = -(-(nbytes + spare) // (PAGE_BYTES // 2)) + 2
    shape = Shape(Form.PAIR, PIECES, alike=True, wide=pages * PAGE_BYTES > WINDOW)
    choices = rng.integers(0, 2, (pages, PIECES.granules // 4)).repeat(2, axis=1)
    return PairTranslation(shape, choices)


class _Made(NamedTuple):
    """plain, model: as it is, and preemptible; in the same memory unless `mover` is there, which moves data into the
    latter's. build_s: what the code of the latter took."""

    plain: BoundModel
    model: BoundModel
    build_s: float
    mover: Mover | None = None


_MODELS: dict[tuple[str, str], _Made] = {}  # kept until the end
_POOLS: list[ColoredPool] = []


def _models(gpu: CudaGpu, name: str, variant: str) -> _Made:
    """variant: "auto" is what Missile takes, one of `COLORED` the same in colored memory; else a look and a place that are
    the same for all kernels."""
    key = (name, variant)
    if key not in _MODELS:
        package, directory = find_package(name, None, gpu.info)
        assert directory is not None
        known = next((made.plain for (other, _), made in _MODELS.items() if other == name), None)
        plain = bind(package, directory, gpu, tenant=name) if known is None else known
        begin = time.perf_counter()
        if variant in COLORED:
            memory = _memory(gpu, package, variant)
            begin = time.perf_counter()
            code = preemptible_kernels(package, directory, memory.translation.shape)
            seconds = time.perf_counter() - begin
            colored, mover = _colored(gpu, package, directory, memory, code)
            _MODELS[key] = _Made(plain, preempt_model(colored, gpu, code), seconds, mover)
            return _MODELS[key]
        if variant == "auto":
            code = preemptible_kernels(package, directory)
        else:
            look, _, place = variant.partition("-")
            same = {image.id: Place(place) for image in package.kernels}
            with TemporaryDirectory() as apart:  # it is none that Missile should find
                (Path(apart) / "kernels").symlink_to(directory / "kernels")
                code = build_preemptible(package, Path(apart), look=Look(look), places=same)
        seconds = time.perf_counter() - begin
        _MODELS[key] = _Made(plain, preempt_model(plain, gpu, code), seconds)
    return _MODELS[key]


def _memory(gpu: CudaGpu, package: ModelPackage, variant: str) -> TenantMemory:
    translation = translation_for(variant, needed_bytes(package))
    pool = ColoredPool(gpu, translation.pages)
    _POOLS.append(pool)
    return pool.attach(Share(package.name, (0,), tuple(range(translation.pages)), translation))


def _colored(
    gpu: CudaGpu, package: ModelPackage, directory: Path, memory: TenantMemory, code: PreemptibleKernels
) -> tuple[BoundModel, Mover]:
    """The model in `memory`, for `preempt_model` only: it has no other code. And what moves data into it."""
    shape, arch = memory.translation.shape, package.arch + "a"
    transfer = assemble(transfer_ptx(shape, arch) + fill_entry(shape), arch=arch)
    kernels = ColoredKernels(shape, code.cubins, transfer)
    mover = Mover(gpu.load_module(transfer, name=f"{package.name}/weights"), memory)
    return bind_colored(package, directory, gpu, memory, kernels=kernels), mover


class Loaded:
    """A model as it is and preemptible, with segments of the latter. Close it."""

    def __init__(self, gpu: CudaGpu, name: str, variant: str = "auto", segment_ns: float = SEGMENT_NS) -> None:
        made = _models(gpu, name, variant)
        self.plain, self.model, self.build_s, self._mover = made
        self.gpu, self.package = gpu, self.model.package
        self.control = control_of(self.model)
        self.segments = _cut(self.model, segment_ns)
        self.graphs: list[Graph] = [gpu.create_graph(self.model.operations[a:b]) for a, b in self.segments]
        host = gpu.allocate_host(max(self.model.input_bytes, 1))
        _fill_inputs(self.package, host.array)
        self.stream = gpu.create_stream(priority=Priority.LOW)
        for model in (self.plain, self.model):
            if model.input_bytes:
                self.stream.copy_to_device(model.input_address, host)
        self.run()  # instantiates
        self.solo_ns = min(_timed(self.run) for _ in range(5))

    def run(self) -> None:
        self.launch(0)
        self.stream.synchronize()

    def launch(self, first: int, count: int = 1 << 16) -> None:
        """Segments from `first` on, as those of a new request: its results are right where `first` is 0."""
        self.control.begin(self.stream)
        for graph in self.graphs[first : first + count]:
            self.stream.launch_graph(graph)

    def resume(self, until: int = 1 << 16) -> bool:
        """Relaunch what is left of segments before `until`, False where nothing is. All launches have ended."""
        left = self.control.left()
        if left is None:
            return False
        self.control.resume(self.stream, left)
        first = next(index for index, (_, last) in enumerate(self.segments) if left.step < last)
        for graph in self.graphs[first:until]:
            self.stream.launch_graph(graph)
        return True

    def placements(self) -> dict[str, int]:
        """How many of the kernels have which translation, by its placement; empty in plain memory."""
        shape = self.model.shape
        if shape is None:
            return {}
        _, directory = find_package(self.package.name, None, self.gpu.info)
        assert directory is not None
        table = PlacementTable.load(self.package.gpu)
        texts = ((directory / "kernels" / f"{image.id}.ptx").read_text() for image in self.package.kernels)
        return dict(Counter(str(table.find(shape.form, text)) for text in texts))

    def reweigh(self) -> None:
        """Random half-precision numbers for all large weights, the same in both memories: those of a stand-in may make every
        output the same."""
        gpu, stream = self.gpu, self.stream
        host, staging = gpu.allocate_host(1 << 20), gpu.allocate(1 << 20)
        values = np.random.default_rng(3).standard_normal(host.nbytes // 2, dtype=np.float32) * 0.02
        host.array[:] = values.astype(np.float16).view(np.uint8)
        stream.copy_to_device(staging.address, host)
        for buffer in self.package.buffers:
            if buffer.kind is not BufferKind.WEIGHT or buffer.nbytes < 1 << 16:
                continue
            for start in range(0, buffer.nbytes, host.nbytes):
                nbytes = min(host.nbytes, buffer.nbytes - start)
                stream.copy_to_device(self.plain.addresses[buffer.id] + start, host, nbytes=nbytes)
                if self._mover is not None:
                    there = self.model.addresses[buffer.id] + start
                    stream.launch(self._mover.scatter(staging.address, there, nbytes))
        stream.synchronize()
        host.free()
        staging.free()

    def close(self) -> None:
        for graph in self.graphs:
            graph.close()
        self.stream.close()


def _cut(model: BoundModel, segment_ns: float) -> list[tuple[int, int]]:
    pieces, first, length = [], 0, 0.0
    for index, operation in enumerate(model.operations):
        length += operation.work.solo_ns if isinstance(operation, Launch) and operation.work else 0.0
        if length >= segment_ns or index + 1 == len(model.operations):
            pieces.append((first, index + 1))
            first, length = index + 1, 0.0
    return pieces


def _fill_inputs(package: ModelPackage, view: npt.NDArray[np.uint8]) -> None:
    view[:] = 0
    if all(spec.dtype in ("float16", "torch.float16") for spec in package.inputs):
        values = np.random.default_rng(0).standard_normal(view.nbytes // 2, dtype=np.float32).astype(np.float16)
        view[: values.nbytes] = values.view(np.uint8)


def _timed(run: Callable[[], object]) -> int:
    begin = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - begin


def gpu_ns(gpu: CudaGpu, stream: Stream, graph: Graph, count: int) -> float:
    """Of one launch of `graph`, over `count` in a row, ns."""
    start, end = gpu.create_event(), gpu.create_event()
    stream.record(start)
    for _ in range(count):
        stream.launch_graph(graph)
    stream.record(end)
    stream.synchronize()
    length = (end.time_ns() - start.time_ns()) / count
    start.close()
    end.close()
    return float(length)
