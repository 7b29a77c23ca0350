"""Find where each kernel of the LS models should let the next launch start, and what a model gains by it.

    PYTHONPATH=src python3 benchmarks/gpu/overlap_tune.py -o OUT --packages DIR [--map MAP.json] [--seconds 140]

DIR has a package directory for each model, `MODEL-bdefault` or `MODEL`. In this order, as far as the time allows:

- `tuned`: each LS model in plain memory, then some in one half of the colors: places found alone on the GPU (`descend`), and
  on 32 SMs beside two BE models (`by_gain` and `sweep`); outputs compared;
- `beside`: times alone and beside five neighbours on 32 and 64 SMs, in plain memory and in two halves of the colors;
- `races`: outputs of 300 runs of each model beside a BE model.

OUT gets `overlap2.json`, written anew after each step, and the table for `src/missile/compiler/autotune/overlap/`.

Code: `plain` or `colored`, launched one after another; `late`: all kernels let the next start before their first store;
`alone`, `beside`: as was found for that. The programs that make it run while the GPU measures what is there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from overlap_candidates import Candidates, all_late, places_of, ptx_of
from overlap_measure import Beside, Bits, Neighbour, Turns, summary
from overlap_options import LS, Makers, Record, find_packages, read_options

from missile.coloring.halves import find_halves
from missile.coloring.shares import Demand
from missile.compiler.bind import bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.colored import ColoredKernels, color_kernels
from missile.compiler.objective import Objective
from missile.compiler.overlap_search import by_gain, descend, sweep, uniform
from missile.compiler.overlap_table import OverlapTable, memory_of
from missile.compiler.overlapped import build_overlapped
from missile.compiler.package import BufferKind, ModelPackage
from missile.compiler.planning import needed_bytes
from missile.compiler.ptx.overlap import Dependents, Overlap
from missile.compiler.synthetic import bind_synthetic, is_synthetic, synthetic_package
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Graph, Stream
from missile.probe import map_for
from missile.probe.map_file import read_map
from missile.runtime.coloring import ColoredTenants, Coloring

COLORED = ("resnet34", "mobilenet_v3_large", "mobilebert", "efficientnet_b0", "squeezenet1_1")
BE = ("densenet161", "bert_large", "decoder_1b")
NEIGHBOURS = ("synthetic-gemv", "synthetic-copy", *BE)
TUNED_BESIDE = ("densenet161", "decoder_1b")  # neighbours for which places are chosen
TUNED_SMS = 32
SMS = (32, 64)
RACES = 300
PLACES = {place: Overlap(place) for place in Dependents}
GAIN = 0.001  # of the whole model's time: less is taken for noise


class Code(Makers):
    """Code made by other processes, in the order asked for."""

    def __init__(self, real: bool) -> None:
        super().__init__(spare=1, threads=4)
        self._real = real
        self._begin = time.monotonic()
        self._asked: dict[tuple[str, str], Future[Any]] = {}

    def ask(self, found: tuple[ModelPackage, Path], what: str, overlap: Overlap | None, shape: Any = None) -> None:
        key = (found[0].name, what)
        if self._real and key not in self._asked:
            self._asked[key] = self.threads.submit(self._make, found, what, overlap, shape)

    def get(self, model: str, what: str) -> Any:
        """Cubins by kernel, or colored code; raises what the making raised."""
        return self._asked[model, what].result()

    def _make(self, found: tuple[ModelPackage, Path], what: str, overlap: Overlap | None, shape: Any) -> Any:
        package, directory = found
        begin = time.monotonic()
        made: Any
        if shape is None:
            assert overlap is not None
            made = build_overlapped(package, directory, overlap, executor=self.workers)
        else:
            # LS tenants have kernels of mixed forms, as `load_tenants` gives them.
            mixed = what != "colored-be"
            made = color_kernels(
                package, directory, shape, mixed=mixed, overlap=overlap, executor=self.workers, keep=False
            )
        self.seconds[f"{package.name} {what}"] = round(time.monotonic() - begin, 2)
        self.seconds["all"] = round(time.monotonic() - self._begin, 2)
        return made


class Tuning(Record):
    def __init__(self, gpu: Gpu, options: argparse.Namespace, packages: dict[str, tuple[ModelPackage, Path]]) -> None:
        self.real = not gpu.info.simulated
        self.code = Code(self.real)
        super().__init__(gpu, options, "overlap2.json", self.code)
        self.result["tuned"] = {}
        self.gpu, self.packages, self.out, self.runs = gpu, packages, options.out, options.rounds
        self.known = read_map(options.map) if options.map else None
        self.table = OverlapTable(gpu.info.name)
        self.noted: dict[tuple[str, str, str], tuple[str, Dependents]] = {}
        self.found: dict[tuple[str, bool], Candidates] = {}
        self.choices: dict[tuple[str, bool], dict[str, dict[str, Dependents]]] = {}
        self.outputs: dict[str, bytes] = {}
        self.whole_ns: dict[str, float] = {}
        self.owned = ExitStack()
        self.colors: dict[bool, dict[str, Any]] = {}  # memory of LS models (True) and BE models in their halves
        self.neighbours: dict[bool, dict[str, Graph]] = {}
        try:
            self.stream = gpu.create_stream()
            self.owned.callback(self.stream.close)
            self.turns = Turns(gpu)
            self.owned.callback(self.turns.close)
            self.beside = Beside(gpu)
            self.owned.callback(self.beside.close)
            self.bits = Bits(gpu, self.stream)
            self.owned.callback(self.bits.close)
        except BaseException:
            self.close()
            raise

    def save(self) -> None:
        super().save()
        if self.table.places:
            self.table.save(self.out)

    def close(self) -> None:
        self.code.close()
        self.owned.close()

    # --- code and memory
    def ask(self) -> None:
        ls = [model for model in LS if model in self.packages]
        for model in ls:
            for place, overlap in PLACES.items():
                self.code.ask(self.packages[model], str(place), overlap)
        with self.attempt("colors"):
            self._share_colors()
        for model in COLORED:
            memory = self.colors.get(True, {}).get(model)
            if memory is not None:
                shape = memory.translation.shape
                self.code.ask(self.packages[model], "colored", None, shape)
                for place, overlap in PLACES.items():
                    self.code.ask(self.packages[model], f"colored-{place}", overlap, shape)
        for model in BE:
            memory = self.colors.get(False, {}).get(model)
            if memory is not None:
                self.code.ask(self.packages[model], "colored-be", None, memory.translation.shape)

    def _share_colors(self) -> None:
        """Memory in one half of the colors for LS models, and in the other for BE models."""
        channel_map = map_for(self.gpu, known=self.known) if self.known else map_for(self.gpu)
        halves = find_halves(channel_map)
        if halves is None:
            raise ValueError("The map has no halves.")
        sets, demands = {}, []
        for ls, models in ((True, COLORED), (False, NEIGHBOURS)):
            for model in models:
                package = self._package(model)
                if package is not None:
                    sets[model] = halves.sets[0 if ls else 1]
                    demands.append(Demand(model, sets[model], needed_bytes(package) + (4 << 20)))
        tenants = self.owned.enter_context(ColoredTenants(self.gpu, Coloring(channel_map, sets), demands))
        for ls, models in ((True, COLORED), (False, NEIGHBOURS)):
            self.colors[ls] = {model: tenants.memories[model] for model in models if model in tenants.memories}
        self.result["colored_errors"] = {name: str(error) for name, error in tenants.errors.items()}

    def _package(self, model: str) -> ModelPackage | None:
        if is_synthetic(model):
            return synthetic_package(model, self.gpu.info)
        return self.packages[model][0] if model in self.packages else None

    # --- (a) places
    def tune(self, models: Sequence[str], colored: bool, until: float) -> None:
        rows = self.result["tuned"].setdefault("colored" if colored else "plain", {})
        todo = [model for model in models if model in self.packages]
        with ExitStack() as part:
            split = self.gpu.split_sms([TUNED_SMS])
            ours = self.gpu.create_stream(partition=split.parts[0])
            part.callback(ours.close)
            theirs = self.gpu.create_stream(partition=split.remainder)
            part.callback(theirs.close)
            others = {name: graph for name, graph in self._neighbours(False).items() if name in TUNED_BESIDE}
            neighbours = {name: Neighbour(self.gpu, theirs, graph) for name, graph in others.items()}
            for neighbour in neighbours.values():
                part.callback(neighbour.stop)
            for index, model in enumerate(todo):
                if self.left < until or (colored and model not in self.colors.get(True, {})):
                    continue
                own = ExitStack()
                with self.attempt(f"{'colored' if colored else 'plain'}: {model}"):
                    kernels = [len(self.packages[name][0].kernels) + 10 for name in todo[index:]]
                    budget = (self.left - until) * kernels[0] / sum(kernels)
                    rows[model] = self._tune(model, colored, ours, neighbours, budget, own)
                    self.owned.push(own.pop_all())
                with self.attempt(f"give {model} back"):
                    own.close()
                self.save()

    def _candidates(self, model: str, colored: bool, undo: ExitStack) -> Candidates:
        package, directory = self.packages[model]
        cubins: dict[Dependents, Mapping[str, bytes]] = {}
        if not colored:
            base = bind(package, directory, self.gpu, tenant=model)
            undo.callback(base.close)
            if self.real:
                cubins = {place: self.code.get(model, str(place)).cubins for place in PLACES}
            found = Candidates(self.gpu, base, cubins, undo)
        else:
            memory, movers = self.colors[True][model], b""
            kernels: ColoredKernels | None = None
            if self.real:
                kernels = self.code.get(model, "colored")
                made = {place: self.code.get(model, f"colored-{place}") for place in PLACES}
                movers = made[Dependents.LATE].transfer
                cubins = {
                    place: {name: cubin for name, cubin in code.cubins.items() if code.overlaps(name)}
                    for place, code in made.items()
                }
            base = bind_colored(package, directory, self.gpu, memory, kernels=kernels, mixed=True)
            undo.callback(base.close)
            found = Candidates(self.gpu, base, cubins, undo, movers, memory)
        self.bits.feed(base)
        return found

    def _tune(
        self,
        model: str,
        colored: bool,
        ours: Stream,
        neighbours: Mapping[str, Neighbour],
        budget: float,
        undo: ExitStack,
    ) -> dict[str, Any]:
        found = self._candidates(model, colored, undo)
        plain = found.keep("colored" if colored else "plain", None)
        late = all_late(found.kernels)
        self.turns.measure(self.stream, {"": plain}, 1)
        typical = float(np.median(self.turns.measure(self.stream, {"": plain}, 1)[""]))
        batches = max(1, min(self.runs // 10, round(10e6 / typical / 10)))

        def alone_on(stream: Stream) -> Any:
            return lambda choice: float(np.median(self.turns.measure(stream, {"": found.graph(choice)}, batches)[""]))

        until = time.monotonic() + budget * 0.6
        best = descend(found.kernels, alone_on(self.stream), noise=GAIN, enough=lambda: time.monotonic() > until)
        choices = {"late": late, "alone": best.choice}
        row: dict[str, Any] = {
            "launches": len(found.package.steps), "kernels": len(found.kernels),
            "measured": best.measured, "complete": best.complete,
            "runs_each": batches * 10, "uniform_ns": {str(p): ns for p, ns in best.uniform_ns.items()},
            "effects": {k: {str(p): round(v, 5) for p, v in e.items()} for k, e in best.effects.items()},
        }  # fmt: skip
        if neighbours:
            until = time.monotonic() + budget * 0.15
            order = by_gain(
                found.kernels, late, Dependents.START, alone_on(ours), enough=lambda: time.monotonic() > until
            )
            until = time.monotonic() + budget * 0.2

            def near(choice: Any) -> float:
                """Geometric mean over the neighbours."""
                graph = {"": found.graph(choice)}
                taken = [
                    self.beside.measure(ours, graph, neighbour, 0.06, 60)[""]["median_ns"]
                    for neighbour in neighbours.values()
                ]
                return float(np.exp(np.mean(np.log(taken))))

            swept = sweep(late, order, Dependents.START, near, steps=8, enough=lambda: time.monotonic() > until)
            # The noise is larger here: what was found must not lose against simpler choices measured with it.
            rivals = {"swept": swept.choice, "late": late, "alone": best.choice}
            rivals["never"] = uniform(found.kernels, Dependents.NEVER)
            again = {name: near(choice) for name, choice in rivals.items()}
            winner = min(again, key=lambda name: again[name])
            choices["beside"] = dict(rivals[winner])
            row["sweep"] = {"order": order, "tried": {str(n): ns for n, ns in swept.tried.items()}}
            row["beside_ns"], row["beside_is"] = again, winner
        graphs = {name: found.keep(name, choice) for name, choice in choices.items()}
        row["choices"] = {
            name: {str(place): [k for k in found.kernels if choice[k] is place] for place in Dependents}
            for name, choice in choices.items()
        }
        taken = self.turns.measure(self.stream, {"plain" if not colored else "colored": plain, **graphs}, 10)
        row["times"] = {name: summary(samples) for name, samples in taken.items()}
        first = "colored" if colored else "plain"
        if not colored:
            self.whole_ns[model] = row["times"]["plain"]["median_ns"]
        row["same_output"] = self._same(model, colored, found, graphs)
        for objective in Objective:
            if str(objective) in choices:
                self._note(model, objective, colored, choices[str(objective)])
        self.found[model, colored], self.choices[model, colored] = found, choices
        base = self.whole_ns.get(model, row["times"][first]["median_ns"])
        ratios = {name: round(t["median_ns"] / base, 3) for name, t in row["times"].items()}
        print(f"tuned {'colored' if colored else 'plain':8}{model:20}{base / 1e3:8.1f} us", ratios,
              "start/late/never", {n: tuple(places_of(c).values()) for n, c in choices.items() if n != "late"},
              row.get("beside_is"), "same" if all(v == 0 for v in row["same_output"].values()) else row["same_output"],
              f"{best.measured} measured{'' if best.complete else ', cut short'}", flush=True)  # fmt: skip
        return row

    def _same(self, model: str, colored: bool, found: Candidates, graphs: Mapping[str, Graph]) -> dict[str, int]:
        """How many of some runs of each graph differ from the model in plain memory, launched one after another."""
        if any(b.kind is BufferKind.STATE and b.nbytes for b in found.package.buffers):
            return {}
        stream = self.stream
        usual = found.output(found.keep("colored" if colored else "plain", None), stream, self.bits, 0x5A)
        expected = self.outputs.setdefault(model, usual)
        wrong = {"launched one by one": int(usual != expected)}
        for name, graph in graphs.items():
            wrong[name] = sum(
                found.output(graph, stream, self.bits, (0xFF, 0x3C)[run % 2]) != expected for run in range(10)
            )
        return wrong

    def _note(self, model: str, objective: Objective, colored: bool, choice: Mapping[str, Dependents]) -> None:
        package, directory = self.packages[model]
        form = self.colors[True][model].translation.shape.form if colored else None
        memory = memory_of(form)
        for name, text in ptx_of(package, directory).items():
            key = (str(objective), memory, text)
            other, place = self.noted.get(key, (model, choice.get(name, Dependents.LATE)))
            wanted = choice.get(name, Dependents.LATE)
            if place is not wanted:  # the model that came first has it
                self.result.setdefault("conflicts", []).append([str(objective), memory, other, model, name])
                continue
            self.noted[key] = (other, place)
            self.table.note(objective, memory, text, place)

    # --- neighbours
    def _neighbours(self, colored: bool) -> dict[str, Graph]:
        """BE models' graphs, loaded when first asked for and kept to the end."""
        if colored not in self.neighbours:
            made = self.neighbours[colored] = {}
            for name in NEIGHBOURS:
                with self.attempt(f"load {name}{' in colors' if colored else ''}"):
                    model = self._neighbour(name, colored)
                    if model is not None:
                        self.owned.callback(model.close)
                        self.bits.feed(model)
                        made[name] = model.graph
        return self.neighbours[colored]

    def _neighbour(self, name: str, colored: bool) -> Any:
        memory = self.colors.get(False, {}).get(name) if colored else None
        if colored and memory is None:
            return None
        if is_synthetic(name):
            return bind_synthetic(name, self.gpu, tenant=f"be-{name}", memory=memory)
        if name not in self.packages:
            return None
        package, directory = self.packages[name]
        if memory is None:
            return bind(package, directory, self.gpu, tenant=f"be-{name}")
        kernels = self.code.get(name, "colored-be") if self.real else None
        return bind_colored(package, directory, self.gpu, memory, kernels=kernels)

    # --- (b) isolation
    def isolate(self, colored: bool, until: float) -> None:
        rows = self.result.setdefault("beside", {}).setdefault("colored" if colored else "plain", {})
        victims = {m: found for (m, c), found in self.found.items() if c is colored}
        others: dict[str, Graph | None] = {"nothing": None, **self._neighbours(colored)}
        for sms in SMS:
            if self.left < until or not victims:
                return
            with self.attempt(f"beside: {sms} SMs"), ExitStack() as part:
                split = self.gpu.split_sms([sms])
                ours = self.gpu.create_stream(partition=split.parts[0])
                part.callback(ours.close)
                theirs = self.gpu.create_stream(partition=split.remainder)
                part.callback(theirs.close)
                found = rows.setdefault(str(sms), {})
                for name, graph in others.items():
                    if self.left < until:
                        return
                    with self.attempt(f"{sms} SMs beside {name}"):
                        neighbour = None if graph is None else Neighbour(self.gpu, theirs, graph)
                        try:
                            found[name] = self._cell(victims, colored, neighbour, ours)
                        finally:
                            if neighbour is not None:
                                neighbour.stop()
                        self._print(sms, name, colored, found)
                    self.save()

    def _cell(
        self, victims: Mapping[str, Candidates], colored: bool, neighbour: Neighbour | None, ours: Stream
    ) -> dict[str, Any]:
        cell: dict[str, Any] = {"victims": {}, "neighbour_alone_ns": neighbour.alone_ns if neighbour else None}
        for model, found in victims.items():
            graphs = found.kept
            if colored and (model, False) in self.found:  # not colored, beside a colored neighbour
                graphs["plain beside"] = self.found[model, False].kept.get("beside", graphs["late"])
            seen = 0 if neighbour is None else len(neighbour.ends)
            cell["victims"][model] = self.beside.measure(ours, graphs, neighbour, 0.05 * len(graphs))
            if neighbour is not None:
                cell["victims"][model]["neighbour_per_s"] = neighbour.rate(seen)
        return cell

    def _print(self, sms: int, name: str, colored: bool, rows: Mapping[str, Any]) -> None:
        alone = rows.get("nothing", rows[name])["victims"]
        for model, times in rows[name]["victims"].items():
            whole = self.whole_ns.get(model, float("nan"))
            rate = times.get("neighbour_per_s")
            cells = "  ".join(
                f"{what} {t['median_ns'] / alone[model][what]['median_ns']:.2f} {t['median_ns'] / whole:.2f}"
                for what, t in times.items()
                if isinstance(t, dict) and what in alone[model]
            )
            be = f"BE {rate * rows[name]['neighbour_alone_ns'] / 1e9:.2f}" if rate else ""
            print(
                f"{sms:3} SMs {'colored' if colored else 'plain':7} beside {name:15}{model:19}{cells}  {be}", flush=True
            )

    # --- (c) races
    def races(self, until: float) -> None:
        rows = self.result.setdefault("races", {})
        graph = self._neighbours(False).get("densenet161")
        with ExitStack() as part:
            split = self.gpu.split_sms([64])
            ours = self.gpu.create_stream(partition=split.parts[0])
            part.callback(ours.close)
            theirs = self.gpu.create_stream(partition=split.remainder)
            part.callback(theirs.close)
            neighbour = None if graph is None else Neighbour(self.gpu, theirs, graph)
            if neighbour is not None:
                part.callback(neighbour.stop)
            for (model, colored), found in self.found.items():
                if model not in self.outputs:
                    continue
                with self.attempt(f"races: {model}"):
                    graphs = [graph for name, graph in found.kept.items() if name in ("alone", "beside")]
                    wrong = runs = 0
                    while runs < RACES and self.left > until:
                        if neighbour is not None:
                            neighbour.keep()
                        made = found.output(graphs[runs % len(graphs)], ours, self.bits, (0xFF, 0x3C)[runs // 2 % 2])
                        wrong += made != self.outputs[model]
                        runs += 1
                    rows[f"{model}{' colored' if colored else ''}"] = {"runs": runs, "wrong": wrong}
        print("races", {name: (row["wrong"], row["runs"]) for name, row in rows.items()}, flush=True)
        self.save()


def main() -> None:
    options = read_options(__doc__, 140.0, 40, "of each choice, at most")
    packages = find_packages(options, (*LS, *BE))
    with open_gpu(options.device) as gpu:
        tuning = Tuning(gpu, options, packages)
        share = options.seconds
        try:
            tuning.ask()
            tuning.tune(LS, False, until=share * 0.58)
            tuning.tune(COLORED, True, until=share * 0.36)
            tuning.isolate(False, until=share * 0.2)
            tuning.isolate(True, until=share * 0.08)
            tuning.races(until=share * 0.02)
        finally:
            tuning.save()
            tuning.close()
    for failure in tuning.result["failures"]:
        print("failed:", failure["what"], "|", failure["error"][:200], flush=True)
    print(
        f"code made in {tuning.code.seconds.get('all')} s; all in {time.monotonic() - options.started:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
