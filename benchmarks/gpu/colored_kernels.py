"""Triton kernels of the kinds that compiled models are made of, and PTX of them: needs no GPU."""

# ruff: noqa: N803 - tile sizes are written as Triton writes them
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["KERNELS", "Kernel", "compile_kernel"]


@triton.jit
def add_relu(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out + i, tl.maximum(tl.load(x + i, mask=mask) + tl.load(y + i, mask=mask), 0.0), mask=mask)


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    mask = c < columns
    v = tl.load(x + row * columns + c, mask=mask, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    v = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * columns + c, (v / tl.sum(v, 0)).to(tl.float16), mask=mask)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pid = tl.program_id(0)
    across = tl.cdiv(N, BN)
    group = 8 * across
    first = pid // group * 8
    height = min(tl.cdiv(M, BM) - first, 8)
    row = first + (pid % group) % height
    column = (pid % group) // height
    rows = (row * BM + tl.arange(0, BM)) % M
    columns = (column * BN + tl.arange(0, BN)) % N
    k = tl.arange(0, BK)
    pa = a + rows[:, None] * K + k[None, :]
    pb = b + k[:, None] * N + columns[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(tl.cdiv(K, BK)):
        left = K - step * BK
        total = tl.dot(
            tl.load(pa, mask=k[None, :] < left, other=0.0), tl.load(pb, mask=k[:, None] < left, other=0.0), total
        )
        pa += BK
        pb += BK * N
    rows = row * BM + tl.arange(0, BM)
    columns = column * BN + tl.arange(0, BN)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], total.to(tl.float16), mask=mask)


@triton.jit
def convolution(x, w, out, H, W, C, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """3x3, padding 1, channels last: x (1, H, W, C), w (3, 3, C, K), out (1, H, W, K), as a gather and a product."""
    pixels = tl.program_id(0) * BM + tl.arange(0, BM)
    y = pixels // W
    z = pixels % W
    outs = tl.program_id(1) * BN + tl.arange(0, BN)
    c = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(9 * tl.cdiv(C, BK)):
        tap = step // tl.cdiv(C, BK)
        channels = (step % tl.cdiv(C, BK)) * BK + c
        iy = y + tap // 3 - 1
        ix = z + tap % 3 - 1
        inside = (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
        a = tl.load(
            x + ((iy * W + ix) * C)[:, None] + channels[None, :],
            mask=inside[:, None] & (channels[None, :] < C),
            other=0.0,
        )
        b = tl.load(w + ((tap * C + channels) * K)[:, None] + outs[None, :], mask=channels[:, None] < C, other=0.0)
        total = tl.dot(a, b, total)
    mask = (pixels[:, None] < H * W) & (outs[None, :] < K)
    tl.store(out + pixels[:, None] * K + outs[None, :], total.to(tl.float16), mask=mask)


@triton.jit
def histogram(x, out, n, BLOCK: tl.constexpr):
    """Integer atomics: the order of additions does not show."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + i, mask=mask, other=0)
    tl.atomic_add(out + (v & 4095), 1, mask=mask)
    tl.atomic_max(out + 4096, tl.max(v, 0))


@triton.jit
def gather(x, places, out, n, limit, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    j = tl.load(places + i, mask=mask, other=0)
    v = tl.load(x + j, mask=mask & (j >= 0) & (j < limit), other=0.0)
    tl.store(out + i, v, mask=mask, eviction_policy="evict_last")


@dataclass(frozen=True)
class Kernel:
    """function and the compile-time choices. signature: type of each argument that is not a constexpr.

    odd: arguments that need not be multiples of 16. A wrong promise here makes kernels write where they must not.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, int]
    warps: int = 4
    stages: int = 3
    odd: tuple[str, ...] = ()


def _matmul(m: int, n: int, k: int, warps: int, stages: int) -> Kernel:
    signature = {"a": "*fp16", "b": "*fp16", "c": "*fp16", "M": "i32", "N": "i32", "K": "i32"}
    return Kernel(f"matmul_{m}x{n}x{k}", matmul, signature, {"BM": m, "BN": n, "BK": k}, warps, stages)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("add_relu", add_relu, {"x": "*fp16", "y": "*fp16", "out": "*fp16", "n": "i32"}, {"BLOCK": 2048}, 8),
        Kernel("softmax", softmax, {"x": "*fp16", "out": "*fp16", "columns": "i32"}, {"BLOCK": 4096}, 8),
        Kernel("histogram", histogram, {"x": "*i32", "out": "*i32", "n": "i32"}, {"BLOCK": 1024}),
        Kernel(
            "gather",
            gather,
            {"x": "*fp32", "places": "*i32", "out": "*fp32", "n": "i32", "limit": "i32"},
            {"BLOCK": 512},
        ),
        Kernel(
            "convolution",
            convolution,
            {"x": "*fp16", "w": "*fp16", "out": "*fp16", "H": "i32", "W": "i32", "C": "i32", "K": "i32"},
            {"BM": 64, "BN": 64, "BK": 64},
            odd=("H", "W"),
        ),
        _matmul(64, 64, 32, 4, 3),
        _matmul(16, 64, 128, 4, 4),
        _matmul(64, 64, 64, 4, 4),
        _matmul(64, 128, 64, 4, 3),
        _matmul(128, 128, 64, 8, 3),
    )
}


def compile_kernel(kernel: Kernel, capability: int = 90) -> Any:
    """Triton's CompiledKernel: `.asm["ptx"]`, `.asm["cubin"]`, `.metadata`."""
    signature = kernel.signature | dict.fromkeys(kernel.constants, "constexpr")
    names = enumerate(kernel.signature)
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in names if name not in kernel.odd}
    source = ASTSource(kernel.function, signature, kernel.constants, divisible)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
