"""Depthwise convolutions by taps, against PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch._inductor.virtualized import V  # noqa: E402

from missile.compiler.convolution import Window, depthwise_element, is_depthwise  # noqa: E402


class _Eager:
    """Inductor's operations carried out at once, on tensors of indices."""

    def to_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        return x.to(dtype)

    def index_expr(self, x: Any, dtype: torch.dtype) -> Any:
        return x

    def constant(self, x: Any, dtype: torch.dtype) -> Any:
        return torch.tensor(x, dtype=dtype)

    def masked(self, mask: Any, body: Any, other: float) -> Any:
        return torch.where(mask, body(), other)

    mul, add, ge, lt, and_ = torch.mul, torch.add, torch.ge, torch.lt, torch.logical_and
    mul, add, ge, lt, and_ = (staticmethod(f) for f in (mul, add, ge, lt, and_))


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    taps=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=PAIR,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=PAIR,
    multiplier=st.integers(1, 3),
)
def test_taps_are_a_depthwise_convolution(
    size: tuple[int, int],
    taps: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    multiplier: int,
) -> None:
    window = Window(size, taps, stride, padding, dilation)
    assume(min(window.out) >= 1)
    channels = 4
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    weight = torch.randn(channels * multiplier, 1, *taps, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, channels)
    assert tuple(expected.shape[2:]) == window.out

    def load_x(index: Any) -> Any:
        n, c, h, w = index
        # Where the mask is off the address may be anything.
        return x[n, c // multiplier, h.clamp(0, size[0] - 1), w.clamp(0, size[1] - 1)]

    def load_w(index: Any) -> Any:
        i, j, c = index
        return weight[c, 0, i, j]

    grid = torch.meshgrid(*(torch.arange(s) for s in expected.shape), indexing="ij")
    with V.set_ops_handler(_Eager()):
        ours = depthwise_element(load_x, load_w, window, grid).value
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weight", "channels", "groups", "expected"),
    [
        ((16, 1, 3, 3), 16, 16, True),
        ((32, 1, 5, 5), 16, 16, True),
        ((16, 16, 3, 3), 16, 1, False),
        ((16, 2, 3, 3), 16, 8, False),
        ((1, 1, 3, 3), 1, 1, False),
        ((16, 1, 3), 16, 16, False),
    ],
)
def test_which_convolutions_are_depthwise(weight: tuple[int, ...], channels: int, groups: int, expected: bool) -> None:
    assert is_depthwise(weight, channels, groups) is expected
    assert not is_depthwise(weight, channels, groups, transposed=True)
