"""Synthetic tenants: packages made in memory that each keep one part of the GPU busy. Not models: no inputs, no outputs.

Their profiles say what they move and compute, never how long it takes (`solo_ns` 0): hardware runs the kernels of
`gpu/cuda/kernels/synthetic.cu`, a simulated GPU derives the time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from missile.coloring.pool import TenantMemory
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.colored import color_kernels
from missile.compiler.package import (
    Argument,
    Bound,
    Buffer,
    BufferKind,
    BytesArgument,
    KernelImage,
    KernelProfile,
    KernelStep,
    ModelPackage,
    PointerArgument,
)
from missile.compiler.weights import WEIGHTS_FILE, write_weights
from missile.errors import MisuseError
from missile.gpu.interface import Gpu, GpuInfo, Launch

__all__ = ["SYNTHETIC", "bind_synthetic", "is_synthetic", "synthetic_package"]

_SOURCE = "synthetic"
_MIB = 1 << 20
_THREADS_PER_SM = 2048
_HALF = 2  # bytes of an fp16 value

_COPY_BYTES = 512 * _MIB
_COPY_BYTES_PER_BLOCK = 16 << 10  # short blocks, as elementwise kernels have them
_GEMV_SIDE = 8192
_GEMV_MATRICES = 4  # 512 MiB of weights: far more than any L2 holds
_GEMV_STEPS = 16
_SPIN_ROUNDS = 2048
_SPIN_STEPS = 8
_TINY_STEPS = 100
_TINY_BLOCKS = 8


def _pointer(buffer: str, offset: int = 0) -> PointerArgument:
    return PointerArgument(buffer=buffer, offset=offset)


def _integer(value: int, nbytes: int) -> BytesArgument:
    return BytesArgument(value=value.to_bytes(nbytes, "little").hex())


def _step(
    kernel: str,
    blocks: int,
    threads: int,
    arguments: tuple[Argument, ...],
    *,
    bound: Bound,
    read: int = 0,
    write: int = 0,
    operations: int = 0,
    in_place: bool = False,
) -> KernelStep:
    profile = KernelProfile(
        solo_ns=0.0,
        read_bytes=read,
        write_bytes=write,
        footprint_bytes=read if in_place else read + write,
        operations=operations,
        blocks=blocks,
        threads=threads,
        blocks_per_sm=_THREADS_PER_SM // threads,
        bound=bound,
    )
    return KernelStep(kernel=kernel, grid=(blocks, 1, 1), block=(threads, 1, 1), arguments=arguments, profile=profile)


def _package(name: str, info: GpuInfo, entry: str, buffers: dict[str, int], steps: list[KernelStep]) -> ModelPackage:
    major, minor = info.compute_capability
    return ModelPackage(
        name=name,
        batch=1,
        gpu=info.name,
        arch=f"sm_{major}{minor}",
        inputs=(),
        outputs=(),
        buffers=tuple(
            Buffer(id=buffer, kind=BufferKind.STATE, nbytes=nbytes, last=len(steps) - 1)
            for buffer, nbytes in buffers.items()
        ),
        kernels=(KernelImage(id=entry, entry=entry, source=f"synthetic: {entry}"),),
        steps=tuple(steps),
    )


def _copy(name: str, info: GpuInfo) -> ModelPackage:
    arguments = (_pointer("source"), _pointer("target"), _integer(_COPY_BYTES // 16, 8))
    step = _step(
        "stream_copy",
        _COPY_BYTES // _COPY_BYTES_PER_BLOCK,
        256,
        arguments,
        bound=Bound.MEMORY,
        read=_COPY_BYTES,
        write=_COPY_BYTES,
    )
    return _package(name, info, "stream_copy", {"source": _COPY_BYTES, "target": _COPY_BYTES}, [step])


def _gemv(name: str, info: GpuInfo) -> ModelPackage:
    side, matrix, vector = _GEMV_SIDE, _GEMV_SIDE * _GEMV_SIDE * _HALF, _GEMV_SIDE * _HALF
    steps = []
    for index in range(_GEMV_STEPS):
        source, target = ("even", "odd") if index % 2 == 0 else ("odd", "even")
        weights = _pointer("weights", index % _GEMV_MATRICES * matrix)
        arguments = (weights, _pointer(source), _pointer(target), _integer(side, 4), _integer(side, 4))
        steps.append(
            _step(
                "gemv",
                side // 8,
                256,
                arguments,
                bound=Bound.MEMORY,
                read=matrix + vector,
                write=vector,
                operations=2 * side * side,
            )
        )
    return _package(name, info, "gemv", {"weights": _GEMV_MATRICES * matrix, "even": vector, "odd": vector}, steps)


def _spin(name: str, info: GpuInfo) -> ModelPackage:
    blocks = info.sms * 8
    operations = blocks * 256 * 2 * 8 * _SPIN_ROUNDS
    arguments = (_pointer("sink"), _integer(_SPIN_ROUNDS, 4))
    step = _step("spin", blocks, 256, arguments, bound=Bound.COMPUTE, write=4 * blocks, operations=operations)
    return _package(name, info, "spin", {"sink": 4 * blocks}, [step] * _SPIN_STEPS)


def _tiny(name: str, info: GpuInfo) -> ModelPackage:
    count = _TINY_BLOCKS * 128
    arguments = (_pointer("values"), _integer(count, 4))
    step = _step(
        "increment",
        _TINY_BLOCKS,
        128,
        arguments,
        bound=Bound.LATENCY,
        read=4 * count,
        write=4 * count,
        operations=count,
        in_place=True,
    )
    return _package(name, info, "increment", {"values": 4 * count}, [step] * _TINY_STEPS)


_MAKERS: dict[str, tuple[str, Callable[[str, GpuInfo], ModelPackage]]] = {
    "synthetic-copy": ("one device-to-device copy of 512 MiB by a kernel", _copy),
    "synthetic-gemv": ("a chain of 16 fp16 GEMVs of 8192 x 8192, as in a language model's decode", _gemv),
    "synthetic-spin": ("8 kernels of multiply-adds that touch no memory", _spin),
    "synthetic-tiny": ("100 kernels of 8 blocks that do next to nothing", _tiny),
}

SYNTHETIC: dict[str, str] = {name: title for name, (title, _) in _MAKERS.items()}
"""Names of the synthetic models, and what one request of each does."""


def is_synthetic(model: str) -> bool:
    """Whether `model` names a synthetic one, or tries to (the prefix is theirs)."""
    return model.startswith("synthetic-")


def synthetic_package(model: str, info: GpuInfo) -> ModelPackage:
    """The package of a synthetic model for the GPU that `info` describes. MisuseError names the known ones."""
    if model not in _MAKERS:
        raise MisuseError(f"Unknown synthetic model {model!r}; known: {', '.join(_MAKERS)}.")
    return _MAKERS[model][1](model, info)


def bind_synthetic(model: str, gpu: Gpu, *, tenant: str, memory: TenantMemory | None = None) -> BoundModel:
    """Make a synthetic model runnable on `gpu`: as `bind`, or in colored memory as `bind_colored`. Kernels are compiled by
    NVRTC on hardware.

    Buffers of the GEMV and the copy hold small noise. MisuseError for an unknown name, OutOfMemoryError naming the
    tenant, UnsupportedError without NVRTC. Nothing is held after an error.
    """
    package = synthetic_package(model, gpu.info)
    if gpu.info.simulated:
        return bind(package, None, gpu, tenant=tenant) if memory is None else bind_colored(package, None, gpu, memory)
    from missile.gpu.cuda import nvrtc

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "kernels").mkdir()
        write_weights({}, directory / WEIGHTS_FILE)
        if memory is None:
            image = nvrtc.cubin(_SOURCE, package.arch)
            for kernel in package.kernels:
                (directory / "kernels" / f"{kernel.id}.cubin").write_bytes(image)
            bound = bind(package, directory, gpu, tenant=tenant)
        else:
            text = nvrtc.ptx(_SOURCE, package.arch)
            for kernel in package.kernels:
                (directory / "kernels" / f"{kernel.id}.ptx").write_text(text)
            code = color_kernels(package, directory, memory.translation.shape)
            bound = bind_colored(package, directory, gpu, memory, kernels=code)
            image = code.cubins[package.kernels[0].id]  # every one has all of the source's kernels
    try:
        _fill_with_noise(bound, gpu, image, () if memory is None else (memory.constants,))
    except BaseException:
        bound.close()
        raise
    return bound


def _fill_with_noise(bound: BoundModel, gpu: Gpu, image: bytes, trailing: tuple[bytes, ...]) -> None:
    module = gpu.load_module(image, name=f"{bound.tenant}/noise")
    stream = gpu.create_stream()
    try:
        kernel = module.kernel("noise")
        for seed, buffer in enumerate(bound.package.buffers):
            params = (
                bound.addresses[buffer.id].to_bytes(8, "little"),
                (buffer.nbytes // _HALF).to_bytes(8, "little"),
                seed.to_bytes(4, "little"),
                *trailing,
            )
            stream.launch(Launch(kernel, (gpu.info.sms * 8, 1, 1), (256, 1, 1), 0, params))
        stream.synchronize()
    finally:
        stream.close()
        module.close()
