"""Rewritten kernels against the kernels that they came from, on this machine's GPU: the same bits, and what it costs.

    PYTHONPATH=src python3 benchmarks/gpu/colored.py -o OUT [--seconds 50]

Two tenants share the same pages, and one tries to read and to overwrite the other's memory. Then every kernel of
`colored_kernels.py` runs in every form of translation under random color sets (three eighths of the frames of each page,
outputs compared bit by bit) and in all colors (all frames in random order, or of each pair one by chance: the same, and
timed by turns with the original kernel).
OUT gets `colored.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from colored_kernels import KERNELS, compile_kernel

from missile.coloring.pool import ColoredPool, TenantMemory
from missile.coloring.shape import LOGICAL_BASE, Escape, Form, Shape, TableSpace
from missile.coloring.shares import Share
from missile.coloring.translation import (
    ArithmeticTranslation,
    InPageTranslation,
    PairTranslation,
    ShadowTranslation,
    Translation,
)
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.rewrite import Placement, rewrite
from missile.compiler.ptx.transfer import GATHER, SCATTER, THREADS, blocks_for, transfer_ptx
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Launch, Stream
from missile.probe.layout import PageLayout

PAGE = 2 << 20
GRANULE = PageLayout(PAGE, (*range(8), 9))  # 512 bytes in two halves, as measured on Hopper
FRAME = PageLayout(PAGE, tuple(range(12)))  # 4 KiB
PIECE = PageLayout(PAGE, tuple(range(8)))  # half of a granule; the bit above tells two granules apart
MASKS = (0x89000, 0x10A000, 0xC4000)  # parities as an H100 has them, each with one of bits 12 to 14
PAGES = 640
ARCH = "sm_90a"
_LOOKUP = re.compile(r"ld\.global\.L1::evict_last\S* (%missile_w\d+), \[%missile_d\d+\];")


@dataclass(frozen=True)
class Variant:
    name: str
    shape: Shape
    placement: Placement = Placement.EARLY
    lookups: bool = True  # False: without loads from the table, all of it taken for zeros (what the rest costs)

    def rewritten(self, ptx: str) -> str:
        return ptx if self.lookups else _LOOKUP.sub(r"mov.b32 \1, 0;", ptx)

    def translation(self, everything: bool, rng: np.random.Generator) -> Translation:
        """All frames of `PAGES` pages in random order, or three eighths of them under random constants of pages."""
        shape, layout = self.shape, self.shape.layout
        if shape.form is Form.ARITHMETIC:
            colors = rng.permutation(8)[: 8 if everything else 3].tolist()
            return ArithmeticTranslation(shape, MASKS, colors, PAGES, self._xors(8, rng))
        if not self.lookups:
            return PairTranslation(shape, np.zeros((PAGES, layout.granules // 2), np.int64))
        if shape.form is Form.PAIR:
            # A granule has two pieces, of which one is taken as the other is.
            choices = np.repeat(rng.integers(0, 2, (PAGES, layout.granules // 4)), 2, axis=1)
            return PairTranslation(shape, choices)
        count = layout.granules if everything else layout.granules * 3 // 8 + 5
        places = rng.permutation(layout.granules)[:count]
        if shape.form is Form.SHADOW:
            parts = [rng.permutation(layout.granules)[:count] for _ in range(PAGES)]
            return ShadowTranslation.from_pages(layout, parts)
        return InPageTranslation(shape, places, PAGES, self._xors(layout.granules, rng))

    def _xors(self, limit: int, rng: np.random.Generator) -> Any:
        return rng.integers(0, limit, PAGES) if self.shape.page_xors else ()


def _in_page(layout: PageLayout, space: TableSpace, **more: Any) -> Shape:
    return Shape(Form.IN_PAGE, layout, space=space, **more)


VARIANTS = (
    Variant("pair 256", Shape(Form.PAIR, PIECE)),
    Variant("pair 256, kept", Shape(Form.PAIR, PIECE), Placement.KEPT),
    Variant("pair 256, at definition", Shape(Form.PAIR, PIECE), Placement.DEFINITION),
    Variant("pair 256, wide", Shape(Form.PAIR, PIECE, wide=True)),
    Variant("pair 256, no lookups", Shape(Form.PAIR, PIECE), lookups=False),
    Variant("pair 4K", Shape(Form.PAIR, FRAME)),
    Variant("in-page shared 4K", _in_page(FRAME, TableSpace.SHARED)),
    Variant("in-page shared 512", _in_page(GRANULE, TableSpace.SHARED)),
    Variant("in-page global 4K", _in_page(FRAME, TableSpace.GLOBAL)),
    Variant("in-page global 512", _in_page(GRANULE, TableSpace.GLOBAL)),
    Variant("in-page global 4K, page constants", _in_page(FRAME, TableSpace.GLOBAL, page_xors=True)),
    Variant("arithmetic 4K", Shape(Form.ARITHMETIC, FRAME, masks=3)),
    Variant("shadow 4K", Shape(Form.SHADOW, FRAME)),
    Variant("shadow 512", Shape(Form.SHADOW, GRANULE)),
    Variant("shadow 256", Shape(Form.SHADOW, PIECE)),
    Variant("shadow 256, kept", Shape(Form.SHADOW, PIECE), Placement.KEPT),
    Variant("shadow 256, wide", Shape(Form.SHADOW, PIECE, wide=True)),
)


@dataclass(frozen=True)
class Case:
    """inputs: tensors on the GPU. output: its element type and count. scalars: what follows the pointers."""

    name: str
    kernel: str
    kind: str
    grid: tuple[int, int, int]
    inputs: Callable[[], Sequence[torch.Tensor]]
    output: tuple[torch.dtype, int]
    scalars: tuple[int, ...]


def _half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").half()


def _product(m: int, n: int, k: int, tile: tuple[int, int, int]) -> Case:
    name = "x".join(map(str, tile))
    grid = (math.ceil(m / tile[0]) * math.ceil(n / tile[1]), 1, 1)
    return Case(
        f"matmul {m}x{n}x{k}, tile {name}",
        f"matmul_{name}",
        "GEMM",
        grid,
        lambda: (_half(m, k), _half(k, n)),
        (torch.float16, m * n),
        (m, n, k),
    )


def _pointwise(n: int) -> Case:
    grid = (math.ceil(n / 2048), 1, 1)
    return Case(f"add_relu {n}", "add_relu", "pointwise", grid, lambda: (_half(n), _half(n)), (torch.float16, n), (n,))


def _gather_inputs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.randint(-n // 8, n + n // 8, (n,), device="cuda", dtype=torch.int32)
    return torch.randn(n, device="cuda"), places


N = 1 << 22
CASES = (
    _pointwise(1 << 25),
    _pointwise(1 << 20),
    Case(
        "softmax 8192x4096", "softmax", "reduction", (8192, 1, 1),
        lambda: (_half(8192, 4096),), (torch.float16, 1 << 25), (4096,),
    ),
    Case("gather 4 M", "gather", "gather", (N // 512, 1, 1), lambda: _gather_inputs(N), (torch.float32, N), (N, N)),
    Case(
        "histogram 4 M", "histogram", "atomics", (N // 1024, 1, 1),
        lambda: (torch.randint(0, 1 << 20, (N,), device="cuda", dtype=torch.int32),), (torch.int32, 4352), (N,),
    ),
    Case(
        "convolution 3x3 28x28 128>128", "convolution", "convolution", (13, 2, 1),
        lambda: (_half(784, 128), _half(9 * 128, 128)), (torch.float16, 784 * 128), (28, 28, 128, 128),
    ),
    Case(
        "convolution 3x3 112x112 64>64", "convolution", "convolution", (196, 1, 1),
        lambda: (_half(112 * 112, 64), _half(9 * 64, 64)), (torch.float16, 112 * 112 * 64), (112, 112, 64, 64),
    ),
    _product(4096, 4096, 4096, (128, 128, 64)),
    _product(1024, 1024, 1024, (64, 128, 64)),
    _product(16, 4096, 4096, (16, 64, 128)),
    _product(128, 4096, 4096, (64, 64, 64)),
)  # fmt: skip


class Runner:
    """One variant's tenants and kernels on the GPU."""

    def __init__(self, gpu: Gpu, stream: Stream) -> None:
        self.gpu, self.stream = gpu, stream

    def kernel(self, cubin: bytes, entry: str) -> Any:
        return self.gpu.load_module(cubin, name=entry).kernel(entry)

    def move(self, kernel: Any, memory: TenantMemory, plain: int, logical: int, nbytes: int) -> Launch:
        params = *(value.to_bytes(8, "little") for value in (plain, logical, nbytes)), memory.constants
        return Launch(kernel, (blocks_for(nbytes), 1, 1), (THREADS, 1, 1), 0, params)

    def run(self, *launches: Launch) -> None:
        for launch in launches:
            self.stream.launch(launch)
        self.stream.synchronize()


