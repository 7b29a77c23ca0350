"""What the PCIe scheduler must show on hardware, in one process; writes results.json and pcie.png.

PYTHONPATH=src python3 benchmarks/gpu/pcie.py -o OUT [--device cuda:0] [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.pcie.engine import CopyEngine
from missile.pcie.load import Bulk, run_load
from missile.pcie.plot import plot_report
from missile.pcie.report import Plan, Report, measure
from missile.pcie.runner import CopyThread
from missile.pcie.summary import windows
from missile.pcie.ticket import Direction
from missile.pcie.weights import Share

BOTH = (Direction.H2D, Direction.D2H)


def throughput(gpu: Gpu, report: Report, seconds: float) -> dict[str, Any]:
    """One bulk tenant, each direction and both at once, against the raw link; and what the scheduler costs the CPU."""
    out: dict[str, Any] = {}
    for name, directions in (("h2d", BOTH[:1]), ("d2h", BOTH[1:]), ("both", BOTH)):
        bulk = Bulk(name="bulk", directions=directions)
        result = run_load(gpu, CopyEngine(gpu, report.options), [bulk], [], duration_s=seconds)
        raw = (
            report.link.both if name == "both" else {direction: report.link.raw(direction) for direction in directions}
        )
        out[name] = {
            "bytes_per_s": {direction: result.rate(direction) for direction in directions},
            "of_raw": {direction: round(result.rate(direction) / raw[direction], 4) for direction in directions},
            "cpu_cores": round(result.cpu_seconds * 1e9 / result.duration_ns, 4),
            "steps_per_s": round(result.steps * 1e9 / result.duration_ns),
        }
        print(f"  {name}: {out[name]}", flush=True)
    return out


def idle_cpu(gpu: Gpu, report: Report, seconds: float) -> dict[str, float]:
    """CPU of an idle engine on a thread of its own."""
    with CopyEngine(gpu, report.options) as engine:
        engine.admit("idle")
        with CopyThread(engine):
            begin, cpu = time.perf_counter(), time.process_time()
            time.sleep(seconds)
            return {"cpu_cores": (time.process_time() - cpu) / (time.perf_counter() - begin)}


def minimums(gpu: Gpu, report: Report, seconds: float) -> dict[str, Any]:
    """A light tenant with a promise and a limited one beside a flood; the least and the most in any 100 ms."""
    promised, limit = 0.3 * report.link.raw(Direction.H2D), 0.1 * report.link.raw(Direction.H2D)
    tenants = [
        Bulk(name="flood", share=Share(weight=20)),
        Bulk(name="limited", share=Share(weight=20, limit=limit)),
        Bulk(name="promised", share=Share(weight=0.05, minimum=promised)),
    ]
    result = run_load(gpu, CopyEngine(gpu, report.options), tenants, [], duration_s=seconds)
    window = 100_000_000
    names, table = windows(result, Direction.H2D, window, step_ns=1_000_000, skip_ns=20_000_000)
    rates = table / window * 1e9
    return {
        "promised_bytes_per_s": promised,
        "limit_bytes_per_s": limit,
        "least": dict(zip(names, rates.min(axis=0).tolist(), strict=True)),
        "most": dict(zip(names, rates.max(axis=0).tolist(), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    scale = 0.25 if options.quick else 1.0
    options.output.mkdir(parents=True, exist_ok=True)
    out: dict[str, Any] = {}
    with open_gpu(options.device) as gpu:
        plan = Plan(compare_s=4.0 * scale, shares_s=max(0.25, 0.8 * scale), rate=1000.0)
        report = measure(gpu, plan, progress=lambda text: print(f"- {text}", flush=True))
        out["report"] = report.as_dict()
        plot_report(report, options.output / "pcie.png")
        parts: dict[str, Callable[[], Any]] = {
            "throughput": lambda: throughput(gpu, report, 1.5 * scale),
            "idle": lambda: idle_cpu(gpu, report, 1.0 * scale),
            "minimums": lambda: minimums(gpu, report, 1.0 * scale),
        }
        for name, part in parts.items():
            try:
                print(f"- {name}", flush=True)
                out[name] = part()
            except Exception:  # one part's failure must not hide the others
                out[name] = {"error": traceback.format_exc()}
                traceback.print_exc()
    (options.output / "results.json").write_text(json.dumps(out, indent=1) + "\n")
    link = out["report"].pop("link")
    print(json.dumps({"link": {key: link[key] for key in ("both", "latency", "bypass")}, **out}, indent=1))


if __name__ == "__main__":
    main()
