"""Hardware counters as a witness that does not know latencies: which L2 instances a colored tenant's work touches.

    PYTHONPATH=src python3 benchmarks/gpu/counters.py -o OUT [--map MAP.json] [--model resnet34] [--slices 16]

`ncu` counts sectors over whole ranges of work: sum, mean, least and most of one L2 instance, but no instance by itself. So
that one can be looked at, a range also holds a reader of one slice that is heavy enough to make that slice's instance the
busiest: what the model adds to the maximum is what it does to that slice. OUT gets `counters.json` with every range.
Clocks are left alone. Needs `ncu` and the right to read counters.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from missile.bench.environment import describe_environment
from missile.coloring.halves import find_halves
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Traffic
from missile.probe import ChannelMap, map_for, read_map, write_map
from missile.probe.contention import SliceMemory
from missile.probe.counters import find_ncu
from missile.probe.pool import PagePool
from missile.runtime.loading import Coloring, load_tenants
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import ClosedLoop

METRIC = "lts__t_sectors"
PAGES = 64
UNITS = 512  # of one slice, 256 bytes each
PROBE_ENTRIES = 1 << 17  # units that a pass of the probe reads
PROBE_PASSES = 4
MODEL_RUNS = 4


class Ranges:
    """What is profiled: everything between `cuProfilerStart` and `cuProfilerStop`."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver

    def measure(self, *work: Callable[[], object]) -> None:
        self._driver.cuProfilerStart()
        for part in work:
            part()
        self._driver.cuProfilerStop()


def child(options: argparse.Namespace) -> None:
    """The ranges of `plan_of`, in its order."""
    channel_map = read_map(options.map)
    topology = channel_map.topology
    half = [sm for sm, side in zip(topology.sms, topology.sm_half, strict=True) if side == topology.sm_half[0]]
    rng = np.random.default_rng(0)
    with ExitStack() as owned:
        gpu = owned.enter_context(open_gpu(options.device))
        pool = owned.enter_context(PagePool(gpu, PAGES, spread=False, rng=rng))
        memory = SliceMemory(channel_map, pool.addresses, channel_map.classify(gpu, pool.addresses), rng)

        def probe(slice_: int) -> Callable[[], object]:
            units = memory.units([slice_], UNITS, victim=False)
            traffic = Traffic(np.resize(units, PROBE_ENTRIES), tuple(half))
            return lambda: gpu.measure_contention(traffic, repeats=1, passes=PROBE_PASSES)

        models = {
            name: model_of(gpu, owned, channel_map, options.model, colors) for name, colors in options.sets.items()
        }
        for run in models.values():
            run()
        probe(options.slices[0])()
        ranges = Ranges()
        for kind, slice_ in plan_of(list(options.sets), options.slices):
            parts = [models[kind]] if kind in models else []
            ranges.measure(*parts, *([] if slice_ is None else [probe(slice_)]))


def model_of(
    gpu: Gpu, owned: ExitStack, channel_map: ChannelMap, model: str, colors: Sequence[int] | None
) -> Callable[[], None]:
    """Runs `model` a few times; colors None: in plain memory."""
    name = f"{model}-{'plain' if colors is None else ''.join(map(str, colors))}"
    tenant = Tenant.model_validate({"name": name, "class": "LS", "model": model, "arrivals": ClosedLoop(depth=1)})
    coloring = None if colors is None else Coloring(channel_map, {name: tuple(colors)})
    roster = owned.enter_context(load_tenants(gpu, [tenant], coloring=coloring))
    loaded = roster.tenants[0]
    bound = loaded.model
    assert bound is not None, loaded.error
    stream = gpu.create_stream()
    owned.callback(stream.close)
    if loaded.inputs:
        stream.copy_to_device(bound.input_address, loaded.inputs[0])

    def run() -> None:
        for _ in range(MODEL_RUNS):
            stream.launch_graph(bound.graph)
        stream.synchronize()

    return run


def plan_of(kinds: Sequence[str], slices: Sequence[int]) -> list[tuple[str, int | None]]:
    """(what runs, beside the probe of which slice), in the order in which it is measured."""
    plan: list[tuple[str, int | None]] = [("nothing", None), *((kind, None) for kind in kinds)]
    for slice_ in slices:
        plan += [("nothing", slice_), *((kind, slice_) for kind in kinds)]
    return plan