def launch_of(kernel: Any, case: Case, compiled: Any, pointers: Sequence[int], *constants: bytes) -> Launch:
    values = [p.to_bytes(8, "little") for p in pointers]
    values += [s.to_bytes(4, "little") for s in case.scalars]
    values += [bytes(8), bytes(8), *constants]  # Triton's scratch memory, which these kernels don't use
    meta = compiled.metadata
    return Launch(kernel, case.grid, (32 * meta.num_warps, 1, 1), meta.shared, tuple(values))


def by_turns(gpu: Gpu, stream: Stream, launches: Sequence[Launch], rounds: int = 7) -> list[float]:
    """Median time of one launch of each, ns: graphs of repeats, by turns."""
    marks = gpu.create_event(), gpu.create_event()

    def once(graph: Any, count: int) -> float:
        stream.record(marks[0])
        stream.launch_graph(graph)
        stream.record(marks[1])
        stream.synchronize()
        return (marks[1].time_ns() - marks[0].time_ns()) / count

    first = gpu.create_graph([launches[0]] * 5)
    once(first, 5)
    count = max(4, min(100, int(300_000 / max(once(first, 5), 1.0))))
    graphs = [gpu.create_graph([launch] * count) for launch in launches]
    times: list[list[float]] = [[] for _ in launches]
    for graph in graphs:
        once(graph, count)
    for _ in range(rounds):
        for graph, taken in zip(graphs, times, strict=True):
            taken.append(once(graph, count))
    for graph in (first, *graphs):
        graph.close()
    return [statistics.median(taken) for taken in times]


