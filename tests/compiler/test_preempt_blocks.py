"""Blocks that leave run later, once, and after what they depend on: whatever the instants at which the flag moves."""

from __future__ import annotations

import ctypes
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from preempt_machine import Machine, module

from missile.compiler.ptx.preempt import Look, Place, arguments, make_preemptible
from missile.gpu.cuda.preempt import CONTROL_BYTES, CudaPreemptControl
from missile.gpu.cuda.streams import CudaStream
from missile.gpu.interface import Priority

# acc[i] = 3 acc[i] + other[(i + 5) % n] + salt: neither order nor number of runs can be changed without a trace.
KERNEL = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry step(.param .u64 acc, .param .u64 other, .param .u32 n, .param .u32 salt)
.reqntid 3
{
	.reg .b32 %r<12>; .reg .b64 %rd<6>;
	ld.param.u64 %rd1, [acc];
	ld.param.u64 %rd2, [other];
	ld.param.u32 %r1, [n];
	ld.param.u32 %r2, [salt];
	mov.u32 %r3, %ctaid.y;
	mov.u32 %r4, %nctaid.x;
	mov.u32 %r5, %ctaid.x;
	mad.lo.s32 %r3, %r3, %r4, %r5;
	mov.u32 %r4, %tid.x;
	mad.lo.s32 %r3, %r3, 3, %r4;
	mad.wide.u32 %rd3, %r3, 4, %rd1;
	add.s32 %r6, %r3, 5;
	rem.u32 %r6, %r6, %r1;
	mad.wide.u32 %rd4, %r6, 4, %rd2;
	ld.global.b32 %r7, [%rd3];
	ld.global.b32 %r8, [%rd4];
	mad.lo.s32 %r7, %r7, 3, %r8;
	add.s32 %r7, %r7, %r2;
	st.global.b32 [%rd3], %r7;
	ret;
}
"""
GRID, THREADS, STEPS = (4, 3), 3, 6
BLOCKS = GRID[0] * GRID[1]
CELLS = BLOCKS * THREADS
BUFFERS, MARKS, CONTROL = (0x10000, 0x20000), 0x30000, 0x40000


class Host:
    """The real control over the machine's memory, and an engine that launches, preempts and resumes."""

    def __init__(self, seed: int, look: Look, place: Place = Place.EARLY) -> None:
        self.rng = random.Random(seed)
        self.machine = Machine(self.rng, cached=look is Look.CACHED)
        self._answer = np.zeros(CONTROL_BYTES, np.uint8)
        address = int(self._answer.ctypes.data)
        driver: Any = _Driver(SimpleNamespace(), self._driver)
        block: Any = SimpleNamespace(address=CONTROL, free=lambda: None)
        answer: Any = SimpleNamespace(address=address, array=self._answer, free=lambda: None)
        self.control = CudaPreemptControl(driver, "flag", block, answer, lambda _: None)
        self.stream = CudaStream(driver, 7, Priority.LOW, None, lambda _: None)
        self._kernel = module(make_preemptible(KERNEL, look=look, place=place))
        self._answer_address = address
        write = self.machine.write

        def mirrored(where: int, value: int, nbytes: int) -> None:
            if where == address:  # host memory
                ctypes.c_uint32.from_address(address).value = value
            else:
                write(where, value, nbytes)

        self.machine.write = mirrored  # type: ignore[method-assign]
        for buffer in BUFFERS:
            for cell in range(CELLS):
                write(buffer + 4 * cell, cell * 77 + buffer, 4)

    def _driver(self, call: str, *arguments: Any, **_: Any) -> Any:
        """What the control asks of the driver: writes, at once for the flag and in order for all else."""
        if call == "cuMemcpyHtoD":
            target, source, nbytes = arguments
            self.machine.write(target, int.from_bytes(ctypes.string_at(source, nbytes), "little"), nbytes)
            return
        stream, where, value, _flags = arguments
        nbytes = {"cuStreamWriteValue32": 4, "cuStreamWriteValue64": 8}[call]
        if stream == "flag":
            self.machine.write(where, value, nbytes)
        else:
            self.machine.queue.append(lambda: self.machine.write(where, value, nbytes))

    def launch(self, step: int) -> None:
        acc, other = BUFFERS[step % 2], BUFFERS[(step + 1) % 2]
        params = (
            acc.to_bytes(8, "little"),
            other.to_bytes(8, "little"),
            CELLS.to_bytes(4, "little"),
            (step + 1).to_bytes(4, "little"),
            *arguments(CONTROL, MARKS + step * BLOCKS, step),
        )
        self.machine.launch(self._kernel, params, GRID, THREADS)

    def serve(self, requests: int, ahead: int) -> int:
        """Serve `requests`, up to `ahead` of them launched at once in segments of two steps. How often it had to resume."""
        started: list[int] = []
        resumed = 0
        while requests or started:
            while requests and len(started) < ahead:
                started.append(self.control.begin(self.stream))
                requests -= 1
                for step in range(STEPS):
                    self.launch(step)
            self.machine.drain()
            while (left := self.control.left()) is not None:
                resumed += 1
                self.control.resume(self.stream, left)
                if resumed > 30:  # enough; let it end
                    self.machine.meanwhile = lambda: None
                self.control.lower_flag()
                again = started.index(left.request)
                for number in range(again, len(started)):
                    if number > again:
                        started[number] = self.control.begin(self.stream)
                    for step in range(left.step // 2 * 2 if number == again else 0, STEPS):
                        self.launch(step)
                self.machine.drain()
            started.clear()
        return resumed

    def contents(self) -> list[int]:
        return [self.machine.read(buffer + 4 * cell, 4) for buffer in BUFFERS for cell in range(CELLS)]


class _Driver:
    def __init__(self, api: Any, call: Any) -> None:
        self.api, self._call = api, call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


def reference(requests: int) -> list[int]:
    cells = [[cell * 77 + buffer for cell in range(CELLS)] for buffer in BUFFERS]
    for _ in range(requests):
        for step in range(STEPS):
            acc, other = cells[step % 2], cells[(step + 1) % 2]
            # In place: within one step a cell only depends on the other buffer.
            cells[step % 2] = [(3 * acc[i] + other[(i + 5) % CELLS] + step + 1) % 2**32 for i in range(CELLS)]
    return cells[0] + cells[1]


@pytest.mark.parametrize("look", Look)
def test_an_undisturbed_run_is_the_plain_one(look: Look) -> None:
    host = Host(0, look)
    assert host.serve(2, ahead=2) == 0
    assert host.contents() == reference(2)


@pytest.mark.parametrize("look", Look)
@pytest.mark.parametrize("place", Place)
@pytest.mark.parametrize("ahead", [1, 3])
def test_random_flags_change_nothing(look: Look, place: Place, ahead: int) -> None:
    resumed = 0
    for seed in range(8):
        host = Host(seed, look, place)
        rate = host.rng.choice([0.002, 0.01, 0.05])

        def meanwhile(host: Host = host, rate: float = rate) -> None:
            if host.rng.random() < rate:
                host.control.raise_flag()
            elif host.rng.random() < 0.02:
                host.control.lower_flag()

        host.machine.meanwhile = meanwhile
        resumed += host.serve(3, ahead)
        assert host.contents() == reference(3), seed
        assert not any(host.machine.read(MARKS + i, 1) for i in range(STEPS * BLOCKS)), seed
    assert resumed > 15


def test_with_the_flag_up_nothing_runs_and_the_first_step_is_named() -> None:
    host = Host(1, Look.FRESH)
    before = host.contents()
    host.control.raise_flag()
    request = host.control.begin(host.stream)
    for step in range(STEPS):
        host.launch(step)
    host.machine.drain()
    assert host.contents() == before
    left = host.control.left()
    assert left is not None
    assert (left.request, left.step) == (request, 0)


def test_work_behind_blocks_that_left_waits_although_the_flag_is_down_again() -> None:
    host = Host(2, Look.FRESH)
    host.control.begin(host.stream)
    for step in range(2):
        host.launch(step)
    host.machine.drain()
    before = host.contents()
    host.control.raise_flag()
    host.launch(2)
    host.machine.drain()
    host.control.lower_flag()
    for step in range(3, STEPS):
        host.launch(step)
    host.machine.drain()
    assert host.contents() == before
    left = host.control.left()
    assert left is not None
    assert left.step == 2
