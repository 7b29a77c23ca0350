"""Which colored code the benchmark of whole models runs, and who makes it while the GPU is busy."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from missile.coloring.carried import Carried
from missile.coloring.halves import find_halves
from missile.coloring.shape import Form, Shape, TableSpace
from missile.coloring.shares import Demand, Share, plan_shares
from missile.compiler.carrying import carried_by
from missile.compiler.colored import (
    ColoredKernels,
    color_kernels,
)
from missile.compiler.package import ModelPackage
from missile.compiler.planning import alignments, needed_bytes
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.blocks import Blocks
from missile.compiler.ptx.edits import Edit, apply
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.rewrite import Placement, rewrite
from missile.probe.channel_map import ChannelMap

TRANSFER_BYTES = 64 << 20  # that speed is measured with


@dataclass(frozen=True)
class Variant:
    """all_colors: the tenant has every color; else half of them, chosen at random where the form lets one choose.
    mixed: each kernel has what is fastest with it, of the usual code, lookups kept in loops, windows, and steps for the same
    memory; measured first.
    """

    name: str
    form: Form
    space: TableSpace = TableSpace.SHARED
    all_colors: bool = False
    mixed: bool = False
    timed: bool = True

    def share(self, channel_map: ChannelMap, pages: int, nbytes: int, rng: np.random.Generator) -> Share:
        colors = tuple(range(len(channel_map.colors)))
        if not self.all_colors:
            halves = find_halves(channel_map)
            if self.form is Form.PAIR and halves is not None:
                colors = halves.sets[int(rng.integers(2))]
            else:
                colors = tuple(rng.permutation(len(colors))[: len(colors) // 2].tolist())
        demand = Demand("tenant", colors, nbytes)
        return plan_shares(
            channel_map, self._pages(channel_map, pages, rng), [demand], form=self.form, space=self.space
        )[0]

    def _pages(self, channel_map: ChannelMap, pages: int, rng: np.random.Generator) -> Any:
        """Constants of made-up pages: all alike for a table of one page, else of every kind that the map knows."""
        model = channel_map.model
        limits = (1, 1, 1) if self.form is Form.IN_PAGE else (len(model.patterns), 64, len(model.permutations))
        return np.stack([rng.integers(0, limit, pages) for limit in limits], axis=1)


def variants() -> dict[str, Variant]:
    found = []
    for all_colors, what in ((False, "half"), (True, "all")):
        found.append(Variant(f"pair-{what}", Form.PAIR, all_colors=all_colors))
        found.append(Variant(f"pair-{what}-mixed", Form.PAIR, all_colors=all_colors, mixed=True))
        found += [Variant(f"in-page-{s}-{what}", Form.IN_PAGE, s, all_colors) for s in TableSpace]
        found.append(Variant(f"shadow-{what}", Form.SHADOW, all_colors=all_colors))
    return {variant.name: variant for variant in found}


class Builder:
    """Colored code, made by all cores but one while the GPU measures what is there already. Use it in a `with`."""

    def __init__(self, packages: dict[str, tuple[ModelPackage, Path]]) -> None:
        self._packages = packages
        self._workers = ProcessPoolExecutor(max((os.cpu_count() or 2) - 1, 1), multiprocessing.get_context("spawn"))
        self._threads = ThreadPoolExecutor(2)  # so that code is made about in the order that it was asked for
        self._pending: dict[tuple[str, Shape], Future[ColoredKernels]] = {}
        self._placed: dict[tuple[str, Shape, Placement], list[Future[bytes]]] = {}
        self._rolled: dict[str, dict[str, Future[bytes]]] = {}
        self.seconds: dict[str, float] = {}

    def ask(self, name: str, shape: Shape) -> None:
        if (name, shape) not in self._pending:
            self._pending[name, shape] = self._threads.submit(self._make, name, shape)

    def ask_placed(self, name: str, shape: Shape, placement: Placement) -> None:
        """Also code with another placement than the usual one."""
        package, directory = self._packages[name]
        aligned = alignments(package)
        carried = carried_by(package, shape) if placement is Placement.CARRIED else {}
        self._placed[name, shape, placement] = [
            self._workers.submit(
                placed,
                (directory / "kernels" / f"{k.id}.ptx").read_text(),
                shape,
                k.id,
                placement,
                aligned.get(k.id, ()),
                carried.get(k.id),
            )
            for k in package.kernels
        ]

    def ask_rolled(self, name: str) -> None:
        """Also plain code whose loops are not unrolled."""
        package, directory = self._packages[name]
        self._rolled[name] = {
            k.id: self._workers.submit(rolled, (directory / "kernels" / f"{k.id}.ptx").read_text(), k.id)
            for k in package.kernels
        }

    def rolled(self, name: str, folder: Path) -> bool:
        """Make `folder` a directory of the package with such code; False where nobody asked for it."""
        if name not in self._rolled:
            return False
        directory = self._packages[name][1]
        for path in directory.iterdir():
            if path.name != "kernels":
                (folder / path.name).symlink_to(path.resolve())
        (folder / "kernels").mkdir()
        for kernel, made in self._rolled[name].items():
            plain = (directory / "kernels" / f"{kernel}.cubin").read_bytes()
            (folder / "kernels" / f"{kernel}.cubin").write_bytes(made.result() or plain)
        return True

    def code(self, name: str, shape: Shape) -> ColoredKernels:
        return self._pending[name, shape].result()

    def placed(self, name: str, shape: Shape, placement: Placement) -> dict[str, bytes]:
        """By kernel, for those that it makes a difference to."""
        kernels = self._packages[name][0].kernels
        made = (future.result() for future in self._placed[name, shape, placement])
        return {kernel.id: cubin for kernel, cubin in zip(kernels, made, strict=True) if cubin}

    def _make(self, name: str, shape: Shape) -> ColoredKernels:
        package, directory = self._packages[name]
        begin = time.perf_counter()
        # Not what was measured to be best up to now: that is what is compared.
        made = color_kernels(package, directory, shape, placement=Placement.EARLY, executor=self._workers, keep=False)
        self.seconds[f"{name} {shape.form}"] = round(time.perf_counter() - begin, 2)
        return made

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._workers.shutdown(cancel_futures=True)


def placed(
    ptx: str, shape: Shape, name: str, placement: Placement, aligned: tuple[int, ...], carried: Carried | None
) -> bytes:
    """The cubin of a kernel with a placement; nothing where that is no other code than early. For other processes."""
    text = rewrite(ptx, shape, name=name, placement=placement, aligned=aligned, carried=carried).ptx
    if text == rewrite(ptx, shape, name=name, placement=Placement.EARLY).ptx:
        return b""
    found = re.search(r"\.target\s+(\w+)", ptx)
    return assemble(text, arch=found[1] if found else "", name=name)


def rolled(ptx: str, name: str) -> bytes:
    """The cubin of a plain kernel whose loops of one block ptxas may not unroll; nothing where there are none."""
    edits = []
    for function in parse(ptx, name).functions:
        blocks = Blocks(function)
        starts = (blocks.units_of(b)[0].start for b in range(blocks.count) if blocks.repeats(b))
        edits += [Edit(start, start, '.pragma "nounroll";\n\t') for start in starts]
    found = re.search(r"\.target\s+(\w+)", ptx)
    return assemble(apply(ptx, edits), arch=found[1] if found else "", name=name) if edits else b""


def plan(
    package: ModelPackage, chosen: Sequence[Variant], channel_map: ChannelMap, rng: np.random.Generator
) -> dict[str, Share]:
    """A share for each variant, in the first pages of the pool."""
    shares = {}
    for variant in chosen:
        nbytes = needed_bytes(package) * (2 if variant.mixed else 1) + TRANSFER_BYTES
        shares[variant.name] = variant.share(channel_map, pages_for(nbytes, channel_map), nbytes, rng)
    return shares


def pages_for(nbytes: int, channel_map: ChannelMap) -> int:
    """Enough of them, with half of the colors; some colors have fewer slices."""
    return math.ceil(nbytes / 0.45 / channel_map.page_bytes) + 8
