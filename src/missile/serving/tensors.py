"""Tensors as the protocol names them: datatypes, shapes, a model's signature, and where tensors lie in a block.

Layout is shared by the front end and the engine: given the same signature and batch they compute the same offsets, so
that a request between them is one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ALIGNMENT",
    "DATATYPES",
    "BlockLayout",
    "Datatype",
    "ModelSignature",
    "TensorSignature",
    "bf16_to_float",
    "float_to_bf16",
]

ALIGNMENT = 64  # bytes; each tensor starts on its own cache line
ERROR_BYTES = 1024  # room for an error sentence at the start of a block's outputs


@dataclass(frozen=True, slots=True)
class Datatype:
    """name: the protocol's. numpy: what holds its bits (BF16 has none of its own). torch: torch's name."""

    name: str
    numpy: np.dtype[Any]
    torch: str
    config: int  # number in the protocol's model configuration

    @property
    def nbytes(self) -> int:
        return int(self.numpy.itemsize)

    @property
    def floating(self) -> bool:
        return self.name in ("FP16", "BF16", "FP32", "FP64")


DATATYPES = {
    d.name: d
    for d in (
        Datatype("BOOL", np.dtype(np.bool_), "bool", 1),
        Datatype("UINT8", np.dtype(np.uint8), "uint8", 2),
        Datatype("UINT16", np.dtype(np.uint16), "uint16", 3),
        Datatype("UINT32", np.dtype(np.uint32), "uint32", 4),
        Datatype("UINT64", np.dtype(np.uint64), "uint64", 5),
        Datatype("INT8", np.dtype(np.int8), "int8", 6),
        Datatype("INT16", np.dtype(np.int16), "int16", 7),
        Datatype("INT32", np.dtype(np.int32), "int32", 8),
        Datatype("INT64", np.dtype(np.int64), "int64", 9),
        Datatype("FP16", np.dtype(np.float16), "float16", 10),
        Datatype("FP32", np.dtype(np.float32), "float32", 11),
        Datatype("FP64", np.dtype(np.float64), "float64", 12),
        Datatype("BF16", np.dtype(np.uint16), "bfloat16", 14),
    )
}


def bf16_to_float(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """BF16 bit patterns as float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 rounded to the nearest BF16 (ties to even), as bit patterns; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


@dataclass(frozen=True, slots=True)
class TensorSignature:
    """An input or output. shape: one item's, without the batch axis where the model has one."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def item_nbytes(self) -> int:
        return math.prod(self.shape) * DATATYPES[self.datatype].nbytes


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """What a model takes and gives. max_batch: 0 when it has no batch axis, else the most items of one request."""

    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    max_batch: int

    def shape(self, tensor: TensorSignature, batch: int) -> tuple[int, ...]:
        """The whole shape of `tensor` in a request of `batch` items."""
        return (batch, *tensor.shape) if self.max_batch else tensor.shape

    def as_json(self) -> dict[str, Any]:
        def tensors(those: Sequence[TensorSignature]) -> list[list[Any]]:
            return [[t.name, t.datatype, list(t.shape)] for t in those]

        return {"inputs": tensors(self.inputs), "outputs": tensors(self.outputs), "max_batch": self.max_batch}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ModelSignature:
        def tensors(those: Any) -> tuple[TensorSignature, ...]:
            return tuple(TensorSignature(name, datatype, tuple(shape)) for name, datatype, shape in those)

        return cls(tensors(raw["inputs"]), tensors(raw["outputs"]), raw["max_batch"])


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Offsets in bytes, from the start of a request's block, of its inputs and then its outputs, for `batch` items.

    An error sentence may overwrite the outputs (at `error`): a block has room for it even when outputs are tiny.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_sizes: tuple[int, ...]
    output_sizes: tuple[int, ...]
    error: int
    nbytes: int

    @classmethod
    def of(cls, signature: ModelSignature, batch: int) -> BlockLayout:
        items = batch if signature.max_batch else 1
        offset = 0
        starts: list[int] = []
        sizes: list[int] = []
        count = len(signature.inputs)
        for tensor in (*signature.inputs, *signature.outputs):
            starts.append(offset)
            sizes.append(tensor.item_nbytes * items)
            offset += -(-sizes[-1] // ALIGNMENT) * ALIGNMENT
        error = starts[count] if count < len(starts) else offset
        return cls(
            inputs=tuple(starts[:count]),
            outputs=tuple(starts[count:]),
            input_sizes=tuple(sizes[:count]),
            output_sizes=tuple(sizes[count:]),
            error=error,
            nbytes=max(offset, error + ERROR_BYTES),
        )