class Plain:
    """A case's inputs, output and original kernel in ordinary memory."""

    def __init__(self, case: Case, runner: Runner, compiled: Any) -> None:
        self.inputs = [t.contiguous() for t in case.inputs()]
        self.output = torch.zeros(case.output[1], dtype=case.output[0], device="cuda")
        torch.cuda.synchronize()
        kernel = runner.kernel(compiled.asm["cubin"], compiled.metadata.name)
        self.launch = launch_of(kernel, case, compiled, [t.data_ptr() for t in (*self.inputs, self.output)])
        runner.run(self.launch)
        self.expected = self.output.clone()
        self._sums = self._checksums()
        self._runner = runner

    def _checksums(self) -> list[int]:
        return [int(t.view(torch.uint8).to(torch.int64).sum()) for t in self.inputs]

    def says_the_same_again(self) -> str:
        """What of the original kernel differs from its first run: "" nothing."""
        changed = [f"input {i}" for i, (a, b) in enumerate(zip(self._sums, self._checksums(), strict=True)) if a != b]
        self.output.zero_()
        torch.cuda.synchronize()
        self._runner.run(self.launch)
        differs = int((self.output.view(torch.uint8) != self.expected.view(torch.uint8)).sum())
        return ", ".join([*changed, f"{differs} bytes of its output"] if differs else changed)


class Colored:
    """The same in colored memory, under one variant and one translation."""

    def __init__(self, case: Case, plain: Plain, runner: Runner, memory: TenantMemory, built: dict[str, Any]) -> None:
        self._runner = runner
        buffers = [memory.allocate(t.nbytes) for t in (*plain.inputs, plain.output)]
        scatter = runner.kernel(built["transfer"], SCATTER)
        self.gather = runner.kernel(built["transfer"], GATHER)
        self.scatter = runner.move(
            scatter, memory, plain.inputs[0].data_ptr(), buffers[0].address, plain.inputs[0].nbytes
        )
        zeros = torch.zeros_like(plain.output)
        torch.cuda.synchronize()
        for tensor, buffer in zip((*plain.inputs, zeros), buffers, strict=True):
            runner.run(runner.move(scatter, memory, tensor.data_ptr(), buffer.address, tensor.nbytes))
        compiled = built["compiled"][case.kernel]
        kernel = runner.kernel(built[case.kernel], compiled.metadata.name)
        self.launch = launch_of(kernel, case, compiled, [b.address for b in buffers], memory.constants)
        self.registers = kernel.registers
        self._plain, self._buffers, self._memory = plain, buffers, memory

    def same_bits(self) -> bool:
        runner, out = self._runner, self._buffers[-1]
        got = torch.empty_like(self._plain.expected)
        torch.cuda.synchronize()
        runner.run(self.launch, runner.move(self.gather, self._memory, got.data_ptr(), out.address, got.nbytes))
        differs = torch.nonzero(got != self._plain.expected).flatten()
        self.differences = [len(differs), *differs[:4].tolist(), *differs[-4:].tolist()]
        same = torch.equal(got.view(torch.uint8), self._plain.expected.view(torch.uint8))
        torch.cuda.synchronize()
        return same

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.free()


