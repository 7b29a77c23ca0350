"""Kernels for the tests: PTX that Triton 3.6 made of `benchmarks/gpu/colored_kernels.py`, without debug sections.

    MISSILE_GOLDEN=write pytest tests/ptx

compiles the inputs again and writes every golden file anew; look at what changed before you commit it.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from missile.coloring.shape import Form, Shape, TableSpace
from missile.coloring.translation import (
    ArithmeticTranslation,
    InPageTranslation,
    PairTranslation,
    ShadowTranslation,
    StepTranslation,
    Translation,
)
from missile.probe.layout import PageLayout

HERE = Path(__file__).parent
WRITE = os.environ.get("MISSILE_GOLDEN") == "write"

GRANULE = PageLayout(2 << 20, (*range(8), 9))
FRAME = PageLayout(2 << 20, tuple(range(12)))
PIECE = PageLayout(2 << 20, tuple(range(8)))
MASKS = (0x89000, 0x10A000, 0xC4000)
PAGES = 64

# Pointers, then scalars; threads of a block; the grid.
INPUTS: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    "add_relu": (3, (1 << 20,), 256, 512),
    "softmax": (2, (4096,), 256, 8192),
    "gather": (3, (1 << 18, 1 << 17), 128, 512),
    "histogram": (2, (1 << 18,), 128, 256),
    "convolution": (3, (28, 28, 128, 128), 128, 26),
    "matmul_64x64x32": (3, (512, 512, 256), 128, 64),
}

SHAPES = {
    "in-page-shared": Shape(Form.IN_PAGE, GRANULE),
    "in-page-xors": Shape(Form.IN_PAGE, FRAME, page_xors=True),
    "in-page-global": Shape(Form.IN_PAGE, FRAME, space=TableSpace.GLOBAL),
    "in-page-global-xors": Shape(Form.IN_PAGE, GRANULE, space=TableSpace.GLOBAL, page_xors=True),
    "arithmetic": Shape(Form.ARITHMETIC, FRAME, masks=3),
    "arithmetic-xors": Shape(Form.ARITHMETIC, FRAME, masks=3, page_xors=True),
    "shadow": Shape(Form.SHADOW, GRANULE),
    "shadow-pieces": Shape(Form.SHADOW, PIECE),
    "shadow-wide": Shape(Form.SHADOW, GRANULE, wide=True),
    "pair": Shape(Form.PAIR, PIECE),
    "pair-wide": Shape(Form.PAIR, PIECE, wide=True),
    "step": Shape(Form.STEP, PIECE),
    "step-alike": Shape(Form.STEP, PIECE, alike=True),
    "step-wide": Shape(Form.STEP, PIECE, wide=True),
}


def kernels() -> Any:
    """`colored_kernels`, which needs Triton."""
    folder = str(HERE.parents[1] / "benchmarks" / "gpu")
    if folder not in sys.path:
        sys.path.append(folder)
    import colored_kernels

    return colored_kernels


@cache
def source(name: str) -> str:
    """PTX of the kernel `name`."""
    path = HERE / "inputs" / f"{name}.ptx"
    if WRITE:
        module = kernels()
        path.parent.mkdir(exist_ok=True)
        path.write_text(_stripped(module.compile_kernel(module.KERNELS[name]).asm["ptx"]))
    return path.read_text()


def golden(name: str, text: str) -> str:
    """What the golden file `name` says; written first when golden files are."""
    path = HERE / "golden" / name
    if WRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return path.read_text()


def translation(shape: Shape, rng: np.random.Generator) -> Translation:
    """A translation of `shape` onto random colors of random pages."""
    layout = shape.layout
    if shape.form is Form.ARITHMETIC:
        colors = rng.permutation(8)[: int(rng.integers(1, 9))].tolist()
        xors = rng.integers(0, 8, PAGES) if shape.page_xors else ()
        return ArithmeticTranslation(shape, MASKS, colors, PAGES, xors)
    if shape.form is Form.SHADOW:
        units = np.concatenate([page * layout.page_bytes + layout.offsets() for page in range(4)])
        return ShadowTranslation(shape, rng.permutation(units)[: int(rng.integers(2, 9000))] // shape.unit_bytes, 4)
    if shape.form is Form.PAIR:
        return PairTranslation(shape, rng.integers(0, 2, (int(rng.integers(1, PAGES)), layout.granules // 2)))
    if shape.form is Form.STEP:
        taken = rng.integers(0, 2, (int(rng.integers(1, PAGES)), layout.granules // 4, 2))
        taken[..., 1] = taken[..., 0] if shape.alike else taken[..., 1]
        pairs = PairTranslation(replace(shape, form=Form.PAIR), taken.reshape(len(taken), -1))
        return StepTranslation.of(pairs)
    places = rng.permutation(layout.granules)[: int(rng.integers(1, layout.granules + 1))]
    xors = rng.integers(0, layout.granules, PAGES) if shape.page_xors else ()
    return InPageTranslation(shape, places, PAGES, xors)


def parameters(name: str, base: int, stride: int) -> list[bytes]:
    """Arguments of the kernel `name`: buffers from `base` on, `stride` bytes apart, then its scalars, then scratch."""
    pointers, scalars, _, _ = INPUTS[name]
    values = [struct.pack("<Q", base + index * stride) for index in range(pointers)]
    return [*values, *(struct.pack("<i", value) for value in scalars), bytes(8), bytes(8)]


def _stripped(ptx: str) -> str:
    """Without debug sections and line numbers: they are long and name folders."""
    ptx = re.sub(r"^\s*\.section\s[^{]*\{[^}]*\}\n?", "", ptx, flags=re.MULTILINE)
    return re.sub(r"^\s*\.(file|loc)\b.*\n", "", ptx, flags=re.MULTILINE)
