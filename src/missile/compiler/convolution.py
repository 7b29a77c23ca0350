"""How Inductor lowers convolutions: depthwise ones as pointwise kernels, the others with tiles of our choice.

Inductor's convolution template computes each group as a matrix product of at least 16x16x16: for a depthwise convolution
(one channel per group) nearly all of that is padding. Here each output element is the sum of its kernel's taps,
accumulated in fp32; Inductor fuses what follows (bias, batch norm, activation) into the same Triton kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from missile.compiler.tiles import Problem

__all__ = ["Window", "convolution_lowering", "depthwise_element", "is_depthwise"]

aten = torch.ops.aten

Load = Callable[[Sequence[Any]], Any]


def is_depthwise(weight_shape: Sequence[int], in_channels: int, groups: int, *, transposed: bool = False) -> bool:
    """True for a 2-d convolution with one input channel per group (any whole number of output channels for each)."""
    if transposed or len(weight_shape) != 4 or groups <= 1:
        return False
    return weight_shape[1] == 1 and groups == in_channels and weight_shape[0] % groups == 0


@contextmanager
def convolution_lowering() -> Iterator[None]:
    """While active, Inductor lowers depthwise `aten.convolution` to taps; others tell the tile chooser their shape.

    Works with and without `tuning.choose_tiles` around it.
    """
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    original = lowerings[aten.convolution.default]

    def lower(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any) -> Any:
        transposed, _, groups = rest
        shape = [int(s) for s in weight.get_size()]
        if len(x.get_size()) == 4 and is_depthwise(shape, int(x.get_size()[1]), groups, transposed=transposed):
            return _lower_depthwise(x, weight, bias, _pair(stride), _pair(padding), _pair(dilation))
        chooser = V.choices
        if len(shape) != 4 or transposed or not hasattr(chooser, "convolution"):
            return original(x, weight, bias, stride, padding, dilation, *rest)
        chooser.convolution = _describe(x, shape, _pair(stride), _pair(padding), _pair(dilation), groups)
        try:
            return original(x, weight, bias, stride, padding, dilation, *rest)
        finally:
            chooser.convolution = None

    lowerings[aten.convolution.default] = lower
    try:
        yield
    finally:
        lowerings[aten.convolution.default] = original


def _describe(
    x: Any,
    weight: list[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[str, Problem]:
    """The tuning table's key of a convolution, and the matrix product that it is."""
    batch, channels, height, width = (int(s) for s in x.get_size())
    out = [
        _out_size(size, taps, *rest)
        for size, taps, *rest in zip((height, width), weight[2:], stride, padding, dilation, strict=True)
    ]
    key = (
        f"conv {batch}x{channels}x{height}x{width} {'x'.join(map(str, weight))} stride {stride[0]}x{stride[1]} "
        f"padding {padding[0]}x{padding[1]} groups {groups} {str(x.get_dtype()).removeprefix('torch.')}"
    )
    taps = weight[2] * weight[3]
    return key, Problem(batch * out[0] * out[1], weight[0] // groups, weight[1], groups, taps)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, *others = (int(v) for v in values)
    return first, others[0] if others else first


@dataclass(frozen=True, slots=True)
class Window:
    """A depthwise convolution's geometry: (vertical, horizontal) each. size: the input's."""

    size: tuple[int, int]
    taps: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def out(self) -> tuple[int, int]:
        """The output's size."""
        vertical, horizontal = (
            _out_size(*sides)
            for sides in zip(self.size, self.taps, self.stride, self.padding, self.dilation, strict=True)
        )
        return vertical, horizontal


def depthwise_element(load_x: Load, load_w: Load, window: Window, index: Sequence[Any]) -> Any:
    """Output element `index` (batch, channel, row, column) in fp32, in Inductor's operations (`virtualized.ops`).

    load_x takes such an index of the input (its channel is the output's), load_w takes (row tap, column tap, channel).
    """
    from torch._inductor.virtualized import ops

    n, c, h, w = index
    total = None
    for i in range(window.taps[0]):
        for j in range(window.taps[1]):
            row = h * window.stride[0] + (i * window.dilation[0] - window.padding[0])
            column = w * window.stride[1] + (j * window.dilation[1] - window.padding[1])
            value = ops.to_dtype(_load_inside(load_x, (n, c, row, column), window), torch.float32)
            term = ops.mul(value, ops.to_dtype(load_w([i, j, c]), torch.float32))
            total = term if total is None else ops.add(total, term)
    return total


def _lower_depthwise(
    x: Any,
    weight: Any,
    bias: Any,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Any:
    from torch._inductor import ir
    from torch._inductor.virtualized import ops
    from torch.utils._sympy.functions import FloorDiv

    # Realized, because every input element is read by many taps: what made it must not be recomputed in each.
    x = ir.ExternKernel.require_channels_last(x)
    x.realize()
    weight = _channels_innermost(weight)
    batch, in_channels, height, width = (int(s) for s in x.get_size())
    taps_h, taps_w, out_channels = (int(s) for s in weight.get_size())
    multiplier = out_channels // in_channels
    window = Window((height, width), (taps_h, taps_w), stride, padding, dilation)
    load, load_w = x.make_loader(), weight.make_loader()
    load_bias = None if bias is None else bias.make_loader()
    dtype = x.get_dtype()

    def load_x(index: Sequence[Any]) -> Any:
        n, c, h, w = index
        return load((n, c if multiplier == 1 else FloorDiv(c, multiplier), h, w))

    def inner(index: Sequence[Any]) -> Any:
        total = depthwise_element(load_x, load_w, window, index)
        if load_bias is not None:
            total = ops.add(total, ops.to_dtype(load_bias([index[1]]), torch.float32))
        return ops.to_dtype(total, dtype)

    ranges = [batch, out_channels, *window.out]
    out = ir.Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=inner, ranges=ranges)
    return ir.ExternKernel.require_channels_last(out)


def _load_inside(load: Load, index: tuple[Any, Any, Any, Any], window: Window) -> Any:
    """Element `index` of the input, 0 outside of it. Unpadded dimensions need no check."""
    from torch._inductor.virtualized import ops

    inside = None
    for position, limit, padding in zip(index[2:], window.size, window.padding, strict=True):
        if not padding:
            continue
        at = ops.index_expr(position, torch.int64)
        low = ops.ge(at, ops.constant(0, torch.int64))
        both = ops.and_(low, ops.lt(at, ops.constant(limit, torch.int64)))
        inside = both if inside is None else ops.and_(inside, both)
    if inside is None:
        return load(index)
    return ops.masked(inside, lambda: load(index), 0.0)


def _channels_innermost(weight: Any) -> Any:
    """The weight (channels, 1, h, w) as (h, w, channels), so that the lanes of a warp read neighbours.

    A frozen constant is rearranged once, at compile time; anything else is read as it lies.
    """
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    name = weight.get_name() if hasattr(weight, "get_name") else ""
    constant = V.graph.constants.get(name)
    if constant is not None:
        return V.graph.add_tensor_constant(constant.detach().squeeze(1).permute(1, 2, 0).contiguous())
    weight.realize()
    return lowerings[aten.permute](lowerings[aten.squeeze](weight, 1), [1, 2, 0])


def _out_size(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
