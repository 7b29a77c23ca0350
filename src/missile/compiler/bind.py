"""A model package made runnable on one GPU: memory allocated, weights and kernels loaded, the plan as a graph.

The same code runs on hardware and on the simulated GPU. Needs no torch. `bind_colored` does the same in colored memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from missile.coloring.shape import Shape
from missile.compiler.contents import load_contents
from missile.compiler.overlap_table import Overlapping
from missile.compiler.overlapped import overlapped_kernels
from missile.compiler.package import BufferKind, FillStep, ModelPackage
from missile.compiler.planning import Placement, place_buffers
from missile.compiler.steps import check_package, launch_of, load_images, load_profiles, works_of
from missile.errors import MisuseError
from missile.gpu.interface import Fill, Gpu, Graph, HostBuffer, Kernel, Launch, Stream
from missile.gpu.work import KernelWork

__all__ = ["BoundModel", "Operation", "bind", "used_bytes"]

Operation = Launch | Fill


@dataclass(frozen=True, slots=True)
class BoundModel:
    """A package on a GPU. Owns its device memory, modules and graph until `close`.

    graph: the whole plan; operations: the same, one by one, in order (those that move inputs and outputs among them).
    input_address, input_bytes: one range of plain memory that holds all inputs; `package.inputs` has the layout of each.
    Output likewise. weights_address, weights_bytes: the same of the weights, in order of first use (`place_buffers`).
    addresses: of every buffer by id, logical ones in colored memory. nbytes: device memory held. shape: of the translation
    that the kernels do, None in plain memory; shadowed: those that use a shadow page table instead.
    """

    package: ModelPackage
    tenant: str
    graph: Graph
    operations: tuple[Operation, ...]
    input_address: int
    input_bytes: int
    output_address: int
    output_bytes: int
    nbytes: int
    addresses: Mapping[str, int]
    weights_address: int
    weights_bytes: int
    _resources: ExitStack = field(repr=False)
    shape: Shape | None = None
    shadowed: frozenset[str] = frozenset()

    def close(self) -> None:
        """Give everything back. Idempotent. The caller has made sure that no work of this model runs."""
        self._resources.close()


def bind(
    package: ModelPackage,
    directory: Path | None,
    gpu: Gpu,
    *,
    tenant: str,
    weights_at: int | None = None,
    overlap: Overlapping | None = None,
) -> BoundModel:
    """Load `package` for `tenant` onto `gpu`.

    directory: where the package's kernels and weights lie; None for a recorded package (simulated GPUs only).
    weights_at: device memory of the caller that weights are to be used from (`place_buffers` says how they lie there):
    they are not loaded then. State buffers start as in the package's weights, or zero. Blocks until all that is on the GPU.
    overlap: kernels are launched while the one before runs, and wait themselves, but for those that can't be rewritten; code
    that the package has not yet is made (seconds), and kept in it. None: each starts when the one before has ended.
    MisuseError for a package of another GPU architecture, without kernels, or (simulated) without a profile;
    OutOfMemoryError naming the tenant. After an error nothing is held.
    """
    check_package(package, directory, gpu)
    works = works_of(package, gpu)
    places = place_buffers(package)
    with ExitStack() as undo:
        regions: dict[BufferKind, int] = {}
        for kind, place in places.items():
            if kind is BufferKind.WEIGHT and weights_at is not None:
                regions[kind] = weights_at
                continue
            memory = gpu.allocate(place.nbytes, tenant=tenant)
            undo.callback(memory.free)
            regions[kind] = memory.address
        kernels, waiting = _load_kernels(package, directory, gpu, tenant, overlap, undo)
        addresses = _addresses(places, regions)
        operations = _operations(package, works, kernels, addresses, waiting)
        if directory is not None and not gpu.info.simulated:
            kinds = [BufferKind.STATE] if weights_at is not None else [BufferKind.WEIGHT, BufferKind.STATE]
            initial = {kind: places[kind] for kind in kinds if kind in places}
            load_contents(package, directory, gpu, tenant, initial, _PlainSink(regions))
        graph = gpu.create_graph(operations)
        undo.callback(graph.close)
        return BoundModel(
            package=package,
            tenant=tenant,
            graph=graph,
            operations=operations,
            input_address=regions.get(BufferKind.INPUT, 0),
            input_bytes=used_bytes(package, places, BufferKind.INPUT),
            output_address=regions.get(BufferKind.OUTPUT, 0),
            output_bytes=used_bytes(package, places, BufferKind.OUTPUT),
            nbytes=sum(p.nbytes for k, p in places.items() if k is not BufferKind.WEIGHT or weights_at is None),
            addresses=addresses,
            weights_address=regions.get(BufferKind.WEIGHT, 0),
            weights_bytes=used_bytes(package, places, BufferKind.WEIGHT),
            _resources=undo.pop_all(),
        )


def used_bytes(package: ModelPackage, places: Mapping[BufferKind, Placement], kind: BufferKind) -> int:
    """From the start of a kind's region to the end of its last buffer; 0 where there is none."""
    ends = [places[kind].offsets[b.id] + b.nbytes for b in package.buffers if b.kind is kind]
    return max(ends, default=0)


class _PlainSink:
    """Contents of buffers in plain memory."""

    def __init__(self, regions: Mapping[BufferKind, int]) -> None:
        self._regions = regions

    def put(self, stream: Stream, kind: BufferKind, offset: int, staging: HostBuffer, nbytes: int) -> None:
        stream.copy_to_device(self._regions[kind] + offset, staging, nbytes=nbytes)

    def zero(self, stream: Stream, kind: BufferKind, nbytes: int) -> None:
        stream.launch(Fill(self._regions[kind], nbytes))


def _addresses(places: Mapping[BufferKind, Placement], regions: Mapping[BufferKind, int]) -> dict[str, int]:
    return {name: regions[kind] + offset for kind, place in places.items() for name, offset in place.offsets.items()}


def _load_kernels(
    package: ModelPackage, directory: Path | None, gpu: Gpu, tenant: str, overlap: Overlapping | None, undo: ExitStack
) -> tuple[dict[str, Kernel], Collection[str]]:
    """The kernels by id, and the ids of those whose code waits for the launch before."""
    if gpu.info.simulated:
        names = () if overlap is None else tuple(image.id for image in package.kernels)
        return load_profiles(package, gpu, tenant, undo), names
    assert directory is not None  # check_package
    waiting = {} if overlap is None else dict(overlapped_kernels(package, directory, overlap).cubins)
    images = {image.id: waiting.get(image.id) or _image(directory, image.id) for image in package.kernels}
    return load_images(package, images, gpu, tenant, undo), waiting.keys()


def _image(directory: Path, kernel: str) -> bytes:
    """The kernel's cubin, or its PTX (which the driver then assembles) where there is none."""
    for suffix in ("cubin", "ptx"):
        path = directory / "kernels" / f"{kernel}.{suffix}"
        if path.exists():
            return path.read_bytes()
    raise MisuseError(f"{directory} has no code for kernel {kernel!r}; compile the model again.")


def _operations(
    package: ModelPackage,
    works: tuple[KernelWork | None, ...],
    kernels: Mapping[str, Kernel],
    addresses: Mapping[str, int],
    waiting: Collection[str],
) -> tuple[Operation, ...]:
    return tuple(
        Fill(addresses[step.buffer] + step.offset, step.nbytes, step.value)
        if isinstance(step, FillStep)
        else launch_of(step, work, kernels[step.kernel], addresses, overlaps=step.kernel in waiting)
        for step, work in zip(package.steps, works, strict=True)
    )
