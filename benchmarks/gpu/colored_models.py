"""Whole models in colored memory against the same packages in plain memory: the same bits, and what it costs.

    PYTHONPATH=src python3 benchmarks/gpu/colored_models.py -o OUT --packages DIR --map MAP.json [--models a,b]

DIR has a package directory for each model. Every variant (a form of translation and a set of colors) runs in one process
with the plain package, by turns. Pages are taken to be of kinds that the map knows, drawn at random (all of one kind for
the table of one page): which slices they really have makes no difference to what a translation computes or costs. OUT gets
`models.json` and a table of it. --startup loads decoder_1b as `missile` does, and says how long each part takes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import statistics
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from missile.coloring.halves import find_halves
from missile.coloring.pool import ColoredPool, TenantMemory
from missile.coloring.shape import Form, Shape, TableSpace
from missile.coloring.shares import Demand, Share, plan_shares
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.colored import (
    ColoredKernels,
    color_kernels,
    colored_kernels,
    is_colored,
    read_colored,
    shadow_shape,
    shape_name,
)
from missile.compiler.mover import Mover
from missile.compiler.package import BufferKind, KernelStep, ModelPackage, read_package
from missile.compiler.placements import PlacementTable
from missile.compiler.planning import needed_bytes, place_buffers
from missile.compiler.profile import measure_steps
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.rewrite import Placement, rewrite
from missile.gpu import open_gpu
from missile.gpu.interface import Copy, Fill, Gpu, Graph, Launch, Stream
from missile.probe import map_for
from missile.probe.channel_map import ChannelMap
from missile.probe.map_file import read_map
from missile.runtime.coloring import ColoredTenants, Coloring

_BATCH = 10  # launches between two waits
_ROUNDS = 5
_TRANSFER_BYTES = 64 << 20


@dataclass(frozen=True)
class Variant:
    """all_colors: the tenant has every color; else half of them, chosen at random where the form lets one choose.
    mixed: each kernel has what is fastest with it, of the usual code, lookups kept in loops, and a shadow page table of the
    same memory; measured first.
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
        self._kept: dict[tuple[str, Shape], list[Future[bytes]]] = {}
        self.seconds: dict[str, float] = {}

    def ask(self, name: str, shape: Shape) -> None:
        if (name, shape) not in self._pending:
            self._pending[name, shape] = self._threads.submit(self._make, name, shape)

    def ask_kept(self, name: str, shape: Shape) -> None:
        """Also code that keeps lookups in loops."""
        package, directory = self._packages[name]
        sources = ((k.id, (directory / "kernels" / f"{k.id}.ptx").read_text()) for k in package.kernels)
        self._kept[name, shape] = [self._workers.submit(kept, text, shape, key) for key, text in sources]

    def code(self, name: str, shape: Shape) -> ColoredKernels:
        return self._pending[name, shape].result()

    def kept(self, name: str, shape: Shape) -> dict[str, bytes]:
        """By kernel, for those that it makes a difference to."""
        kernels = self._packages[name][0].kernels
        made = (future.result() for future in self._kept[name, shape])
        return {kernel.id: cubin for kernel, cubin in zip(kernels, made, strict=True) if cubin}

    def _make(self, name: str, shape: Shape) -> ColoredKernels:
        package, directory = self._packages[name]
        if is_colored(directory, shape):
            return read_colored(package, directory, shape)
        begin = time.perf_counter()
        made = color_kernels(package, directory, shape, executor=self._workers)
        self.seconds[f"{name} {shape.form}"] = round(time.perf_counter() - begin, 2)
        return made

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._workers.shutdown(cancel_futures=True)


def kept(ptx: str, shape: Shape, name: str) -> bytes:
    """The cubin of a kernel that keeps lookups in loops; nothing where that is the usual code. For other processes."""
    text = rewrite(ptx, shape, name=name, placement=Placement.KEPT).ptx
    if text == rewrite(ptx, shape, name=name).ptx:
        return b""
    found = re.search(r"\.target\s+(\w+)", ptx)
    return assemble(text, arch=found[1] if found else "", name=name)


