"""The model package: a compiled model as a launch plan, its kernels and its profile, on disk and in memory.

A package directory holds

- `package.json`: everything below (`ModelPackage`), human-readable;
- `kernels/NAME.ptx` and `kernels/NAME.cubin`: device code, one entry point each;
- `weights.safetensors`: the contents of the weight buffers, named by buffer id (absent in a *recorded* package, which
  carries plan and profile only: enough for the simulated GPU and for planning, not for running on hardware).

Pure data: nothing here touches a GPU or torch.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from missile.errors import MisuseError
from missile.files import write_whole
from missile.gpu.work import KernelWork
from missile.validation import first_problem

__all__ = [
    "FORMAT_VERSION",
    "Argument",
    "Bound",
    "Buffer",
    "BufferKind",
    "BytesArgument",
    "FillStep",
    "KernelImage",
    "KernelProfile",
    "KernelStep",
    "ModelPackage",
    "PointerArgument",
    "Step",
    "TensorSpec",
    "read_package",
    "write_package",
]

FORMAT_VERSION = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BufferKind(StrEnum):
    INPUT = "input"
    OUTPUT = "output"
    WEIGHT = "weight"  # constant contents, loaded once
    STATE = "state"  # contents survive from request to request (a decoder's KV cache)
    SCRATCH = "scratch"  # contents live from step `first` to step `last`; may share memory with others outside


class Buffer(_Frozen):
    """A range of device memory that the plan names. `first`/`last`: indices of the first and last step that touch it."""

    id: str
    kind: BufferKind
    nbytes: int = Field(ge=0)
    first: int = 0
    last: int = 0


class TensorSpec(_Frozen):
    """An input or output tensor: where it lies in its buffer, and how. strides in elements; dtype by torch's name."""

    name: str
    buffer: str
    offset: int = 0
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class PointerArgument(_Frozen):
    """A kernel argument that is the address of `buffer` plus `offset` bytes (8 bytes wide)."""

    kind: Literal["pointer"] = "pointer"
    buffer: str
    offset: int = 0


class BytesArgument(_Frozen):
    """A kernel argument passed by value: its bytes in hexadecimal, little-endian."""

    kind: Literal["bytes"] = "bytes"
    value: str


Argument = Annotated[PointerArgument | BytesArgument, Field(discriminator="kind")]


class Bound(StrEnum):
    MEMORY = "memory"
    COMPUTE = "compute"
    LATENCY = "latency"  # too small for either limit to matter


class KernelProfile(_Frozen):
    """One launch, measured alone on the whole GPU. Times in ns, bytes past L1, operations count a multiply-add as two."""

    solo_ns: float
    read_bytes: int
    write_bytes: int
    footprint_bytes: int
    operations: int
    tensor_ops: bool = False
    blocks: int
    threads: int
    blocks_per_sm: int
    bound: Bound


class KernelStep(_Frozen):
    """Launch `kernel` (the id of a KernelImage). grid and block in blocks and threads; shared in bytes (dynamic)."""

    kind: Literal["kernel"] = "kernel"
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    arguments: tuple[Argument, ...]
    profile: KernelProfile | None = None


class FillStep(_Frozen):
    """Fill a range of a buffer with a byte."""

    kind: Literal["fill"] = "fill"
    buffer: str
    offset: int = 0
    nbytes: int
    value: int = 0


Step = Annotated[KernelStep | FillStep, Field(discriminator="kind")]


class KernelImage(_Frozen):
    """Device code of one kernel. `entry` is the symbol; files lie at kernels/ID.ptx and kernels/ID.cubin."""

    id: str
    entry: str
    registers: int = 0
    shared_bytes: int = 0
    spill_bytes: int = 0
    source: str = ""  # what it computes, for people: the fused operators


class ModelPackage(_Frozen):
    """A compiled model. `steps` run in order on one stream; every address they use is in `buffers`."""

    format: int = FORMAT_VERSION
    name: str
    batch: int = Field(ge=1)
    gpu: str  # the GPU's name it was compiled and profiled on
    arch: str  # "sm_90"
    versions: dict[str, str] = Field(default_factory=dict)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    buffers: tuple[Buffer, ...]
    kernels: tuple[KernelImage, ...]
    steps: tuple[Step, ...]
    relative_error: float | None = None  # ||ours - eager|| / ||eager||, fp16 eager
    solo_ns: float | None = None  # median of the whole plan as one graph
    eager_ns: float | None = None  # the same model, eager, under a CUDA graph, same run
    recorded: bool = False  # True: plan and profile only

    @property
    def input_bytes(self) -> int:
        return sum(b.nbytes for b in self.buffers if b.kind is BufferKind.INPUT)

    @property
    def output_bytes(self) -> int:
        return sum(b.nbytes for b in self.buffers if b.kind is BufferKind.OUTPUT)

    @property
    def weight_bytes(self) -> int:
        return sum(b.nbytes for b in self.buffers if b.kind is BufferKind.WEIGHT)

    def works(self) -> tuple[KernelWork, ...]:
        """The work of each kernel step, in order, for the simulator and the planner. MisuseError when not profiled."""
        out = []
        for index, step in enumerate(self.steps):
            if isinstance(step, FillStep):
                out.append(KernelWork(blocks=1, write_bytes=step.nbytes, footprint_bytes=step.nbytes))
                continue
            if step.profile is None:
                raise MisuseError(
                    f"Package {self.name!r} was never profiled (step {index}); run `missile profile` on it."
                )
            p = step.profile
            out.append(
                KernelWork(
                    blocks=p.blocks,
                    threads=p.threads,
                    blocks_per_sm=p.blocks_per_sm,
                    read_bytes=p.read_bytes,
                    write_bytes=p.write_bytes,
                    footprint_bytes=p.footprint_bytes,
                    operations=p.operations,
                    tensor_ops=p.tensor_ops,
                    solo_ns=p.solo_ns,
                    recorded_on=self.gpu,
                )
            )
        return tuple(out)


def read_package(directory: Path) -> ModelPackage:
    """Read `directory/package.json`. MisuseError when it is missing, truncated, edited out of form or too new."""
    path = directory / "package.json"
    try:
        raw: Any = json.loads(path.read_text())
    except FileNotFoundError:
        raise MisuseError(f"{directory} is not a model package: it has no package.json.") from None
    except (OSError, ValueError) as error:
        raise MisuseError(f"{path} can't be read: {error}.") from error
    if isinstance(raw, dict) and raw.get("format") != FORMAT_VERSION:
        raise MisuseError(f"{path} has format {raw.get('format')!r}; this Missile reads format {FORMAT_VERSION}.")
    try:
        return ModelPackage.model_validate(raw)
    except ValidationError as error:
        raise MisuseError(f"{path} is not a valid package: {first_problem(error)}.") from error


def write_package(package: ModelPackage, directory: Path) -> None:
    """Write `directory/package.json` (whole or not at all). Kernels and weights are the compiler's to write."""
    write_whole(directory / "package.json", package.model_dump_json(indent=1) + "\n")
