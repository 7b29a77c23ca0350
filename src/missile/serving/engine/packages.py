"""What a compiled package takes and gives, as the server sees it, and its tensors in pinned memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from missile.compiler.bind import BoundModel
from missile.compiler.package import BufferKind, ModelPackage, TensorSpec
from missile.errors import MisuseError, UnsupportedError
from missile.gpu.interface import HostBuffer
from missile.serving.engine.executor import Batch
from missile.serving.tensors import DATATYPES, ModelSignature, TensorSignature

__all__ = ["Views", "copy_tensor", "empty", "fill", "item_bytes", "package_signature", "tensor_view", "views"]

Views = tuple[tuple[npt.NDArray[Any], ...], ...]

_FEW_CHANNELS = 8
_BY_TORCH = {d.torch: d for d in DATATYPES.values()}


def package_signature(
    package: ModelPackage, output_names: Sequence[str] = (), *, batched: bool = True
) -> ModelSignature:
    """What a compiled model takes and gives; the batch is dimension 0 where it is batched.

    output_names: what its outputs are to be called; empty: as the package does. MisuseError when they are not as many,
    UnsupportedError for what can't be served.
    """
    if output_names and len(output_names) != len(package.outputs):
        raise MisuseError(
            f"{len(output_names)} outputs are named but package {package.name!r} gives {len(package.outputs)}."
        )
    kinds = {buffer.id: buffer.kind for buffer in package.buffers}
    if any(kinds.get(spec.buffer, BufferKind.OUTPUT) is not BufferKind.OUTPUT for spec in package.outputs):
        raise UnsupportedError(
            f"Package {package.name!r}: an output is one of its inputs or weights as it is; a model has to give a copy."
        )

    def tensors(specs: tuple[TensorSpec, ...], prefix: str) -> tuple[TensorSignature, ...]:
        found = []
        for index, spec in enumerate(specs):
            datatype = _BY_TORCH.get(spec.dtype.removeprefix("torch."))
            if datatype is None:
                raise UnsupportedError(
                    f"Package {package.name!r}: {spec.name!r} is {spec.dtype}, which can't be served."
                )
            if batched and (not spec.shape or spec.shape[0] != package.batch):
                raise UnsupportedError(f"Package {package.name!r}: {spec.name!r} has no batch in dimension 0.")
            shape = spec.shape[1:] if batched else spec.shape
            found.append(TensorSignature(spec.name or f"{prefix}{index}", datatype.name, shape))
        return tuple(found)

    outputs = tensors(package.outputs, "output")
    if output_names:
        outputs = tuple(replace(one, name=name) for one, name in zip(outputs, output_names, strict=True))
    return ModelSignature(tensors(package.inputs, "input"), outputs, package.batch if batched else 0)


def item_bytes(spec: TensorSpec) -> int:
    """Bytes of one value."""
    return _BY_TORCH[spec.dtype.removeprefix("torch.")].numpy.itemsize


def views(
    bound: BoundModel,
    buffers: Sequence[HostBuffer],
    count: int,
    *,
    is_input: bool,
    batched: bool = True,
    contiguous: bool = False,
) -> Views:
    """The model's inputs or outputs in each of `count` pinned buffers, which mirror the device's range (no buffers: the
    tensors are empty). Dimension 0 is the batch, of one item where the model is not batched. contiguous: in the shape's own
    order, whatever order the model's is."""
    specs, base = bound.package.outputs, bound.output_address
    if is_input:
        specs, base = bound.package.inputs, bound.input_address
    places = [bound.addresses[spec.buffer] + spec.offset - base for spec in specs]
    if contiguous:
        specs = tuple(spec.model_copy(update={"strides": _contiguous(spec.shape)}) for spec in specs)
    found = []
    for index in range(count):
        buffer = buffers[index] if buffers else None
        tensors = (tensor_view(buffer, spec, place) for spec, place in zip(specs, places, strict=True))
        found.append(tuple(tensor if batched else tensor[None] for tensor in tensors))
    return tuple(found)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))


def tensor_view(buffer: HostBuffer | None, spec: TensorSpec, offset: int) -> npt.NDArray[Any]:
    """`spec`'s elements in pinned memory that mirrors the device's range, from byte `offset`, with its strides."""
    dtype = _BY_TORCH[spec.dtype.removeprefix("torch.")].numpy
    if buffer is None:
        return np.empty(spec.shape, dtype)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.strides, strict=True))
    flat = buffer.array[offset : offset + extent * dtype.itemsize].view(dtype)
    return np.lib.stride_tricks.as_strided(flat, spec.shape, tuple(stride * dtype.itemsize for stride in spec.strides))


def fill(arena: npt.NDArray[np.uint8], tensors: Sequence[npt.NDArray[Any]], batch: Batch) -> None:
    """Copy the inputs of a batch's calls from `arena`, one after another, into `tensors`, those of one buffer."""
    for rows, place in _pairs(arena, tensors, batch, is_input=True):
        copy_tensor(rows, place)


def empty(arena: npt.NDArray[np.uint8], tensors: Sequence[npt.NDArray[Any]], batch: Batch) -> None:
    """Copy the outputs of a batch's calls from `tensors`, those of one buffer, to where each call's lie in `arena`."""
    for rows, place in _pairs(arena, tensors, batch, is_input=False):
        copy_tensor(place, rows)
    batch.end_ns = time.monotonic_ns()


def _pairs(
    arena: npt.NDArray[np.uint8], tensors: Sequence[npt.NDArray[Any]], batch: Batch, *, is_input: bool
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Each call's rows of each of `tensors`, and where they lie in `arena`."""
    row = 0
    for call, layout in zip(batch.calls, batch.layouts, strict=True):
        offsets, sizes = (layout.inputs, layout.input_sizes) if is_input else (layout.outputs, layout.output_sizes)
        for tensor, offset, size in zip(tensors, offsets, sizes, strict=True):
            start = call.offset + offset
            rows = tensor[row : row + call.batch]
            yield rows, arena[start : start + size].view(tensor.dtype).reshape(rows.shape)
        row += call.batch


def copy_tensor(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """`target[...] = source`, fast also where one of the two is channels-last (dimension 1 next to each other).

    NumPy would run over few channels in its innermost loop; one channel after another is five times as fast.
    """
    if target.ndim >= 3 and 1 < target.shape[1] <= _FEW_CHANNELS and target.strides != source.strides:
        for channel in range(target.shape[1]):
            target[:, channel] = source[:, channel]
    else:
        target[...] = source
