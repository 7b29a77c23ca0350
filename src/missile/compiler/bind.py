"""A model package made runnable on one GPU: memory allocated, weights and kernels loaded, the plan as a graph.

The same code runs on hardware and on the simulated GPU. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from missile.compiler.package import Buffer, BufferKind, FillStep, KernelStep, ModelPackage, PointerArgument
from missile.compiler.planning import Placement, pack, plan_scratch
from missile.compiler.weights import WEIGHTS_FILE, read_weights
from missile.errors import MisuseError
from missile.gpu.interface import Fill, Gpu, Graph, Kernel, Launch
from missile.gpu.work import KernelWork

__all__ = ["BoundModel", "Operation", "bind"]

Operation = Launch | Fill

_STAGING_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class BoundModel:
    """A package on a GPU. Owns its device memory, modules and graph until `close`.

    graph: the whole plan; operations: the same, one by one, in order.
    input_address, input_bytes: one range that holds all inputs; `addresses` has every buffer's address by id, and
    `package.inputs` the layout of each. Output likewise.
    nbytes: device memory held.
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
    _resources: ExitStack = field(repr=False)

    def close(self) -> None:
        """Give everything back. Idempotent. The caller has made sure that no work of this model runs."""
        self._resources.close()


def bind(package: ModelPackage, directory: Path | None, gpu: Gpu, *, tenant: str) -> BoundModel:
    """Load `package` for `tenant` onto `gpu`.

    directory: where the package's kernels and weights lie; None for a recorded package (simulated GPUs only).
    State buffers start as in the package's weights, or zero. Blocks until the weights are on the GPU.
    MisuseError for a package of another GPU architecture, without kernels, or (simulated) without a profile;
    OutOfMemoryError naming the tenant. After an error nothing is held.
    """
    _check(package, directory, gpu)
    works: tuple[KernelWork | None, ...]
    works = package.works() if _is_profiled(package) or gpu.info.simulated else (None,) * len(package.steps)
    with ExitStack() as undo:
        addresses, regions, nbytes = _allocate(package, gpu, tenant, undo)
        kernels = _load_kernels(package, directory, gpu, tenant, undo)
        operations = tuple(
            _operation(step, work, kernels, addresses) for step, work in zip(package.steps, works, strict=True)
        )
        _initialise(package, directory, gpu, tenant, addresses)
        graph = gpu.create_graph(operations)
        undo.callback(graph.close)
        (input_address, input_bytes), (output_address, output_bytes) = regions
        return BoundModel(
            package=package,
            tenant=tenant,
            graph=graph,
            operations=operations,
            input_address=input_address,
            input_bytes=input_bytes,
            output_address=output_address,
            output_bytes=output_bytes,
            nbytes=nbytes,
            addresses=addresses,
            _resources=undo.pop_all(),
        )


def _check(package: ModelPackage, directory: Path | None, gpu: Gpu) -> None:
    kernels, buffers = {image.id for image in package.kernels}, {buffer.id for buffer in package.buffers}
    for index, step in enumerate(package.steps):
        named = {step.buffer} if isinstance(step, FillStep) else _named_buffers(step)
        missing = named - buffers or (set() if isinstance(step, FillStep) else {step.kernel} - kernels)
        if missing:
            raise MisuseError(
                f"Package {package.name!r} is broken: step {index} names {min(missing)!r}, which it lacks."
            )
    if gpu.info.simulated:
        return
    if package.recorded or directory is None:
        raise MisuseError(
            f"Package {package.name!r} is a recording without kernels and weights: it runs on simulated GPUs only; "
            f"`missile compile {package.name}` makes one for this GPU."
        )
    arch = _arch(gpu)
    if package.arch != arch:
        raise MisuseError(
            f"Package {package.name!r} was compiled for {package.gpu} ({package.arch}) and this GPU is "
            f"{gpu.info.name} ({arch}); compile it again here."
        )


def _named_buffers(step: KernelStep) -> set[str]:
    return {argument.buffer for argument in step.arguments if isinstance(argument, PointerArgument)}


def _arch(gpu: Gpu) -> str:
    major, minor = gpu.info.compute_capability
    return f"sm_{major}{minor}"


def _is_profiled(package: ModelPackage) -> bool:
    return all(isinstance(step, FillStep) or step.profile is not None for step in package.steps)


