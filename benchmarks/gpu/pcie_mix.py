"""The mix of examples/04_weights_on_host.toml by policy: latencies, throughput and cold starts. A part of pcie.py, or alone.

PYTHONPATH=src python3 benchmarks/gpu/pcie_mix.py [--device cuda:0] [--packages DIR] [--seconds S] [-o FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from missile.bench.run import Bench, run_all
from missile.bench.scenario import Scenario, read_scenario
from missile.bench.testbed import GpuTestbed
from missile.files import write_whole
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.pcie.summary import latency_summary
from missile.runtime.loading import load_tenants

SCENARIO = Path(__file__).parents[2] / "examples" / "04_weights_on_host.toml"


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
    return scenario.changed(duration_s=seconds, warmup_s=seconds / 8, device=gpu.info.device, tenant=tenants)


def mix(gpu: Gpu, packages: Path | None, seconds: float) -> dict[str, Any]:
    """Every tenant alone, then all under each policy of the scenario. Times in us, cold starts in ms."""
    scenario = scenario_for(gpu, packages, seconds)
    out: dict[str, Any] = {"seconds": seconds, "simulated": gpu.info.simulated, "alone": {}}
    with load_tenants(gpu, scenario.tenants, swap_bytes=scenario.swap_bytes) as roster:
        testbed = GpuTestbed(gpu, roster, seed=scenario.seed)
        try:
            results, stopped = run_all(Bench(scenario, testbed), lambda _, step: print(f"  {step}", flush=True))
        finally:
            testbed.close()
    for run in results.runs:
        place = out["alone"] if run.kind == "solo" else out.setdefault(run.policy, {})
        for tenant in run.tenants:
            record = tenant.record()
            row: dict[str, Any] = {
                "per_s": round(len(record.arrival) / run.span_s, 2),
                "latency": latency_summary(record.latency),
                "unfinished": record.unfinished,
                "refused": record.rejected,
            }
            if record.cold_bytes:
                took = (record.cold[:, 1] - record.cold[:, 0]) / 1e6
                row["cold"] = {
                    "starts": len(took),
                    "bytes": record.cold_bytes,
                    "ideal_ms": record.cold_ideal_ns / 1e6,
                    "median_ms": float(np.median(took)) if len(took) else None,
                    "worst_ms": float(took.max()) if len(took) else None,
                }
            place[tenant.name] = row
    return out | {"notes": results.notes, "plan": (results.plan or {}).get("text", ""), "stopped": str(stopped or "")}


def show(found: dict[str, Any]) -> None:
    for policy, tenants in found.items():
        if not isinstance(tenants, dict):
            continue
        for name, row in tenants.items():
            latency, cold = row["latency"], row.get("cold")
            print(
                f"  {policy:22} {name:8} {row['per_s']:8.1f}/s p50 {latency['p50_us']} p99 {latency['p99_us']} us, "
                f"{row['unfinished']} unfinished, {row['refused']} refused" + (f", cold {cold}" if cold else "")
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with open_gpu(options.device) as gpu:
        found = mix(gpu, options.packages, options.seconds)
    show(found)
    if options.output:
        write_whole(options.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
