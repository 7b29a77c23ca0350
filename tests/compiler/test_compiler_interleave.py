"""Images from planes into pixels: the kernel's code, run thread by thread."""

from __future__ import annotations

import random

import numpy as np
import pytest
from preempt_machine import Machine, module

from missile.compiler.ptx.interleave import THREADS, interleave_grid, interleave_ptx


@pytest.mark.parametrize(
    ("images", "channels", "pixels", "nbytes"), [(2, 3, 300, 2), (1, 2, 1, 1), (3, 8, 5, 8), (1, 4, 257, 4)]
)
def test_every_value_lands_in_its_pixel(images: int, channels: int, pixels: int, nbytes: int) -> None:
    machine = Machine(random.Random(1))
    source, target = 0x7F00_0000_0000, 0x7F10_0000_0000
    values = np.random.default_rng(2).integers(0, 256, (images, channels, pixels, nbytes), np.uint8)
    for at, byte in enumerate(values.tobytes()):
        machine.memory[source + at] = byte
    before = set(machine.memory)
    grid = interleave_grid(images, pixels)
    params = (source.to_bytes(8, "little"), target.to_bytes(8, "little"))
    machine.launch(module(interleave_ptx(channels, pixels, nbytes)), params, grid[:2], THREADS)
    machine.drain()
    expected = values.transpose(0, 2, 1, 3).tobytes()
    assert bytes(machine.memory[target + at] for at in range(len(expected))) == expected
    assert set(machine.memory) - before == set(range(target, target + len(expected)))  # and nothing else is written
