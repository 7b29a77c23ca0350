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
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from colored_models_code import Builder, Variant, plan, variants
from colored_models_measure import Contents, Timer, startup, transfer_speed
from colored_models_report import line, report

from missile.coloring.pool import ColoredPool, TenantMemory
from missile.coloring.shares import Share
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.carrying import carried_by
from missile.compiler.colored import (
    ColoredKernels,
    shadow_shape,
    shape_name,
)
from missile.compiler.mover import Mover
from missile.compiler.package import BufferKind, KernelStep, ModelPackage, read_package
from missile.compiler.placements import PlacementTable
from missile.compiler.planning import needed_bytes
from missile.compiler.profile import measure_steps
from missile.compiler.ptx.rewrite import Placement
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Launch
from missile.probe.channel_map import ChannelMap
from missile.probe.map_file import read_map

USUAL_WAY = "carried"
STEPS = ("step", "step-kept")  # ways that take the larger table of `shadow_shape`
PLACED = {
    "early": Placement.EARLY,
    "kept": Placement.KEPT,
    "windows": Placement.WINDOWS,
    "carried": Placement.CARRIED,
}  # ways with the table of the form itself


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
            row |= self._rolled(plain)
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

    def _rolled(self, plain: BoundModel) -> dict[str, Any]:
        """Times of the plain kernels and of the same without unrolled loops, where that is asked for."""
        with tempfile.TemporaryDirectory() as folder:
            if not self._builder.rolled(self.name, Path(folder)):
                return {}
            model = bind(self.package, Path(folder), self._gpu, tenant=self.name)
            try:
                return {"rolled": self._classes(self._steps(plain), {"rolled": self._steps(model)})}
            finally:
                model.close()

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
                early = bind_colored(self.package, self.directory, self._gpu, memory, kernels=code)
                undo.callback(early.close)
                graphs["early"] = early.graph
                same = {f"early {kind}": s for kind, s in _compare(contents.run(early, mover), expected).items()}
                code, found = self._mix(plain, early, memory, code, contents)
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
            if "early" in times:
                row["ratio_early"] = times["early"] / times["plain"]
            row |= found
            if self._by_class and not variant.mixed:
                row["classes"] = self._classes(self._steps(plain), {"colored": self._steps(model)})
            return row | transfer_speed(self._gpu, timer, mover, memory)

    def _steps(self, model: BoundModel) -> Any:
        """Times of the package's steps where they stand, ns.

        The median of three: the mean of two, one of which the host was late for, makes all other kernels look fast.
        """
        _, taken = measure_steps(model, self._gpu, repeats=3, runs=5)
        return taken[np.asarray([not _moves(operation) for operation in model.operations])]

    def _mix(
        self, plain: BoundModel, early: BoundModel, memory: TenantMemory, code: ColoredKernels, contents: Contents
    ) -> tuple[ColoredKernels, dict[str, Any]]:
        """For each kernel the code that is fastest where it stands; the usual one where others gain less than 2%."""
        shape, ids = memory.translation.shape, list(code.cubins)
        steps = self._builder.code(self.name, shadow_shape(shape)).cubins
        looping = self._builder.placed(self.name, shape, Placement.KEPT)
        windows = self._builder.placed(self.name, shape, Placement.WINDOWS)
        carried = self._builder.placed(self.name, shape, Placement.CARRIED)
        carries = frozenset(carried) & carried_by(self.package, shape).keys()
        looping_steps = self._builder.placed(self.name, shadow_shape(shape), Placement.KEPT)
        ways = {
            "windows": ColoredKernels(shape, {**code.cubins, **windows}, code.transfer),
            "carried": ColoredKernels(shape, {**code.cubins, **carried}, code.transfer, carried=carries),
            "kept": ColoredKernels(shape, {**code.cubins, **looping}, code.transfer),
            "step": ColoredKernels(shape, steps, code.transfer, frozenset(ids)),
            "step-kept": ColoredKernels(shape, {**steps, **looping_steps}, code.transfer, frozenset(ids)),
        }
        times = {"early": self._steps(early)}
        for way, kernels in ways.items():
            model = bind_colored(self.package, self.directory, self._gpu, memory, kernels=kernels)
            contents.feed(model)
            times[way] = self._steps(model)
            model.close()
        owners = np.asarray([step.kernel if isinstance(step, KernelStep) else "" for step in self.package.steps])
        chosen = times[USUAL_WAY].copy()
        taken: dict[str, str] = {}
        for kernel in ids:
            own = owners == kernel
            best = min(times, key=lambda way: float(times[way][own].sum()))
            if times[best][own].sum() > 0.98 * times[USUAL_WAY][own].sum():
                best = USUAL_WAY
            taken[kernel] = best
            chosen[own] = times[best][own]
            text = (self.directory / "kernels" / f"{kernel}.ptx").read_text()
            self._table.note(shape.form, text, PLACED.get(best))
            self._table.note_shadowed(shape.form, text, best in STEPS)
            other = shadow_shape(shape).form
            self._table.note(other, text, Placement.KEPT if best == "step-kept" else None)
        cubins = {
            kernel: ways[way].cubins[kernel] if way in ways else code.cubins[kernel] for kernel, way in taken.items()
        }
        steps_for = frozenset(kernel for kernel, way in taken.items() if way in STEPS)
        carried_for = frozenset(kernel for kernel, way in taken.items() if way == "carried") & carries
        mixed = ColoredKernels(shape, cubins, code.transfer, steps_for, carried=carried_for)
        base = self._steps(plain)
        found = {
            # By kernel, all its launches: plain, then each way in the order of `times`.
            "kernels_ways_ns": {
                kernel: [round(float(t[owners == kernel].sum())) for t in (base, *times.values())] for kernel in ids
            },
            "chosen": {way: list(taken.values()).count(way) for way in times},
            "sums_ns": {way: float(values.sum()) for way, values in times.items()},
        }
        return mixed, found | {"classes": self._classes(base, times | {"chosen": chosen})}

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
    parser.add_argument("--rolled", action="store_true", help="also time plain kernels whose loops are not unrolled")
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
    if arguments.startup:  # before all cores are busy
        try:
            with open_gpu(arguments.device) as gpu:
                result["startup"] = startup(gpu, channel_map, packages)
        except Exception as error:
            result["startup"] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        print(result["startup"], flush=True)
    with Builder(packages) as builder:
        shares = {}
        for name, (package, _) in packages.items():
            begin = time.perf_counter()
            shares[name] = plan(package, chosen, channel_map, rng)
            result.setdefault("plan_seconds", {})[name] = time.perf_counter() - begin
            if arguments.rolled:
                builder.ask_rolled(name)
            for variant in chosen:
                shape = shares[name][variant.name].translation.shape
                builder.ask(name, shape)
                if variant.mixed:
                    builder.ask(name, shadow_shape(shape))
                    builder.ask_placed(name, shape, Placement.WINDOWS)
                    builder.ask_placed(name, shape, Placement.CARRIED)
                    builder.ask_placed(name, shape, Placement.KEPT)
                    builder.ask_placed(name, shadow_shape(shape), Placement.KEPT)
        most = max(max(share.pages) for found in shares.values() for share in found.values()) + 1
        print(f"planned after {time.monotonic() - started:.1f} s", flush=True)
        with open_gpu(arguments.device) as gpu:
            result |= {"gpu": gpu.info.name, "driver": gpu.info.driver}
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
                    print(f"{time.monotonic() - started:5.1f} s", line(row), flush=True)
                    report(result, [variant.name for variant in chosen], arguments.output)
                    if "context is lost" in row.get("error", ""):
                        break
            for name, found in result["mean"].items():
                print(f"{name:24s}", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
