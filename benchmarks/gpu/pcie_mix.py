"""The mix of examples/04_weights_on_host.toml by policy: latencies, throughput and cold starts. A part of pcie.py, or alone.

PYTHONPATH=src python3 benchmarks/gpu/pcie_mix.py [--device cuda:0] [--packages DIR] [--seconds S] [--budget-s B]
    [-o FILE]

LS tenants run alone first, since objectives stand on that; then all tenants under each policy, most important first. BE
pauses beside LS requests under `missile`, so that nothing has to be planned. What does not fit in the budget is left out.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pcie_show import show_mix

from missile.bench.results import Run
from missile.bench.run import Bench, Step
from missile.bench.scenario import Scenario, read_scenario
from missile.bench.testbed import GpuTestbed
from missile.errors import MissileError
from missile.files import write_whole
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.pcie.summary import latency_summary
from missile.runtime.loading import load_tenants

SCENARIO = Path(__file__).parents[2] / "examples" / "04_weights_on_host.toml"
POLICIES = ("missile:pause=on", "missile:pause=on,copies=off", "priority", "streams")
LOADING_S, BEYOND_S = 30.0, 8.0
"""What takes longer to load, or goes on for so long beyond its load, hangs: the process says where and ends."""


def package_of(model: str, packages: Path | None) -> str:
    """The model's directory in `packages`, where it is there; its name otherwise."""
    found = packages and next(iter(sorted(packages.glob(f"{model}-b*/package.json"))), None)
    return str(found.parent) if found else model


def scenario_for(gpu: Gpu, packages: Path | None, seconds: float) -> Scenario:
    """The example, on the packages in `packages` (compiled for `gpu`)."""
    scenario = read_scenario(SCENARIO)
    tenants = []
    for tenant in scenario.tenants:
        model = package_of(tenant.model, packages)
        given = {} if model == tenant.model else {"model": model, "batch": None}
        tenants.append(tenant.model_copy(update=given).model_dump(by_alias=True))
    return scenario.changed(
        duration_s=seconds, warmup_s=seconds / 8, device=gpu.info.device, tenant=tenants, policies=list(POLICIES)
    )


def mix(
    gpu: Gpu,
    packages: Path | None,
    seconds: float,
    budget_s: float,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Times in us, cold starts in ms. took_s: by step, how long it took with all that was made for it. keep: told what is
    there after each step."""
    began = time.monotonic()
    scenario = scenario_for(gpu, packages, seconds)
    took: dict[str, float] = {}
    out: dict[str, Any] = {"seconds": seconds, "simulated": gpu.info.simulated, "alone": {}, "took_s": took}

    def timed(what: str, do: Callable[[], Any], most_s: float = seconds + BEYOND_S) -> Any:
        print(f"  {what}", flush=True)
        at = time.monotonic()
        faulthandler.dump_traceback_later(most_s, exit=True)
        try:
            return do()
        finally:
            faulthandler.cancel_dump_traceback_later()
            took[what] = round(time.monotonic() - at, 2)
            print(f"    {took[what]:.1f} s", flush=True)
            keep(out)

    roster = timed("load", lambda: load_tenants(gpu, scenario.tenants, swap_bytes=scenario.swap_bytes), LOADING_S)
    with roster:
        testbed = GpuTestbed(gpu, roster, seed=scenario.seed)
        try:
            timed("preemptible code", lambda: testbed.prepare(scenario.tenants, POLICIES), LOADING_S)
            bench = Bench(scenario, testbed)
            urgent = {tenant.name for tenant in scenario.tenants if tenant.latency_sensitive}
            for step in bench.steps:
                if step.kind == "solo" and step.what not in urgent:
                    continue
                if budget_s - (time.monotonic() - began) < seconds + 2.0:
                    out.setdefault("left_out", []).append(str(step))
                    continue
                timed(str(step), lambda step=step: run_step(bench, step, out))  # type: ignore[misc]
        finally:
            testbed.close()
    return out | {"notes": bench.notes}


def run_step(bench: Bench, step: Step, out: dict[str, Any]) -> None:
    before = len(bench.runs)
    try:
        bench.execute(step)
    except MissileError as error:
        out.setdefault("errors", {})[str(step)] = str(error)
    for run in bench.runs[before:]:
        place = out["alone"] if run.kind == "solo" else out.setdefault(run.policy, {})
        place.update(rows_of(run))


def rows_of(run: Run) -> dict[str, Any]:
    """Each tenant's figures."""
    rows = {}
    for tenant in run.tenants:
        record = tenant.record()
        row: dict[str, Any] = {
            "per_s": round(len(record.arrival) / run.span_s, 2),
            "latency": latency_summary(record.latency),
            "unfinished": record.unfinished,
            "refused": record.rejected,
        }
        if record.cold_bytes:
            spans = (record.cold[:, 1] - record.cold[:, 0]) / 1e6
            row["cold"] = {
                "starts": len(spans),
                "bytes": record.cold_bytes,
                "ideal_ms": record.cold_ideal_ns / 1e6,
                "median_ms": float(np.median(spans)) if len(spans) else None,
                "worst_ms": float(spans.max()) if len(spans) else None,
            }
        rows[tenant.name] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with open_gpu(options.device) as gpu:
        found = mix(gpu, options.packages, options.seconds, options.budget_s)
    show_mix(found)
    if options.output:
        write_whole(options.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