def chosen(names: str) -> tuple[Variant, ...]:
    """The variants whose names are in `names`, separated by semicolons; all for ""."""
    wanted = names.split(";") if names else [v.name for v in VARIANTS]
    return tuple(v for v in VARIANTS if v.name in wanted)


def build(variants: Sequence[Variant]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compile, rewrite and assemble everything: cubins by kernel for each variant (and the transfer kernels)."""
    names = sorted({case.kernel for case in CASES})
    with ThreadPoolExecutor(14) as workers:
        compiled = {name: compile_kernel(KERNELS[name]) for name in names}

        def made(variant: Variant, name: str) -> bytes:
            if name == "transfer":
                return assemble(variant.rewritten(transfer_ptx(variant.shape, ARCH)), arch=ARCH, name=name)
            new = rewrite(compiled[name].asm["ptx"], variant.shape, name=name, placement=variant.placement)
            return assemble(variant.rewritten(new.ptx), arch=ARCH, name=name)

        futures = [{name: workers.submit(made, v, name) for name in (*names, "transfer")} for v in variants]
        built = [{name: future.result() for name, future in row.items()} for row in futures]
    for row in built:
        row["compiled"] = compiled
    return compiled, built


def oracle(
    gpu: Gpu, stream: Stream, pool: ColoredPool, variants: Sequence[Variant], compiled: Any, built: Any, deadline: float
) -> list[dict[str, Any]]:
    runner = Runner(gpu, stream)
    rng = np.random.default_rng(4)
    plains = {case.name: Plain(case, runner, compiled[case.kernel]) for case in CASES}
    rows = []
    for variant, cubins in zip(variants, built, strict=True):
        for everything in (False, True):
            if time.monotonic() > deadline:
                print(f"out of time before {variant.name}", flush=True)
                return rows
            translation = variant.translation(everything, rng)
            memory = pool.attach(Share("tenant", (), tuple(rng.permutation(PAGES).tolist()), translation))
            for case in CASES:
                plain = plains[case.name]
                row = {"variant": variant.name, "case": case.name, "kind": case.kind, "all_frames": everything}
                try:
                    colored = Colored(case, plain, runner, memory, cubins)
                    row["same_bits"] = colored.same_bits()
                    if not row["same_bits"]:
                        row |= {"differences": colored.differences, "plain_differs": plain.says_the_same_again()}
                        print(row, flush=True)
                    row["registers"] = colored.registers
                    if everything:
                        plain_ns, colored_ns = by_turns(gpu, stream, (plain.launch, colored.launch))
                        row |= {"plain_ns": plain_ns, "colored_ns": colored_ns, "ratio": colored_ns / plain_ns}
                        if case is CASES[0]:
                            row["scatter_bytes_per_s"] = (
                                plain.inputs[0].nbytes / by_turns(gpu, stream, (colored.scatter,))[0] * 1e9
                            )
                    colored.close()
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"
                    traceback.print_exc()
                    if getattr(error, "usable", "") == "nothing":
                        return [*rows, row]
                rows.append(row)
            memory.close()
    return rows


def protection(gpu: Gpu, stream: Stream, pool: ColoredPool) -> dict[str, Any]:
    """Tenant A has three eighths of every frame's places, B the rest of the same pages; A reaches for everything."""
    runner = Runner(gpu, stream)
    rng = np.random.default_rng(5)
    shape = _in_page(GRANULE, TableSpace.SHARED, escape=Escape.COUNT, wide=True)
    order = rng.permutation(GRANULE.granules)
    cut = GRANULE.granules * 3 // 8
    pages = tuple(range(32))
    transfer = assemble(transfer_ptx(shape, ARCH), arch=ARCH)
    memories = []
    for tenant, places in (("a", order[:cut]), ("b", order[cut:])):
        memories.append(pool.attach(Share(tenant, (), pages, InPageTranslation(shape, np.sort(places), len(pages)))))
    a, b = memories
    size_b = b.translation.logical_bytes
    secret = torch.full((size_b // 4,), 0x5EC2E75E, dtype=torch.int32, device="cuda")
    reach = len(pages) * PAGE  # beyond A's memory, as much as all the pages have
    got = torch.empty((reach + a.translation.logical_bytes) // 4, dtype=torch.int32, device="cuda")
    junk = torch.full_like(got, 0x0BADF00D)
    torch.cuda.synchronize()
    scatter, gather = (runner.kernel(transfer, entry) for entry in (SCATTER, GATHER))
    base = LOGICAL_BASE
    runner.run(runner.move(scatter, b, secret.data_ptr(), base, size_b))
    runner.run(runner.move(gather, a, got.data_ptr(), base, got.nbytes))
    read_secret = int((got == 0x5EC2E75E).sum())
    runner.run(runner.move(gather, a, got.data_ptr(), base - reach, reach))
    read_secret += int((got == 0x5EC2E75E).sum())
    runner.run(runner.move(scatter, a, junk.data_ptr(), base, junk.nbytes))
    back = torch.empty_like(secret)
    torch.cuda.synchronize()
    runner.run(runner.move(gather, b, back.data_ptr(), base, size_b))
    counter = gpu.allocate_host(8)
    stream.copy_to_host(counter, a.escapes)
    stream.synchronize()
    escapes = int(counter.array.view(np.uint64)[0])
    counter.free()
    expected = (got.nbytes - a.translation.logical_bytes) // 16 * 2 + reach // 16
    for memory in memories:
        memory.close()
    return {
        "words_of_neighbour_read": read_secret,
        "neighbour_unchanged": bool(torch.equal(back, secret)),
        "escapes_counted": escapes,
        "escapes_expected": expected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--variants", default="", help="names, separated by semicolons; all where left out")
    arguments = parser.parse_args()
    started = time.monotonic()
    deadline = started + arguments.seconds
    torch.manual_seed(0)
    variants = chosen(arguments.variants)
    compiled, built = build(variants)
    print(f"built in {time.monotonic() - started:.1f} s", flush=True)
    with open_gpu("cuda:0") as gpu:
        stream = gpu.create_stream()
        result: dict[str, Any] = {"gpu": gpu.info.name, "driver": gpu.info.driver, "torch": torch.__version__}
        with ColoredPool(gpu, PAGES) as pool:
            try:
                result["protection"] = protection(gpu, stream, pool)
                print(result["protection"], flush=True)
            except Exception as error:
                result["protection"] = {"error": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
            result["rows"] = oracle(gpu, stream, pool, variants, compiled, built, deadline)
        stream.close()
    result["seconds"] = time.monotonic() - started
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "colored.json").write_text(json.dumps(result, indent=1) + "\n")
    report(result)


def report(result: dict[str, Any]) -> None:
    rows = result["rows"]
    print(f"{sum(r.get('same_bits', False) for r in rows)} of {len(rows)} runs gave the same bits")
    names = list(dict.fromkeys(r["case"] for r in rows))
    print(f"{'':34s}" + " ".join(f"{name[:14]:>14s}" for name in names))
    for variant in dict.fromkeys(r["variant"] for r in rows):
        cells = {r["case"]: r for r in rows if r["variant"] == variant and r["all_frames"]}
        wrong = [r["case"] for r in rows if r["variant"] == variant and not r.get("same_bits")]
        ratios = [cells[name]["ratio"] for name in names if "ratio" in cells.get(name, {})]
        line = " ".join(f"{cells.get(name, {}).get('ratio', math.nan):14.3f}" for name in names)
        mean = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else math.nan
        print(f"{variant:34s}{line}  geometric mean {mean:.3f}" + (f"  WRONG: {wrong}" if wrong else ""))
    print(f"{result['seconds']:.1f} s")


if __name__ == "__main__":
    main()