class Timer:
    """Durations of one graph's launches, ns."""

    def __init__(self, gpu: Gpu, stream: Stream) -> None:
        self._stream = stream
        self._events = [(gpu.create_event(), gpu.create_event()) for _ in range(_BATCH)]

    def batch(self, graph: Graph) -> list[int]:
        for start, end in self._events:
            self._stream.record(start)
            self._stream.launch_graph(graph)
            self._stream.record(end)
        self._stream.synchronize()
        return [end.time_ns() - start.time_ns() for start, end in self._events]

    def by_turns(self, graphs: dict[str, Graph]) -> dict[str, float]:
        """Median duration of each."""
        taken: dict[str, list[int]] = {name: [] for name in graphs}
        for graph in graphs.values():
            self.batch(graph)
        for _ in range(_ROUNDS):
            for name, graph in graphs.items():
                taken[name] += self.batch(graph)
        return {name: statistics.median(times) for name, times in taken.items()}


class Contents:
    """What a run left in a model's memory: scratch, state and output, by kind."""

    def __init__(self, gpu: Gpu, stream: Stream, package: ModelPackage) -> None:
        self._gpu, self._stream, self._package = gpu, stream, package
        self._places = place_buffers(package)
        kinds = (BufferKind.SCRATCH, BufferKind.STATE, BufferKind.OUTPUT)
        self.regions = {kind: self._places[kind].nbytes for kind in kinds if kind in self._places}
        self._host = gpu.allocate_host(max(self.regions.values()), tenant="check")
        self._input = gpu.allocate_host(max(package.input_bytes * 2, 1 << 20), tenant="check")
        view = self._input.array
        view[:] = 0
        if all(spec.dtype in ("float16", "torch.float16") for spec in package.inputs):
            noise = np.random.default_rng(0).standard_normal(view.nbytes // 2, dtype=np.float32).astype(np.float16)
            view[:] = noise.view(np.uint8)

    def base(self, model: BoundModel, kind: BufferKind) -> int:
        name, offset = next(iter(self._places[kind].offsets.items()))
        return model.addresses[name] - offset

    def run(self, model: BoundModel, mover: Mover | None) -> dict[BufferKind, Any]:
        """The same input on cleared scratch; call it on a model that has not run yet."""
        stream = self._stream
        if BufferKind.SCRATCH in self.regions:
            base, nbytes = self.base(model, BufferKind.SCRATCH), self.regions[BufferKind.SCRATCH]
            stream.launch(Fill(base, nbytes) if mover is None else mover.fill(base, nbytes, 0))
        if model.input_bytes:
            stream.copy_to_device(model.input_address, self._input, nbytes=model.input_bytes)
        stream.launch_graph(model.graph)
        stream.synchronize()
        found = {}
        for kind, nbytes in self.regions.items():
            if kind is BufferKind.OUTPUT:  # as it leaves
                stream.copy_to_host(self._host, model.output_address, nbytes=model.output_bytes)
                nbytes = model.output_bytes
            elif mover is None:
                stream.copy_to_host(self._host, self.base(model, kind), nbytes=nbytes)
            else:
                plain = self._gpu.allocate(nbytes, tenant="check")
                stream.launch(mover.gather(plain.address, self.base(model, kind), nbytes))
                stream.copy_to_host(self._host, plain.address, nbytes=nbytes)
                stream.synchronize()
                plain.free()
            stream.synchronize()
            found[kind] = self._host.array[:nbytes].copy()
        return found

    def close(self) -> None:
        self._host.free()
        self._input.free()


def transfer_speed(gpu: Gpu, timer: Timer, mover: Mover, memory: TenantMemory) -> dict[str, float]:
    """Bytes moved per second by the scatter and the gather kernel, and by the driver's copy in plain memory."""
    nbytes = min(_TRANSFER_BYTES, memory.limit - memory.in_use)
    if nbytes < 1 << 20:
        return {}
    logical, plain = memory.allocate(nbytes), gpu.allocate(nbytes, tenant="check")
    out = {}
    other = gpu.allocate(nbytes, tenant="check")
    for name, operation in (
        ("scatter", mover.scatter(plain.address, logical.address, nbytes)),
        ("gather", mover.gather(plain.address, logical.address, nbytes)),
        ("copy", Copy(other.address, plain.address, nbytes)),
    ):
        graph = gpu.create_graph([operation])
        timer.batch(graph)
        out[f"{name}_bytes_per_s"] = nbytes / statistics.median(timer.batch(graph)) * 1e9
        graph.close()
    logical.free()
    plain.free()
    other.free()
    return out


def kind_of(kernel: str) -> str:
    """Class of a kernel by the name that Inductor gave it."""
    if "_tem_" in kernel or "_mm" in kernel.split("fused")[0]:
        return "convolution" if "convolution" in kernel else "GEMM"
    return "reduction" if any(part in kernel for part in ("_red_", "_per_")) else "pointwise"


class ModelRun:
    """One model, plain and in its variants."""

    def __init__(
        self,
        gpu: Gpu,
        pool: ColoredPool,
        channel_map: ChannelMap,
        name: str,
        package: ModelPackage,
        directory: Path,
        by_class: bool,
        builder: Builder,
        table: PlacementTable,
    ) -> None:
        self._gpu, self._pool, self._map, self._by_class = gpu, pool, channel_map, by_class
        self._builder, self._table = builder, table
        self.name, self.package, self.directory = name, package, directory

    def run(self, chosen: Sequence[Variant], shares: dict[str, Share], deadline: float) -> dict[str, Any]:
        with ExitStack() as undo:
            stream = self._gpu.create_stream()
            undo.callback(stream.close)
            contents = Contents(self._gpu, stream, self.package)
            undo.callback(contents.close)
            timer = Timer(self._gpu, stream)
            started = time.perf_counter()
            plain = bind(self.package, self.directory, self._gpu, tenant=self.name)
            undo.callback(plain.close)
            row: dict[str, Any] = {
                "model": self.name,
                "batch": self.package.batch,
                "kernels": len(self.package.steps),
                "bind_seconds": time.perf_counter() - started,
                "bytes": needed_bytes(self.package),
                "variants": {},
            }
            expected = contents.run(plain, None)
            row["output_distinct_bytes"] = len(np.unique(expected[BufferKind.OUTPUT]))
            for variant in chosen:
                if time.monotonic() > deadline:
                    row["variants"][variant.name] = {"error": "out of time"}
                    continue
                try:
                    row["variants"][variant.name] = self._variant(
                        variant, shares[variant.name], plain, expected, contents, timer
                    )
                except Exception as error:
                    row["variants"][variant.name] = {"error": f"{type(error).__name__}: {error}"}
                    traceback.print_exc()
                    if getattr(error, "usable", "") == "nothing":
                        raise
            return row

    def _variant(
        self,
        variant: Variant,
        share: Share,
        plain: BoundModel,
        expected: dict[BufferKind, Any],
        contents: Contents,
        timer: Timer,
    ) -> dict[str, Any]:
        with ExitStack() as undo:
            clock = time.perf_counter
            code = self._builder.code(self.name, share.translation.shape)
            marks = [clock()]
            memory = self._pool.attach(share)
            undo.callback(memory.close)
            marks.append(clock())
            found: dict[str, Any] = {"classes": {}}
            module = self._gpu.load_module(code.transfer, name="check")
            undo.callback(module.close)
            mover = Mover(module, memory)
            same: dict[str, bool] = {}
            graphs = {"plain": plain.graph}
            if variant.mixed:
                usual = bind_colored(self.package, self.directory, self._gpu, memory, kernels=code)
                undo.callback(usual.close)
                graphs["usual"] = usual.graph
                same = {f"usual {kind}": s for kind, s in _compare(contents.run(usual, mover), expected).items()}
                code, found = self._mix(plain, usual, memory, code)
                marks[-1] = clock()
            model = bind_colored(self.package, self.directory, self._gpu, memory, kernels=code)
            undo.callback(model.close)
            marks.append(clock())
            same |= {str(kind): same for kind, same in _compare(contents.run(model, mover), expected).items()}
            row: dict[str, Any] = {
                "colors": list(share.colors),
                "shape": shape_name(share.translation.shape),
                "same_bits": all(same.values()),
                "same": same,
                "table_bytes": memory.table_bytes,
                "memory_bytes": memory.limit,
                "pages": len(share.pages),
                "seconds": dict(zip(("attach", "bind"), np.diff(marks).tolist(), strict=True)),
            }
            if not variant.timed:
                return row
            inner = self._gpu.create_graph([op for op in model.operations if not _moves(op)])
            undo.callback(inner.close)
            times = timer.by_turns(graphs | {"colored": model.graph, "kernels": inner})
            row |= {f"{name}_ns": value for name, value in times.items()}
            row["ratio"] = times["colored"] / times["plain"]
            row["ratio_kernels"] = times["kernels"] / times["plain"]
            if "usual" in times:
                row["ratio_usual"] = times["usual"] / times["plain"]
            row |= found
            if self._by_class and not variant.mixed:
                row["classes"] = self._classes(self._steps(plain), {"colored": self._steps(model)})
            return row | transfer_speed(self._gpu, timer, mover, memory)

    def _steps(self, model: BoundModel) -> Any:
        """Times of the package's steps where they stand, ns."""
        _, taken = measure_steps(model, self._gpu, repeats=2, runs=5)
        return taken[np.asarray([not _moves(operation) for operation in model.operations])]

    def _mix(
        self, plain: BoundModel, usual: BoundModel, memory: TenantMemory, code: ColoredKernels
    ) -> tuple[ColoredKernels, dict[str, Any]]:
        """For each kernel the code that is fastest where it stands; the usual one where others gain less than 2%."""
        shape, ids = memory.translation.shape, list(code.cubins)
        shadow = self._builder.code(self.name, shadow_shape(shape)).cubins
        looping = self._builder.kept(self.name, shape)
        ways = {
            "kept": ColoredKernels(shape, {**code.cubins, **looping}, code.transfer),
            "shadow": ColoredKernels(shape, shadow, code.transfer, frozenset(ids)),
        }
        times = {"usual": self._steps(usual)}
        for way, kernels in ways.items():
            model = bind_colored(self.package, self.directory, self._gpu, memory, kernels=kernels)
            times[way] = self._steps(model)
            model.close()
        owners = np.asarray([step.kernel if isinstance(step, KernelStep) else "" for step in self.package.steps])
        chosen = times["usual"].copy()
        taken: dict[str, str] = {}
        for kernel in ids:
            own = owners == kernel
            best = min(times, key=lambda way: float(times[way][own].sum()))
            if times[best][own].sum() > 0.98 * times["usual"][own].sum():
                best = "usual"
            taken[kernel] = best
            chosen[own] = times[best][own]
            text = (self.directory / "kernels" / f"{kernel}.ptx").read_text()
            self._table.note(shape.form, text, Placement.KEPT if best == "kept" else None)
            self._table.note_shadowed(shape.form, text, best == "shadow")
        cubins = {
            kernel: ways[way].cubins[kernel] if way in ways else code.cubins[kernel] for kernel, way in taken.items()
        }
        mixed = ColoredKernels(
            shape, cubins, code.transfer, frozenset(kernel for kernel, way in taken.items() if way == "shadow")
        )
        found = {
            "chosen": {way: list(taken.values()).count(way) for way in times},
            "sums_ns": {way: float(values.sum()) for way, values in times.items()},
        }
        return mixed, found | {"classes": self._classes(self._steps(plain), times | {"chosen": chosen})}

    def _classes(self, plain: Any, colored: dict[str, Any]) -> dict[str, Any]:
        """Time by class of kernel, plain and by way of coloring, ns; and the ten steps that lose most by the last way."""
        names = [step.kernel if isinstance(step, KernelStep) else "fill" for step in self.package.steps]
        kinds = np.asarray([kind_of(name) for name in names])
        ways = {"plain": plain} | colored
        last = list(colored)[-1]
        found = {}
        for kind in np.unique(kinds).tolist():
            sums = {way: float(taken[kinds == kind].sum()) for way, taken in ways.items()}
            found[kind] = sums | {"ratio": sums[last] / sums["plain"]}
        worst = np.argsort(plain - colored[last])[:10].tolist()
        return {
            "ns": found,
            "worst": [
                {"kernel": names[i]} | {f"{way}_ns": round(float(taken[i])) for way, taken in ways.items()}
                for i in worst
            ],
        }


def startup(gpu: Gpu, channel_map: ChannelMap, packages: dict[str, tuple[ModelPackage, Path]]) -> dict[str, Any]:
    """Seconds until the largest of the models runs in one half of the colors: map verified, pages classified, weights in."""
    package, directory = max(packages.values(), key=lambda entry: needed_bytes(entry[0]))
    clock = time.perf_counter
    marks = [clock()]
    verified = map_for(gpu, known=channel_map)
    marks.append(clock())
    halves = find_halves(verified)
    assert halves is not None
    coloring = Coloring(verified, {"tenant": halves.sets[0]})
    with ColoredTenants(gpu, coloring, [Demand("tenant", halves.sets[0], needed_bytes(package))]) as tenants:
        marks.append(clock())
        memory = tenants.memories["tenant"]
        code = colored_kernels(package, directory, memory.translation.shape)
        marks.append(clock())
        bind_colored(package, directory, gpu, memory, kernels=code).close()
        marks.append(clock())
        names = ("map", "memory", "code", "bind")
        return {
            "model": package.name,
            "bytes": needed_bytes(package),
            "weight_bytes": package.weight_bytes,
            "pages": tenants.pages,
            "form": str(memory.translation.shape.form),
            "table_bytes": memory.table_bytes,
            "same_chip": verified.uuid == channel_map.uuid,
            "seconds": dict(zip(names, np.diff(marks).tolist(), strict=True)),
        }


def _compare(got: dict[BufferKind, Any], expected: dict[BufferKind, Any]) -> dict[BufferKind, bool]:
    return {kind: bool(np.array_equal(got[kind], expected[kind])) for kind in expected}


def _moves(operation: Any) -> bool:
    return isinstance(operation, Launch) and operation.kernel.name.startswith("missile_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--map", type=Path, required=True)
    parser.add_argument("--models", default="")
    parser.add_argument("--variants", default="")
    parser.add_argument("--check", default="", help="variants whose outputs are compared and that are not timed")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--no-classes", dest="classes", action="store_false", help="leave the times of kernels out")
    parser.add_argument("--startup", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()
    channel_map = read_map(arguments.map)
    known = variants()
    checked = [replace(known[name], timed=False) for name in arguments.check.split(",") if name]
    chosen = [known[name] for name in arguments.variants.split(",") if name]
    chosen = [*chosen, *checked] or list(known.values())
    names = [name for name in arguments.models.split(",") if name] or sorted(
        path.name for path in arguments.packages.iterdir() if (path / "package.json").is_file()
    )
    packages = {name: (read_package(arguments.packages / name), arguments.packages / name) for name in names}
    rng = np.random.default_rng(11)
    table = PlacementTable.load(channel_map.gpu)
    result: dict[str, Any] = {"stand_in_weights": True, "map": channel_map.gpu, "rows": []}
    with Builder(packages) as builder:
        shares = {}
        for name, (package, _) in packages.items():
            begin = time.perf_counter()
            shares[name] = plan(package, chosen, channel_map, rng)
            result.setdefault("plan_seconds", {})[name] = time.perf_counter() - begin
            for variant in chosen:
                shape = shares[name][variant.name].translation.shape
                builder.ask(name, shape)
                if variant.mixed:
                    builder.ask(name, shadow_shape(shape))
                    builder.ask_kept(name, shape)
        most = max(max(share.pages) for found in shares.values() for share in found.values()) + 1
        print(f"planned after {time.monotonic() - started:.1f} s", flush=True)
        with open_gpu(arguments.device) as gpu:
            result |= {"gpu": gpu.info.name, "driver": gpu.info.driver}
            if arguments.startup:
                try:
                    result["startup"] = startup(gpu, channel_map, packages)
                except Exception as error:
                    result["startup"] = {"error": f"{type(error).__name__}: {error}"}
                    traceback.print_exc()
                print(result["startup"], flush=True)
            begin = time.perf_counter()
            with ColoredPool(gpu, most) as pool:
                result["pool"] = {"pages": pool.page_count, "seconds": time.perf_counter() - begin}
                for name, (package, directory) in packages.items():
                    row = {"model": name, "error": "out of time"}
                    if time.monotonic() < started + arguments.seconds:
                        try:
                            run = ModelRun(
                                gpu, pool, channel_map, name, package, directory, arguments.classes, builder, table
                            )
                            row = run.run(chosen, shares[name], started + arguments.seconds)
                        except Exception as error:
                            row = {"model": name, "error": f"{type(error).__name__}: {error}"}
                            traceback.print_exc()
                    result["rows"].append(row)
                    result |= {"seconds": time.monotonic() - started, "build_seconds": dict(builder.seconds)}
                    arguments.output.mkdir(parents=True, exist_ok=True)
                    table.save(arguments.output)
                    print(f"{time.monotonic() - started:5.1f} s", _line(row), flush=True)
                    report(result, [variant.name for variant in chosen], arguments.output)
                    if "context is lost" in row.get("error", ""):
                        break
            for name, found in result["mean"].items():
                print(f"{name:24s}", json.dumps(found), flush=True)


def plan(
    package: ModelPackage, chosen: Sequence[Variant], channel_map: ChannelMap, rng: np.random.Generator
) -> dict[str, Share]:
    """A share for each variant, in the first pages of the pool."""
    shares = {}
    for variant in chosen:
        nbytes = needed_bytes(package) * (2 if variant.mixed else 1) + _TRANSFER_BYTES
        shares[variant.name] = variant.share(channel_map, pages_for(nbytes, channel_map), nbytes, rng)
    return shares


def pages_for(nbytes: int, channel_map: ChannelMap) -> int:
    """Enough of them, with half of the colors; some colors have fewer slices."""
    return math.ceil(nbytes / 0.45 / channel_map.page_bytes) + 8


def _line(row: dict[str, Any]) -> str:
    cells = [
        f"{name} {v['ratio']:.3f} ({v['ratio_kernels']:.3f}){'' if v['same_bits'] else ' WRONG'}"
        if "ratio" in v
        else f"{name} {'same' if v.get('same_bits') else v.get('error', 'WRONG')}"
        for name, v in row.get("variants", {}).items()
    ]
    return f"{row['model']:20s} {row.get('error', '')}" + "; ".join(cells)


def table(result: dict[str, Any], names: Sequence[str]) -> str:
    """The result in Markdown: ratios by model, and by class of kernel."""
    lines = [f"| model | batch | plain, us | {' | '.join(names)} |", "| --- | ---: | ---: |" + " ---: |" * len(names)]
    for row in result["rows"]:
        found = row.get("variants", {})
        plain = next((v["plain_ns"] for v in found.values() if "plain_ns" in v), math.nan)
        cells = [_cell(found.get(name, {})) for name in names]
        lines.append(f"| {row['model']} | {row.get('batch', '')} | {plain / 1e3:.0f} | {' | '.join(cells)} |")
    means = [f"{result['mean'][name]['ratio']:.3f}" for name in names]
    lines += [f"| geometric mean | | | {' | '.join(means)} |", ""]
    kinds = sorted({kind for name in names for kind in result["mean"][name]["classes"]})
    if kinds:
        lines += [f"| class of kernel | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
        for kind in kinds:
            values = [result["mean"][name]["classes"].get(kind, math.nan) for name in names]
            lines.append(f"| {kind} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any]) -> str:
    if "ratio" not in found:
        return "-"
    return f"{found['ratio']:.3f}" + ("" if found["same_bits"] else " WRONG")


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def report(result: dict[str, Any], names: Sequence[str], output: Path) -> None:
    """Geometric means over the models, as a whole and by class of kernel; written to `output` with the rest."""
    result["mean"] = {}
    for name in names:
        rows = [row["variants"][name] for row in result["rows"] if "ratio" in row.get("variants", {}).get(name, {})]
        classes = sorted({kind for row in rows for kind in row["classes"].get("ns", {})})
        by_class = {
            kind: _mean([r["classes"]["ns"][kind]["ratio"] for r in rows if kind in r["classes"].get("ns", {})])
            for kind in classes
        }
        same = [bool(row.get("variants", {}).get(name, {}).get("same_bits")) for row in result["rows"]]
        result["mean"][name] = {"models": len(same), "same_bits": sum(same)}
        if rows:
            result["mean"][name] |= {
                "timed": len(rows),
                "ratio": _mean([row["ratio"] for row in rows]),
                "ratio_kernels": _mean([row["ratio_kernels"] for row in rows]),
                "ratio_usual": _mean([row.get("ratio_usual", row["ratio"]) for row in rows]),
                "worst": max(row["ratio"] for row in rows),
                "classes": by_class,
            }
    (output / "models.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "models.md").write_text(table(result, [name for name in names if "ratio" in result["mean"][name]]))


if __name__ == "__main__":
    main()