def _allocate(
    package: ModelPackage, gpu: Gpu, tenant: str, undo: ExitStack
) -> tuple[dict[str, int], tuple[tuple[int, int], tuple[int, int]], int]:
    """Every buffer's address; the input and the output range (address, bytes); and all bytes held."""
    addresses: dict[str, int] = {}
    ranges: dict[BufferKind, tuple[int, int]] = {}
    total = 0
    planners: dict[BufferKind, Callable[[list[Buffer]], Placement]] = {BufferKind.SCRATCH: plan_scratch}
    for kind in BufferKind:
        members = [b for b in package.buffers if b.kind is kind]
        place = planners.get(kind, pack)(members)
        if not members:
            ranges[kind] = (0, 0)
            continue
        memory = gpu.allocate(place.nbytes, tenant=tenant)
        undo.callback(memory.free)
        total += place.nbytes
        addresses.update({name: memory.address + offset for name, offset in place.offsets.items()})
        used = max(place.offsets[b.id] + b.nbytes for b in members)
        ranges[kind] = (memory.address, used)
    return addresses, (ranges[BufferKind.INPUT], ranges[BufferKind.OUTPUT]), total


def _load_kernels(
    package: ModelPackage, directory: Path | None, gpu: Gpu, tenant: str, undo: ExitStack
) -> dict[str, Kernel]:
    if gpu.info.simulated:
        # The simulator runs profiles, not code: one module with all entry points stands for them.
        entries = "\n".join(f".visible .entry {image.entry}() {{ ret; }}" for image in package.kernels)
        module = gpu.load_module(f".version 8.0\n.target sm_90\n.address_size 64\n{entries}\n".encode(), name=tenant)
        undo.callback(module.close)
        return {image.id: module.kernel(image.entry) for image in package.kernels}
    assert directory is not None  # _check
    kernels = {}
    for image in package.kernels:
        module = gpu.load_module(_image(directory, image.id), name=f"{tenant}/{image.id}")
        undo.callback(module.close)
        kernels[image.id] = module.kernel(image.entry)
    return kernels


def _image(directory: Path, kernel: str) -> bytes:
    """The kernel's cubin, or its PTX (which the driver then assembles) where there is none."""
    for suffix in ("cubin", "ptx"):
        path = directory / "kernels" / f"{kernel}.{suffix}"
        if path.exists():
            return path.read_bytes()
    raise MisuseError(f"{directory} has no code for kernel {kernel!r}; compile the model again.")


def _operation(
    step: KernelStep | FillStep, work: KernelWork | None, kernels: Mapping[str, Kernel], addresses: Mapping[str, int]
) -> Operation:
    if isinstance(step, FillStep):
        return Fill(addresses[step.buffer] + step.offset, step.nbytes, step.value)
    params = tuple(
        (addresses[a.buffer] + a.offset).to_bytes(8, "little")
        if isinstance(a, PointerArgument)
        else bytes.fromhex(a.value)
        for a in step.arguments
    )
    return Launch(kernels[step.kernel], step.grid, step.block, step.shared_bytes, params, work)


def _initialise(
    package: ModelPackage, directory: Path | None, gpu: Gpu, tenant: str, addresses: Mapping[str, int]
) -> None:
    """Weights from the package's file, state zeroed where the file says nothing. Blocks until done."""
    if gpu.info.simulated or directory is None:
        return
    weights = read_weights(directory / WEIGHTS_FILE)
    stream = gpu.create_stream()
    staging = gpu.allocate_host(_STAGING_BYTES, tenant=tenant)
    try:
        for buffer in package.buffers:
            data = weights.get(buffer.id)
            if data is None:
                if buffer.kind is BufferKind.WEIGHT:
                    raise MisuseError(f"{directory / WEIGHTS_FILE} lacks weight buffer {buffer.id!r}.")
                if buffer.kind is BufferKind.STATE:
                    stream.launch(Fill(addresses[buffer.id], buffer.nbytes))
                continue
            if data.nbytes != buffer.nbytes:
                raise MisuseError(
                    f"{directory / WEIGHTS_FILE} has {data.nbytes} bytes for buffer {buffer.id!r}, not {buffer.nbytes}."
                )
            for start in range(0, data.nbytes, _STAGING_BYTES):
                chunk = data[start : start + _STAGING_BYTES]
                stream.synchronize()  # the staging memory is free again
                np.copyto(staging.array[: chunk.nbytes], chunk)
                stream.copy_to_device(addresses[buffer.id] + start, staging, nbytes=chunk.nbytes)
        stream.synchronize()
    finally:
        staging.free()
        stream.close()
