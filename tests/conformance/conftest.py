"""The implementations of the GPU interface that the conformance suite runs on. A new one adds a line here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Launch, Module
from missile.gpu.work import KernelWork

DEVICES = [
    "sim:h100",
    "sim:gtx1080",
    pytest.param("cuda:0", marks=pytest.mark.gpu),
]

# One thread keeps its SM busy for a number of clock cycles; the second kernel does nothing.
SPIN_PTX = b"""
.version 7.0
.target sm_60
.address_size 64
.visible .entry spin(.param .u64 cycles)
{
    .reg .u64 %rd<5>;
    .reg .pred %p<2>;
    ld.param.u64 %rd1, [cycles];
    mov.u64 %rd2, %clock64;
again:
    mov.u64 %rd3, %clock64;
    sub.u64 %rd4, %rd3, %rd2;
    setp.lt.u64 %p1, %rd4, %rd1;
    @%p1 bra again;
    ret;
}
.visible .entry nothing()
{
    ret;
}
"""


@pytest.fixture(params=DEVICES)
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    with open_gpu(request.param) as opened:
        yield opened


class Spin:
    """Launches of `blocks` blocks of one warp, each of which spins for about `ns`."""

    def __init__(self, gpu: Gpu) -> None:
        self.module: Module = gpu.load_module(SPIN_PTX, name="conformance")
        self._kernel = self.module.kernel("spin")
        self._sms = gpu.info.sms
        self._hz = gpu.info.clock_hz or 1.5e9

    def _rounds(self, blocks: int) -> int:
        return -(-blocks // (32 * self._sms))

    def __call__(self, ns: int, blocks: int = 1) -> Launch:
        cycles = int(ns * self._hz / 1e9)
        work = KernelWork(blocks=blocks, threads=32, blocks_per_sm=32, solo_ns=float(ns * self._rounds(blocks)))
        return Launch(self._kernel, (blocks, 1, 1), (32, 1, 1), params=(cycles.to_bytes(8, "little"),), work=work)


@pytest.fixture
def spin(gpu: Gpu) -> Spin:
    return Spin(gpu)
