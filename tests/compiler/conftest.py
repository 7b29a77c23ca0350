"""A small package made by hand: two kernels, one of each kind of buffer. Its times are made up."""

from __future__ import annotations

import pytest

from missile.compiler.package import (
    Bound,
    Buffer,
    BufferKind,
    BytesArgument,
    FillStep,
    KernelImage,
    KernelProfile,
    KernelStep,
    ModelPackage,
    PointerArgument,
    TensorSpec,
)


def _profile(solo_ns: float) -> KernelProfile:
    return KernelProfile(
        solo_ns=solo_ns,
        read_bytes=4096,
        write_bytes=2048,
        footprint_bytes=6144,
        operations=1 << 20,
        blocks=8,
        threads=128,
        blocks_per_sm=4,
        bound=Bound.LATENCY,
    )


def _kernel(kernel: str, *buffers: str, solo_ns: float = 5000.0) -> KernelStep:
    pointers = tuple(PointerArgument(buffer=name) for name in buffers)
    return KernelStep(
        kernel=kernel,
        grid=(8, 1, 1),
        block=(128, 1, 1),
        arguments=(*pointers, BytesArgument(value="00010000")),
        profile=_profile(solo_ns),
    )


@pytest.fixture
def package() -> ModelPackage:
    def buffer(name: str, kind: BufferKind, nbytes: int, first: int = 0, last: int = 3) -> Buffer:
        return Buffer(id=name, kind=kind, nbytes=nbytes, first=first, last=last)

    return ModelPackage(
        name="toy",
        batch=2,
        gpu="NVIDIA H200",
        arch="sm_90",
        inputs=(TensorSpec(name="x", buffer="in", dtype="float16", shape=(2, 8), strides=(8, 1)),),
        outputs=(TensorSpec(name="y", buffer="out", dtype="float16", shape=(2, 4), strides=(4, 1)),),
        buffers=(
            buffer("in", BufferKind.INPUT, 32),
            buffer("out", BufferKind.OUTPUT, 16),
            buffer("w", BufferKind.WEIGHT, 1000),
            buffer("cache", BufferKind.STATE, 4096),
            buffer("s0", BufferKind.SCRATCH, 600, 1, 2),
            buffer("s1", BufferKind.SCRATCH, 700, 3, 3),
        ),
        kernels=(KernelImage(id="000_a", entry="a"), KernelImage(id="001_b", entry="b")),
        steps=(
            FillStep(buffer="s0", nbytes=600, value=0),
            _kernel("000_a", "in", "w", "s0"),
            _kernel("001_b", "s0", "cache"),
            _kernel("000_a", "cache", "s1", "out", solo_ns=9000.0),
        ),
        relative_error=1e-3,
        solo_ns=20000.0,
        eager_ns=25000.0,
    )