def parse(text: str) -> list[dict[str, float]]:
    """Rollups of every range of ncu's raw CSV page."""
    lines = text.splitlines()
    head = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return []
    rows = [row for row in csv.DictReader(lines[head:]) if (row.get("ID") or "").isdecimal()]
    return [
        {suffix: float(row[f"{METRIC}.{suffix}"].replace(",", "")) for suffix in ("sum", "avg", "min", "max")}
        for row in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("missile-out/counters"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--map", type=Path, default=None)
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--slices", type=int, default=16, help="how many slices are looked at, half of each half's")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that ncu may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        given = json.loads(options.child)
        options.slices, options.sets = given["slices"], given["sets"]
        child(options)
        return 0
    ncu = find_ncu()
    if ncu is None:
        print("Nsight Compute (ncu) is not installed.", file=sys.stderr)
        return 1
    with open_gpu(options.device) as gpu:
        info = gpu.info
        channel_map = map_for(gpu, known=options.map, pages=512)
        halves = find_halves(channel_map)
        assert halves is not None
        sets: dict[str, Any] = {"plain": None, "first half": halves.sets[0], "second half": halves.sets[1]}
        with ExitStack() as owned:  # what is compiled now is not compiled under ncu
            for colors in sets.values():
                model_of(gpu, owned, channel_map, options.model, colors)
    rng = np.random.default_rng(1)
    own = [[s for color in half for s in channel_map.colors[color]] for half in halves.sets]
    slices = [int(s) for half in own for s in rng.choice(half, options.slices // 2, replace=False)]
    with tempfile.TemporaryDirectory(prefix="missile-") as directory:
        path = Path(directory) / "map.json"
        write_map(channel_map, path)
        metrics = ",".join(f"{METRIC}.{suffix}" for suffix in ("sum", "avg", "min", "max"))
        command = [str(ncu), "--clock-control", "none", "--replay-mode", "app-range", "--csv", "--page", "raw"]
        command += ["--metrics", metrics, sys.executable, __file__, "--device", options.device, "--map", str(path)]
        command += ["--model", options.model, "--child", json.dumps({"slices": slices, "sets": sets})]
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit, check=False)
    options.out.mkdir(parents=True, exist_ok=True)
    found = parse(done.stdout)
    plan = plan_of(list(sets), slices)
    if done.returncode or len(found) != len(plan):
        (options.out / "ncu.log").write_text(done.stdout[-20000:] + done.stderr[-20000:])
        print(f"ncu gave {len(found)} ranges of {len(plan)}; see {options.out / 'ncu.log'}.", file=sys.stderr)
        return 1
    rows = [{"runs": kind, "slice": slice_, **counts} for (kind, slice_), counts in zip(plan, found, strict=True)]
    result = {
        "environment": describe_environment(info),
        "uuid": info.uuid,
        "metric": METRIC,
        "model": options.model,
        "model_runs": MODEL_RUNS,
        "sets": sets,
        "colors": channel_map.colors,
        "residue_predicted": halves.residue,
        "ranges": rows,
        "summary": summarize(rows, own),
    }
    (options.out / "counters.json").write_text(json.dumps(result, indent=1) + "\n")
    for line in result["summary"].items():
        print(*line)
    return 0


def summarize(rows: Sequence[dict[str, Any]], own: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What each kind of work adds to a slice's instance, in sectors: median over slices of each half; and the rollups."""
    floor = {row["slice"]: row["max"] for row in rows if row["runs"] == "nothing"}
    summary: dict[str, Any] = {}
    for kind in dict.fromkeys(row["runs"] for row in rows):
        alone = next(row for row in rows if row["runs"] == kind and row["slice"] is None)
        summary[kind] = {key: alone[key] for key in ("sum", "avg", "min", "max")}
        summary[kind]["busy"] = round(alone["sum"] / alone["max"], 2) if alone["max"] else 0.0
        for name, half in zip(("on first half's slices", "on second half's slices"), own, strict=True):
            added = [row["max"] - floor[row["slice"]] for row in rows if row["runs"] == kind and row["slice"] in half]
            summary[kind][name] = {
                "median": float(np.median(added)),
                "least": float(min(added)),
                "most": float(max(added)),
            }
    return summary


if __name__ == "__main__":
    sys.exit(main())
