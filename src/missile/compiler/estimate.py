"""What a Triton kernel of Inductor's asks of the GPU, read from its source and its tensors. Pure.

Inductor writes every size into the source as a constant, so the arithmetic of a matrix product or convolution template
and the accesses of a fused kernel can be counted. Bytes are those that cross the L2, taking each block's loads once
(what a block re-reads hits its L1); the footprint is each tensor's part that is touched, once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Estimate", "TensorArgument", "estimate"]

_CONSTANT = re.compile(r"^\s*(\w+)\s*(?::\s*tl\.constexpr\s*)?=\s*(-?\d+)\s*$", re.MULTILINE)
_ARITHMETIC = re.compile(r"^\s*(?:tmp|acc)\w*\s*[+]?=\s*(?!tl\.load|tl\.broadcast_to|tl\.full)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class TensorArgument:
    """A kernel's tensor argument by its name in the source: how much of its storage it spans, and its element size."""

    name: str
    nbytes: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """As in `KernelWork`."""

    read_bytes: int
    write_bytes: int
    footprint_bytes: int
    operations: int
    tensor_ops: bool


def estimate(source: str, tensors: Sequence[TensorArgument], grid: tuple[int, int, int]) -> Estimate:
    """Count the work of one launch of the kernel with `source` over `grid` (blocks)."""
    constants = {name: int(value) for name, value in _CONSTANT.findall(source)}
    if "tl.dot" in source:
        return _matrix_product(source, constants, tensors, grid)
    return _fused(source, constants, tensors)


def _fused(source: str, constants: Mapping[str, int], tensors: Sequence[TensorArgument]) -> Estimate:
    """A pointwise or reduction kernel: every load and store statement runs once per index of its iteration space."""
    points = math.prod(value for name, value in constants.items() if re.fullmatch(r"[xyz]numel", name))
    inner = math.prod(value for name, value in constants.items() if re.fullmatch(r"r\d_numel", name))
    operations = len(_ARITHMETIC.findall(source)) * points * inner
    reads, writes = _accesses(source, tensors, points * inner, points * inner)
    return Estimate(reads, writes, reads + writes, operations, False)


def _matrix_product(
    source: str, constants: Mapping[str, int], tensors: Sequence[TensorArgument], grid: tuple[int, int, int]
) -> Estimate:
    size = constants
    by_name = {tensor.name: tensor for tensor in tensors}
    if "arg_X" in by_name:
        m = size["BATCH"] * size["OUT_H"] * size["OUT_W"]
        groups = max(1, size.get("GROUPS", 1))
        n, k = size["OUT_C"] // groups, size["IN_C"] // groups
        taps, batch, operands = size["KERNEL_H"] * size["KERNEL_W"], groups, ("arg_X", "arg_W")
    else:
        m, n, k, taps = size["M"], size["N"], size["K"], 1
        tiles = math.ceil(m / size["BLOCK_M"]) * math.ceil(n / size["BLOCK_N"])
        batch = max(1, math.prod(grid) // tiles)
        operands = ("arg_A", "arg_B")
    columns, rows = math.ceil(n / size["BLOCK_N"]), math.ceil(m / size["BLOCK_M"])
    item = by_name[operands[0]].itemsize if operands[0] in by_name else 2
    # The taps of one output tile overlap in the input, which L1 holds; each weight is needed by every row of tiles.
    moved = batch * item * (m * k * columns + k * taps * n * rows)
    rest = [t for t in tensors if t.name not in operands]
    reads, writes = _accesses(source, rest, batch * m * n, batch * m * n)
    operand_bytes = [
        min(by_name[name].nbytes, batch * item * (m * k * min(taps, 4) if name == operands[0] else k * taps * n))
        for name in operands
        if name in by_name
    ]
    return Estimate(
        read_bytes=max(moved, sum(operand_bytes)) + reads,
        write_bytes=writes,
        footprint_bytes=sum(operand_bytes) + reads + writes,
        operations=2 * batch * m * n * k * taps,
        tensor_ops=item <= 2,
    )


def _accesses(source: str, tensors: Sequence[TensorArgument], loads: int, stores: int) -> tuple[int, int]:
    """Bytes read and written through `tensors`: as many elements as the statements touch, but no more than there are."""
    read = written = 0
    for tensor in tensors:
        loaded = len(re.findall(rf"tl\.load\({tensor.name}\b", source))
        stored = len(re.findall(rf"tl\.(?:store|atomic_\w+)\({tensor.name}\b", source))
        read += min(tensor.nbytes, loaded * loads * tensor.itemsize)
        written += min(tensor.nbytes, stored * stores * tensor.itemsize)
    return read, written
