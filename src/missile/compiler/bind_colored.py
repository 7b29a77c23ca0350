"""A model package made runnable in a tenant's colored memory: kernels with translation, logical addresses for all buffers.

Copies over PCIe can't follow colors, so inputs arrive in and outputs leave from plain memory: the plan begins with a kernel
that scatters the inputs and ends with one that gathers the outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from missile.coloring.pool import TenantMemory
from missile.compiler.bind import BoundModel, Operation, used_bytes
from missile.compiler.carrying import carried_by, launch_constants
from missile.compiler.colored import ColoredKernels, colored_kernels
from missile.compiler.contents import STAGING_BYTES, load_contents
from missile.compiler.mover import STAND_IN, Mover
from missile.compiler.overlap_table import Overlapping
from missile.compiler.package import BufferKind, FillStep, ModelPackage
from missile.compiler.planning import Placement, place_buffers
from missile.compiler.steps import check_package, launch_of, load_images, load_profiles, works_of
from missile.errors import MisuseError, OutOfMemoryError
from missile.gpu.interface import Gpu, HostBuffer, Kernel, Stream
from missile.gpu.work import KernelWork

__all__ = ["bind_colored"]


def bind_colored(
    package: ModelPackage,
    directory: Path | None,
    gpu: Gpu,
    memory: TenantMemory,
    *,
    kernels: ColoredKernels | None = None,
    mixed: bool = False,
    overlap: Overlapping | None = None,
) -> BoundModel:
    """Load `package` for `memory`'s tenant into its colors. As `bind`, but for what is said here.

    kernels: the package's code for the shape of `memory`; None takes what is kept in `directory`, or makes it now. Simulated
    GPUs need none. overlap: as of `bind`; where `kernels` are given, it is theirs. mixed: kernels that were measured to be
    faster with a shadow page table use one, which takes up to 1/64 of the memory; a model with such kernels can't be made
    preemptible. The model's operations begin with the inputs' scattering and end with the outputs' gathering.
    OutOfMemoryError saying how much is missing. `memory` stays the caller's.
    """
    check_package(package, directory, gpu)
    places = place_buffers(package)
    _check_room(package, memory, sum(place.nbytes for place in places.values()))
    tenant = memory.tenant
    with ExitStack() as undo:
        regions: dict[BufferKind, int] = {}
        for kind, place in places.items():
            buffer = memory.allocate(place.nbytes)
            undo.callback(buffer.free)
            regions[kind] = buffer.address
        shadowed: frozenset[str] = frozenset()
        carried: frozenset[str] = frozenset()
        overlap = overlap if kernels is None else kernels.overlap
        names = tuple(image.id for image in package.kernels)
        waiting, movers_wait = names if overlap is not None else (), overlap is not None
        if gpu.info.simulated:
            loaded = load_profiles(package, gpu, tenant, undo)
            module = gpu.load_module(STAND_IN, name=tenant)
        else:
            assert directory is not None  # check_package
            code = kernels or colored_kernels(
                package, directory, memory.translation.shape, mixed=mixed, overlap=overlap
            )
            if code.shape != memory.translation.shape:
                raise MisuseError(f"The code of package {package.name!r} is for another shape of translation.")
            shadowed, carried = code.shadowed, code.carried
            waiting, movers_wait = tuple(name for name in names if code.overlaps(name)), code.overlaps()
            loaded = load_images(package, code.cubins, gpu, tenant, undo)
            module = gpu.load_module(code.transfer, name=f"{tenant}/transfer")
        undo.callback(module.close)
        mover = Mover(module, memory, overlaps=movers_wait)
        if directory is not None and not gpu.info.simulated:
            staging = gpu.allocate(STAGING_BYTES, tenant=tenant)
            try:
                kinds: tuple[BufferKind, ...] = (BufferKind.WEIGHT, BufferKind.STATE)
                initial = {kind: places[kind] for kind in kinds if kind in places}
                load_contents(package, directory, gpu, tenant, initial, _ColoredSink(mover, regions, staging.address))
            finally:
                staging.free()
        ports = {}
        for kind in (BufferKind.INPUT, BufferKind.OUTPUT):
            nbytes = used_bytes(package, places, kind)
            if nbytes:
                plain = gpu.allocate(nbytes, tenant=tenant)
                undo.callback(plain.free)
                ports[kind] = (plain.address, nbytes)
        works = works_of(package, gpu, memory.colors)
        addresses = _addresses(places, regions)
        constants = _constants(package, memory, addresses, shadowed, carried)
        operations = _operations(package, works, loaded, constants, mover, addresses, regions, ports, waiting)
        graph = gpu.create_graph(operations)
        undo.callback(graph.close)
        inputs, outputs = ports.get(BufferKind.INPUT, (0, 0)), ports.get(BufferKind.OUTPUT, (0, 0))
        return BoundModel(
            package=package,
            tenant=tenant,
            graph=graph,
            operations=operations,
            input_address=inputs[0],
            input_bytes=inputs[1],
            output_address=outputs[0],
            output_bytes=outputs[1],
            nbytes=sum(place.nbytes for place in places.values()) + inputs[1] + outputs[1],
            addresses=addresses,
            weights_address=regions.get(BufferKind.WEIGHT, 0),
            weights_bytes=used_bytes(package, places, BufferKind.WEIGHT),
            _resources=undo.pop_all(),
            shape=memory.translation.shape,
            shadowed=shadowed,
        )


class _ColoredSink:
    """Contents of buffers in colored memory: over PCIe to plain memory at `staging`, from there by the scatter kernel."""

    def __init__(self, mover: Mover, regions: Mapping[BufferKind, int], staging: int) -> None:
        self._mover = mover
        self._regions = regions
        self._staging = staging

    def put(self, stream: Stream, kind: BufferKind, offset: int, staging: HostBuffer, nbytes: int) -> None:
        stream.copy_to_device(self._staging, staging, nbytes=nbytes)
        stream.launch(self._mover.scatter(self._staging, self._regions[kind] + offset, nbytes))

    def zero(self, stream: Stream, kind: BufferKind, nbytes: int) -> None:
        stream.launch(self._mover.fill(self._regions[kind], nbytes, 0))


def _operations(
    package: ModelPackage,
    works: tuple[KernelWork | None, ...],
    kernels: Mapping[str, Kernel],
    constants: Sequence[bytes],
    mover: Mover,
    addresses: Mapping[str, int],
    regions: Mapping[BufferKind, int],
    ports: Mapping[BufferKind, tuple[int, int]],
    waiting: Collection[str],
) -> tuple[Operation, ...]:
    operations: list[Operation] = []
    if BufferKind.INPUT in ports:
        plain, nbytes = ports[BufferKind.INPUT]
        operations.append(mover.scatter(plain, regions[BufferKind.INPUT], nbytes))
    for step, work, own in zip(package.steps, works, constants, strict=True):
        if isinstance(step, FillStep):
            operations.append(mover.fill(addresses[step.buffer] + step.offset, step.nbytes, step.value))
        else:
            launch = launch_of(step, work, kernels[step.kernel], addresses, (own,), overlaps=step.kernel in waiting)
            operations.append(launch)
    if BufferKind.OUTPUT in ports:
        plain, nbytes = ports[BufferKind.OUTPUT]
        operations.append(mover.gather(plain, regions[BufferKind.OUTPUT], nbytes))
    return tuple(operations)


def _constants(
    package: ModelPackage,
    memory: TenantMemory,
    addresses: Mapping[str, int],
    shadowed: Collection[str],
    carried: Collection[str],
) -> list[bytes]:
    """Of each step's launch; those of fills are not used."""
    plans = carried_by(package, memory.translation.shape) if carried else {}
    found = []
    for step in package.steps:
        if isinstance(step, FillStep):
            found.append(b"")
        elif step.kernel in carried:
            found.append(launch_constants(step, plans[step.kernel], package, memory, addresses))
        else:
            found.append(memory.shadow() if step.kernel in shadowed else memory.constants)
    return found


def _check_room(package: ModelPackage, memory: TenantMemory, needed: int) -> None:
    """Say what the whole model lacks, rather than the first buffer that does not fit."""
    left = memory.limit - memory.in_use
    if needed > left:
        raise OutOfMemoryError(
            f"Tenant {memory.tenant!r} needs {needed} bytes of colored memory for {package.name!r}; {left} are left of "
            f"{memory.limit}, {needed - left} are missing.",
            requested=needed,
            available=left,
            tenant=memory.tenant,
        )


def _addresses(places: Mapping[BufferKind, Placement], regions: Mapping[BufferKind, int]) -> dict[str, int]:
    return {name: regions[kind] + offset for kind, place in places.items() for name, offset in place.offsets.items()}
