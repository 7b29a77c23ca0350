"""Launches that overlap against launches one after another: the same bits, how long, alone and beside neighbours.

    PYTHONPATH=src python3 benchmarks/gpu/overlap.py -o OUT --packages DIR [--map MAP.json] [--seconds 165]

DIR has a package directory for each model, `MODEL-bdefault` or `MODEL`. What is measured, in this order, as far as the time
allows: LS models alone on the GPU (`alone`); on 32, 64 and 96 SMs, alone and beside BE models on the others, and with them
a chain of kernels that touch no memory (`beside`); in colored memory (`colored`); BE models alone (`best_effort`); the chain
beside neighbours in colors of their own (`leftover`). OUT gets `overlap.json`, written anew after each model.

Variants: `plain`, the package's code; `start`, `late`, `never`: it overlaps, and lets the next launch start there
(`ptx.overlap.Dependents`); `full`: the code of `start`, launched one after another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from colored_models_code import Variant, pages_for
from colored_models_measure import Contents
from leftover import straight
from overlap_measure import Beside, Bits, Neighbour, Turns, programmatic_edges, summary
from overlap_options import LS, Makers, Record, find_packages, read_options

from missile.coloring.halves import find_halves
from missile.coloring.pool import ColoredPool
from missile.coloring.shape import Form
from missile.coloring.shares import Demand
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.colored import color_kernels
from missile.compiler.mover import Mover
from missile.compiler.overlapped import build_overlapped
from missile.compiler.package import BufferKind, ModelPackage
from missile.compiler.planning import needed_bytes
from missile.compiler.ptx.overlap import Dependents, Overlap, make_overlapping
from missile.compiler.synthetic import bind_synthetic
from missile.errors import UnsupportedError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Graph, Launch, Stream
from missile.gpu.work import KernelWork
from missile.probe import map_for
from missile.probe.map_file import read_map
from missile.runtime.coloring import ColoredTenants, Coloring
from missile.runtime.loading import load_tenants
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import ClosedLoop

BE = ("densenet161", "bert_large", "decoder_1b", "resnet152")
NEIGHBOURS = ("synthetic-gemv", "synthetic-copy", "densenet161", "bert_large", "decoder_1b")
COLORED = ("resnet34", "mobilenet_v3_large", "mobilebert", "efficientnet_b0")
SMS = (32, 64, 96)
VARIANTS = {place.value: Overlap(place) for place in Dependents}
COLORED_VARIANTS = {"colored": None, "start": Overlap(), "start-lookups-last": Overlap(lookups_first=False)}
RACES = 40  # runs of each model whose outputs are compared
CHAINS = ((8, "8 kernels of 8 KiB"), (100, "100 kernels of 8 KiB"))


@dataclass
class Bound:
    """A model in its variants. models: to compare; graphs: to time."""

    models: dict[str, BoundModel] = field(default_factory=dict)
    graphs: dict[str, Graph] = field(default_factory=dict)
    output: bytes = b""


class Code(Makers):
    """Code that overlaps, made by other processes in the order asked for, while the GPU measures what is there."""

    def __init__(self, packages: Mapping[str, tuple[ModelPackage, Path]], real: bool) -> None:
        super().__init__(spare=2, threads=3)
        self._packages, self._real = packages, real
        self._asked: dict[tuple[str, str, bool], Future[Any]] = {}

    def ask(self, model: str, what: str, shape: Any = None) -> None:
        if self._real and model in self._packages:
            self._asked[model, what, shape is not None] = self.threads.submit(self._make, model, what, shape)

    def get(self, model: str, what: str, *, colored: bool = False) -> Any:
        """Colored kernels, or None when plain code lies in the package by now. Raises what the making raised."""
        return self._asked[model, what, colored].result() if self._real else None

    def _make(self, model: str, what: str, shape: Any) -> Any:
        package, directory = self._packages[model]
        begin = time.monotonic()
        if shape is None:
            build_overlapped(package, directory, VARIANTS[what], executor=self.workers)
            made = None
        else:
            how = COLORED_VARIANTS[what]
            made = color_kernels(package, directory, shape, overlap=how, executor=self.workers, keep=False)
        self.seconds[f"{model} {what}{' colored' if shape else ''}"] = round(time.monotonic() - begin, 2)
        return made


class Benchmark(Record):
    def __init__(self, gpu: Gpu, options: argparse.Namespace, packages: dict[str, tuple[ModelPackage, Path]]) -> None:
        self.code = Code(packages, not gpu.info.simulated)
        super().__init__(gpu, options, "overlap.json", self.code)
        self.gpu, self.packages, self.rounds = gpu, packages, options.rounds
        self.map = read_map(options.map) if options.map else None
        self.bound: dict[str, Bound] = {}
        self.shares: dict[str, Any] = {}
        self.owned = ExitStack()
        self.stream = gpu.create_stream()
        self.owned.callback(self.stream.close)
        self.turns = Turns(gpu)
        self.owned.callback(self.turns.close)
        self.bits = Bits(gpu, self.stream)
        self.owned.callback(self.bits.close)

    def close(self) -> None:
        self.code.close()
        self.owned.close()

    # --- code that is made while others are measured
    def ask(self) -> None:
        for what in ("start", "late", "never"):
            for model in LS:
                self.code.ask(model, what)
        for model in COLORED:
            with self.attempt(f"plan the colored memory of {model}"):
                if self.map is not None and model in self.packages:
                    nbytes = needed_bytes(self.packages[model][0]) * 4
                    variant = Variant("pair-half", Form.PAIR)
                    rng = np.random.default_rng(5)
                    share = variant.share(self.map, pages_for(nbytes, self.map), nbytes, rng)
                    self.shares[model] = share
                    for what in COLORED_VARIANTS:
                        self.code.ask(model, what, share.translation.shape)
        for what in ("start", "late"):
            for model in BE:
                self.code.ask(model, what)

    # --- phases
    def smoke(self) -> None:
        """A chain of kernels as a dependent graph, on the GPU and on a part of it: does the driver take it at all?"""
        found = self.result.setdefault("smoke", {})
        for where in ("gpu", "partition"):
            with self.attempt(f"smoke: dependent launches on the {where}"), ExitStack() as undo:
                partition = None
                if where == "partition":
                    partition = self.gpu.split_sms([32]).parts[0]
                stream = self.gpu.create_stream(partition=partition)
                undo.callback(stream.close)
                launches = self._chain(undo, 100)
                graphs = {name: self._graph(launches[name], undo) for name in launches}
                taken = self.turns.measure(stream, graphs, 5)
                found[where] = {name: summary(samples) for name, samples in taken.items()}
                found[where]["edges"] = programmatic_edges(self.gpu, launches["start"], partition)
                print("smoke", where, {n: round(s["median_ns"] / 1e3, 1) for n, s in found[where].items() if n != "edges"},
                      found[where]["edges"], flush=True)  # fmt: skip
            self.save()

    def _chain(self, undo: ExitStack, count: int, blocks: int = 32) -> dict[str, list[Launch]]:
        major, minor = self.gpu.info.compute_capability
        text = f".version 8.0\n.target sm_{major}{minor}\n.address_size 64\n" + straight(512)
        params = ((0).to_bytes(8, "little"), (1).to_bytes(4, "little"))
        work = KernelWork(blocks=blocks, solo_ns=2000.0)
        found = {}
        for name in ("plain", "start", "late", "never"):
            code = text if name == "plain" else make_overlapping(text, VARIANTS[name])
            module = self.gpu.load_module(code.encode(), name="chain")
            undo.callback(module.close)
            kernel = module.kernel("straight_512")
            launch = Launch(kernel, (blocks, 1, 1), (128, 1, 1), 0, params, work, overlaps=name != "plain")
            found[name] = [launch] * count
        return found

    def _graph(self, launches: Sequence[Any], undo: ExitStack) -> Graph:
        graph = self.gpu.create_graph(launches)
        undo.callback(graph.close)
        return graph

    def bind(self, model: str, variants: Sequence[str], undo: ExitStack) -> Bound:
        package, directory = self.packages[model]
        plain = bind(package, directory, self.gpu, tenant=model)
        undo.callback(plain.close)
        bound = Bound({"plain": plain}, {"plain": plain.graph})
        for name in variants:
            with self.attempt(f"{model}: bind {name}"):
                self.code.get(model, name)
                weights = plain.weights_address or None
                made = bind(package, directory, self.gpu, tenant=model, weights_at=weights, overlap=VARIANTS[name])
                undo.callback(made.close)
                bound.models[name], bound.graphs[name] = made, made.graph
        if "start" in bound.models:
            operations = [replace(op, overlaps=False) if isinstance(op, Launch) else op
                          for op in bound.models["start"].operations]  # fmt: skip
            bound.graphs["full"] = self._graph(operations, undo)
        return bound

    def check(self, bound: Bound) -> dict[str, Any]:
        """Whole contents of one run, and outputs of many."""
        found: dict[str, Any] = {}
        plain = bound.models["plain"]
        self.bits.run(plain, plain.graph, 0x5A)
        for name, made in list(bound.models.items())[1:]:
            self.bits.run(made, made.graph, 0x5A)
            found[name] = {"same_bits": self.bits.whole(plain, made)}
        bound.output = self.bits.output(plain)
        if not any(b.kind == "state" and b.nbytes for b in plain.package.buffers):
            for name in list(bound.models)[1:]:
                found[name]["races"] = RACES - self.same(bound, name, self.stream, RACES)
                found[name]["runs"] = RACES
        found["output_distinct_bytes"] = len(set(bound.output[: 1 << 16]))
        return found

    def same(self, bound: Bound, name: str, stream: Stream, runs: int, neighbour: Neighbour | None = None) -> int:
        """How many of `runs` runs give the output that the plain model gave."""
        made, good = bound.models[name], 0
        for run in range(runs):
            if neighbour is not None:
                neighbour.keep()
            self.bits.run(made, made.graph, (0xFF, 0x3C)[run % 2], stream)
            good += self.bits.output(made) == bound.output
        return good

    def models(self, key: str, names: Sequence[str], variants: Sequence[str], keep: bool, until: float) -> None:
        rows = self.result.setdefault(key, {})
        for model in names:
            if model not in self.packages or self.left < until:
                continue
            own = ExitStack()
            with self.attempt(f"{key}: {model}"):
                bound = self.bind(model, variants, own)
                row: dict[str, Any] = {"launches": len(self.packages[model][0].steps)}
                for made in bound.models.values():
                    self.bits.feed(made)
                if not keep:  # with state, which is as it was loaded for the first run only
                    row["check"] = self.check(bound)
                taken = self.turns.measure(self.stream, bound.graphs, self.rounds if keep else 5)
                row["times"] = {name: summary(samples) for name, samples in taken.items()}
                if "start" in bound.models:
                    row["edges"] = programmatic_edges(self.gpu, bound.models["start"].operations, None)  # type: ignore[arg-type]
                rows[model] = row
                if keep:
                    self.save()  # should a race end all
                    row["check"] = self.check(bound)
                plain = row["times"]["plain"]["median_ns"]
                ratios = {n: round(t["median_ns"] / plain, 3) for n, t in row["times"].items()}
                good = {n: (c["same_bits"], c.get("races")) for n, c in row["check"].items() if isinstance(c, dict)}
                print(f"{key} {model:20} {plain / 1e3:8.1f} us", ratios, good, row.get("edges"), flush=True)
                if keep:
                    self.bound[model] = bound
                    self.owned.push(own.pop_all())
            with self.attempt(f"{key}: give {model} back"):
                own.close()
            self.save()

    def beside(self, until: float) -> None:
        """LS models and chains on a part of the SMs."""
        rows = self.result.setdefault("beside", {})
        with ExitStack() as undo:
            neighbours: dict[str, Graph | None] = {"nothing": None}
            for name in NEIGHBOURS:
                with self.attempt(f"load {name}"):
                    if name in self.packages:
                        made = bind(*self.packages[name], self.gpu, tenant=name)
                        self.bits.feed(made)
                    elif name.startswith("synthetic"):
                        made = bind_synthetic(name, self.gpu, tenant=name)
                    else:
                        continue
                    undo.callback(made.close)
                    neighbours[name] = made.graph
            beside = Beside(self.gpu)
            undo.callback(beside.close)
            chains = {name: self._chain(undo, count) for count, name in CHAINS}
            victims = {model: dict(bound.graphs) for model, bound in self.bound.items()}
            for name, launches in chains.items():
                victims[name] = {variant: self._graph(launches[variant], undo) for variant in launches}
            for sms in SMS:
                if self.left < until:
                    return
                with self.attempt(f"beside: {sms} SMs"), ExitStack() as part:
                    split = self.gpu.split_sms([sms])
                    ours = self.gpu.create_stream(partition=split.parts[0])
                    part.callback(ours.close)
                    theirs = self.gpu.create_stream(partition=split.remainder)
                    part.callback(theirs.close)
                    variants = ("plain", "start", "late", "full") if sms == SMS[0] else ("plain", "start")
                    rows[str(sms)] = self._one_split(ours, theirs, neighbours, victims, variants, beside, until)
                self.save()

    def _one_split(
        self,
        ours: Stream,
        theirs: Stream,
        neighbours: Mapping[str, Graph | None],
        victims: Mapping[str, Mapping[str, Graph]],
        variants: Sequence[str],
        beside: Beside,
        until: float,
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, graph in neighbours.items():
            if self.left < until:
                break
            with self.attempt(f"beside {name}"):
                neighbour = None if graph is None else Neighbour(self.gpu, theirs, graph)
                row: dict[str, Any] = {"neighbour_alone_ns": neighbour.alone_ns if neighbour else None, "victims": {}}
                found[name] = row
                for victim, graphs in victims.items():
                    chosen = {variant: graphs[variant] for variant in variants if variant in graphs}
                    row["victims"][victim] = beside.measure(ours, chosen, neighbour, 0.07 * len(chosen))
                runs = RACES // 4
                row["races"] = {
                    model: runs - self.same(bound, "start", ours, runs, neighbour)
                    for model, bound in self.bound.items()
                    if "start" in bound.models
                }
                row["runs"] = runs
                if neighbour is not None:
                    neighbour.stop()
                self._print_split(ours.partition.sms if ours.partition else 0, name, row, found["nothing"])
            self.save()
        return found

    def _print_split(self, sms: int, name: str, row: dict[str, Any], alone: dict[str, Any]) -> None:
        for victim, times in row["victims"].items():
            base = alone["victims"].get(victim)
            if base is None:
                continue
            cells = "  ".join(
                f"{v} {t['median_ns'] / 1e3:7.1f} us x{t['median_ns'] / base[v]['median_ns']:.2f}"
                for v, t in times.items()
            )
            print(f"{sms:3} SMs beside {name:15} {victim:20} {cells}", flush=True)

    def colored(self, until: float) -> None:
        rows = self.result.setdefault("colored", {})
        if self.map is None:
            return
        most = max((max(share.pages) for share in self.shares.values()), default=0) + 1
        with self.attempt("colored"), ColoredPool(self.gpu, most) as pool:
            for model, share in self.shares.items():
                if model not in self.bound or self.left < until:
                    continue
                with self.attempt(f"colored: {model}"), ExitStack() as undo:
                    rows[model] = self._colored(model, share, pool, undo)
                    times = rows[model]["times"]
                    ratios = {n: round(t["median_ns"] / times["plain"]["median_ns"], 3) for n, t in times.items()}
                    print(f"colored {model:20}", ratios, rows[model]["same_bits"], flush=True)
                self.save()

    def _colored(self, model: str, share: Any, pool: ColoredPool, undo: ExitStack) -> dict[str, Any]:
        package, directory = self.packages[model]
        contents = Contents(self.gpu, self.stream, package)
        undo.callback(contents.close)
        memory = pool.attach(share)
        undo.callback(memory.close)
        fresh = bind(package, directory, self.gpu, tenant=model)
        undo.callback(fresh.close)
        expected = contents.run(fresh, None)
        graphs = {
            name: self.bound[model].graphs[name] for name in ("plain", "start") if name in self.bound[model].graphs
        }
        same: dict[str, Any] = {}
        for name, how in COLORED_VARIANTS.items():
            label = name if name == "colored" else f"colored-{name}"
            with self.attempt(f"colored: {model} {name}"):
                code = self.code.get(model, name, colored=True)
                made = bind_colored(package, directory, self.gpu, memory, kernels=code, overlap=how)
                undo.callback(made.close)
                if code is not None:
                    module = self.gpu.load_module(code.transfer, name="check")
                    undo.callback(module.close)
                    mover = Mover(module, memory)
                    found = contents.run(made, mover)
                    same[label] = all(np.array_equal(found[kind], expected[kind]) for kind in expected)
                    output = self.bits.output(made)
                    wrong = 0
                    scratch = contents.base(made, BufferKind.SCRATCH), contents.regions[BufferKind.SCRATCH]
                    for _ in range(RACES // 2):
                        self.stream.launch(mover.fill(*scratch, 0xFF))
                        self.stream.launch_graph(made.graph)
                        wrong += self.bits.output(made) != output
                    same[f"{label} runs that differ"] = wrong
                graphs[label] = made.graph
        taken = self.turns.measure(self.stream, graphs, self.rounds)
        return {"same_bits": same, "times": {name: summary(samples) for name, samples in taken.items()}}

    def leftover(self) -> None:
        """Chains in plain and models in colored memory of one half of the colors, beside neighbours in the other half."""
        rows = self.result.setdefault("leftover", {})
        if self.map is None:
            return
        with self.attempt("leftover"), ExitStack() as undo:
            channel_map = map_for(self.gpu, known=self.map, pages=512)
            halves = find_halves(channel_map)
            if halves is None:
                raise UnsupportedError("The map has no halves.")
            beside = Beside(self.gpu)
            undo.callback(beside.close)
            victims: dict[str, dict[str, Graph]] = {}
            for count, name in CHAINS:
                victims[name] = {v: self._graph(launches, undo) for v, launches in self._chain(undo, count).items()}
            for model in COLORED[:3]:
                with self.attempt(f"leftover: {model} in colors"):
                    if model in self.bound:
                        victims[f"{model} colored"] = self._in_colors(model, channel_map, halves.sets[0], undo)
                        victims[f"{model} plain"] = {v: self.bound[model].graphs[v] for v in ("plain", "start")}
            others = self._others(channel_map, halves.sets[1], undo)
            split = self.gpu.split_sms([32])
            with ExitStack() as part:
                ours = self.gpu.create_stream(partition=split.parts[0])
                part.callback(ours.close)
                theirs = self.gpu.create_stream(partition=split.remainder)
                part.callback(theirs.close)
                for name, graph in others.items():
                    neighbour = None if graph is None else Neighbour(self.gpu, theirs, graph)
                    rows[name] = {
                        victim: beside.measure(ours, graphs, neighbour, 0.07 * len(graphs))
                        for victim, graphs in victims.items()
                    }
                    if neighbour is not None:
                        neighbour.stop()
                    self._print_split(32, name, {"victims": rows[name]}, {"victims": rows["nothing"]})
                    self.save()

    def _in_colors(self, model: str, channel_map: Any, colors: tuple[int, ...], undo: ExitStack) -> dict[str, Graph]:
        """The model in both codes, in memory that has these colors indeed."""
        package, directory = self.packages[model]
        demand = Demand(model, colors, 3 * needed_bytes(package))
        tenants = undo.enter_context(ColoredTenants(self.gpu, Coloring(channel_map, {model: colors}), [demand]))
        memory = tenants.memories[model]
        shape = memory.translation.shape
        graphs = {}
        for name in ("colored", "start"):
            how = COLORED_VARIANTS[name]
            code = self.code.get(model, name, colored=True)
            if code is not None and code.shape != shape:
                code = color_kernels(package, directory, shape, overlap=how, keep=False)
            made = bind_colored(package, directory, self.gpu, memory, kernels=code, overlap=how)
            undo.callback(made.close)
            self.bits.feed(made)
            graphs["plain" if name == "colored" else name] = made.graph
        return graphs

    def _others(self, channel_map: Any, colors: tuple[int, ...], undo: ExitStack) -> dict[str, Graph | None]:
        found: dict[str, Graph | None] = {"nothing": None}
        for model in ("synthetic-gemv", "synthetic-copy"):
            for colored in (False, True):
                name = f"{model}-{'colored' if colored else 'plain'}"
                with self.attempt(f"leftover: load {name}"):
                    tenant = Tenant.model_validate(
                        {"name": name, "class": "BE", "model": model, "arrivals": ClosedLoop(depth=1)}
                    )
                    coloring = Coloring(channel_map, {name: colors}) if colored else None
                    loaded = undo.enter_context(load_tenants(self.gpu, [tenant], coloring=coloring)).tenants[0].model
                    found[name] = None if loaded is None else loaded.graph
        return {name: graph for name, graph in found.items() if graph is not None or name == "nothing"}


def main() -> None:
    options = read_options(__doc__, 165.0, 20, "of ten runs of each variant")
    packages = find_packages(options, (*LS, *BE))
    with open_gpu(options.device) as gpu:
        benchmark = Benchmark(gpu, options, packages)
        phases: list[Callable[[], None]] = [
            benchmark.ask,
            benchmark.smoke,
            lambda: benchmark.models("alone", LS, ("start", "late", "never"), keep=True, until=60),
            lambda: benchmark.beside(until=45),
            lambda: benchmark.colored(until=28),
            lambda: benchmark.models("best_effort", BE, ("start", "late"), keep=False, until=14),
            benchmark.leftover,
        ]
        try:
            for phase in phases:
                phase()
                benchmark.save()
        finally:
            benchmark.save()
            benchmark.close()
    for failure in benchmark.result["failures"]:
        print("failed:", failure["what"], "|", failure["error"][:200], flush=True)


if __name__ == "__main__":
    main()
