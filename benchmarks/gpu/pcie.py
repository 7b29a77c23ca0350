"""What the PCIe scheduler must show on hardware, in one process; writes results.json and pcie.png.

PYTHONPATH=src python3 benchmarks/gpu/pcie.py -o OUT [--device cuda:0] [--scale S] [--packages DIR]

Parts in order of worth; each is written when it is done, so that whatever ends the run leaves what came before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from pcie_mix import mix, package_of, show

from missile.compiler.library import find_package
from missile.files import write_whole
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.pcie.direct import Copier, Direct, DirectCopier
from missile.pcie.engine import CopyEngine
from missile.pcie.load import Bulk, Requests, Source, run_load
from missile.pcie.plot import plot_report
from missile.pcie.report import SHARE_CASES, Plan, Report, measure
from missile.pcie.runner import CopyThread, Sleeper
from missile.pcie.summary import latency_summary, share_deviation, windows
from missile.pcie.swap import Swapper, SwapRun
from missile.pcie.ticket import CopyState, CopyTicket, Direction
from missile.pcie.weights import MIB, Share
from missile.runtime.hosted import host_model, weight_bytes

COLD_MODELS = (
    ("decoder_1b", 8),
    ("bert_large", 32),
)  # one that takes longer to copy than to run, and the other way round
BOTH = (Direction.H2D, Direction.D2H)


def latencies(gpu: Gpu, report: Report, seconds: float) -> dict[str, Any]:
    """What `measure` leaves out: the other ways of copying to the host, and the scheduler with a source that sleeps."""
    requests = [
        Requests(name="ls 1 MiB", nbytes=MIB, rate=report.plan.rate),
        Requests(name="ls 4 KiB", nbytes=4 << 10, rate=report.plan.rate),
    ]
    back = [replace(tenant, direction=Direction.D2H) for tenant in requests]
    bulk = [Bulk(name=f"bulk {index + 1}", nbytes=report.plan.bulk_bytes) for index in range(3)]
    bulk_back = [replace(tenant, directions=BOTH[1:]) for tenant in bulk]
    cases: dict[str, tuple[Copier, list[Bulk], list[Requests], Source]] = {
        "sleeping source, alone": (CopyEngine(gpu, report.options), [], requests, Source.SLEEPING),
        "sleeping source, beside": (CopyEngine(gpu, report.options), bulk, requests, Source.SLEEPING),
        "spinning source, alone to host": (CopyEngine(gpu, report.options), [], back, Source.SPINNING),
    }
    cases |= {f"{how}, to host": (DirectCopier(gpu, how), bulk_back, back, Source.SPINNING) for how in Direct}
    out = {}
    for name, (copier, others, mine, source) in cases.items():
        result = run_load(gpu, copier, others, mine, duration_s=seconds, source=source)
        out[name] = {
            "latency": {tenant: latency_summary(times) for tenant, times in result.latency_ns.items()},
            "submitted_late": {tenant: latency_summary(times) for tenant, times in result.late_ns.items()},
            "unfinished": result.unfinished,
            "bytes_per_s": sum(result.rate(direction) for direction in Direction),
        }
    return out


def shares(gpu: Gpu, report: Report, seconds: float, rounds: int) -> dict[str, Any]:
    """Every case of shares by weight again, `rounds` times: what one run of half a second says differs from run to run."""
    out: dict[str, Any] = {}
    for _ in range(rounds):
        for case, weights in SHARE_CASES:
            named = {f"tenant {index + 1}": weight for index, weight in enumerate(weights)}
            tenants = [Bulk(name=name, share=Share(weight=weight), nbytes=64 * MIB) for name, weight in named.items()]
            result = run_load(gpu, CopyEngine(gpu, report.options), tenants, [], duration_s=seconds)
            found = share_deviation(result, named)
            out.setdefault(case, []).append({"worst": found["worst"], "jain": found["jain"]})
    return out


def throughput(gpu: Gpu, report: Report, seconds: float, rounds: int) -> dict[str, Any]:
    """One bulk tenant, each direction and both at once, against the raw link; and what the scheduler costs the CPU."""
    out: dict[str, Any] = {}
    cases = [("h2d", BOTH[:1]), ("d2h", BOTH[1:]), *(("both", BOTH) for _ in range(rounds))]
    for name, directions in cases:
        bulk = Bulk(name="bulk", directions=directions)
        result = run_load(gpu, CopyEngine(gpu, report.options), [bulk], [], duration_s=seconds)
        raw = (
            report.link.both if name == "both" else {direction: report.link.raw(direction) for direction in directions}
        )
        found = {
            "bytes_per_s": {direction: result.rate(direction) for direction in directions},
            "of_raw": {direction: round(result.rate(direction) / raw[direction], 4) for direction in directions},
            "cpu_cores": round(result.cpu_seconds * 1e9 / result.duration_ns, 4),
            "engine_cpu_cores": round(result.engine_cpu_seconds * 1e9 / result.duration_ns, 4),
            "steps_per_s": round(result.steps * 1e9 / result.duration_ns),
        }
        out.setdefault(name, []).append(found)
        print(f"  {name}: {found}", flush=True)
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


def cold_models(gpu: Gpu, report: Report, repeats: int, packages: Path | None) -> dict[str, Any]:
    """Cold and warm starts of compiled models that displace each other, alone and beside two bulk tenants of equal weight.

    weights: when the last of them had arrived; whole: when the end of the model was seen; against bytes over the link's rate
    (or the tenant's share of it), and whole also against the longer of that and the warm start: what overlapping can reach.
    Each is (median, worst).
    """
    rate = report.link.raw(Direction.H2D)
    found = {name: find_package(package_of(name, packages), batch, gpu.info) for name, batch in COLD_MODELS}
    budget = max(weight_bytes(package) for package, _ in found.values())
    out: dict[str, Any] = {}
    with CopyEngine(gpu, report.options) as engine, ExitStack() as undo:
        swapper = Swapper(gpu, engine, budget)
        undo.callback(swapper.close)
        for name, (package, directory) in found.items():
            engine.admit(name)
            undo.callback(host_model(package, directory, gpu, swapper, gpu.create_stream(), tenant=name).close)
        sleeper = Sleeper(gpu)

        def start(name: str) -> SwapRun:
            return finish(gpu, engine, swapper, sleeper, swapper.start(name))

        for name in found:  # the first run of a kernel loads it
            start(name)
        for case, floods, share in (("alone", 0, 1.0), ("beside two bulk tenants", 2, 1 / 3)):
            flood = Flood(gpu, engine, floods)
            runs: dict[str, list[tuple[SwapRun, SwapRun]]] = {name: [] for name in found}
            for _ in range(repeats):
                for name in found:
                    cold = start(name)
                    runs[name].append((cold, start(name)))
            flood.on = False
            engine.run_until_idle()
            flood.close()
            for name, pairs in runs.items():
                out.setdefault(name, {})[case] = _cold_summary(pairs, rate * share)
                print(f"  {name}, {case}: {out[name][case]}", flush=True)
    return out


def _cold_summary(pairs: list[tuple[SwapRun, SwapRun]], rate: float) -> dict[str, Any]:
    nbytes = pairs[0][0].copied_bytes
    ideal = nbytes / rate * 1e9
    warm = statistics.median(run.finished_ns - run.started_ns for _, run in pairs)
    whole = [run.finished_ns - run.started_ns for run, _ in pairs]
    weights = [run.weights_ns - run.started_ns for run, _ in pairs]

    def against(times: list[int], base: float) -> tuple[float, float]:
        return statistics.median(times) / base, max(times) / base

    return {
        "bytes": nbytes,
        "starts": len(pairs),
        "ideal_ms": ideal / 1e6,
        "warm_ms": warm / 1e6,
        "weights": against(weights, ideal),
        "whole": against(whole, ideal),
        "whole_against_longer": against(whole, max(ideal, warm)),
    }


class Flood:
    """Tenants that always have two copies of 64 MiB waiting, until `on` is False."""

    def __init__(self, gpu: Gpu, engine: CopyEngine, tenants: int) -> None:
        self.on = True
        self._engine = engine
        self._host, self._device = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
        for index in range(tenants):
            engine.admit(f"bulk {index}")
            for _ in range(2):
                self._copy(f"bulk {index}")

    def _copy(self, tenant: str) -> None:
        self._engine.to_device(tenant, self._device, self._host).add_done_callback(self._again)

    def _again(self, ticket: CopyTicket) -> None:
        if self.on and ticket.state is CopyState.DONE:
            self._copy(ticket.tenant)

    def close(self) -> None:
        self._host.free()
        self._device.free()


def finish(gpu: Gpu, engine: CopyEngine, swapper: Swapper, sleeper: Sleeper, run: SwapRun) -> SwapRun:
    """Drive everything until `run` is over."""
    while not run.done:
        due = engine.step()
        swapper.poll()
        if not run.done:
            soon = gpu.now_ns() + 20_000
            sleeper.wait([*engine.events(), *swapper.events()], soon if due is None else min(due, soon))
    if run.error is not None:
        raise run.error
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--scale", type=float, default=1.0, help="of all durations and repeats")
    parser.add_argument(
        "--packages", type=Path, help="where compiled packages lie, in MODEL-bN (else: the usual cache)"
    )
    options = parser.parse_args()
    scale = options.scale
    options.output.mkdir(parents=True, exist_ok=True)
    out: dict[str, Any] = {}

    def save() -> None:
        """After every part: what has been measured is kept whatever ends the rest."""
        write_whole(options.output / "results.json", json.dumps(out, indent=1) + "\n")

    with open_gpu(options.device) as gpu:
        plan = Plan(compare_s=4.0 * scale, shares_s=max(0.25, 0.8 * scale), rate=1000.0)
        report = measure(gpu, plan, progress=lambda text: print(f"- {text}", flush=True))
        out["report"] = report.as_dict()
        save()
        parts: dict[str, Callable[[], Any]] = {
            "throughput": lambda: throughput(gpu, report, max(0.3, 1.5 * scale), 3),
            "idle": lambda: idle_cpu(gpu, report, max(0.3, scale)),
            "shares": lambda: shares(gpu, report, plan.shares_s, 2),
            "mix": lambda: mix(gpu, options.packages, max(0.4, 4 * scale)),
            "cold models": lambda: cold_models(gpu, report, max(4, round(11 * scale)), options.packages),
            "latencies": lambda: latencies(gpu, report, 2.0 * scale),
            "minimums": lambda: minimums(gpu, report, max(0.4, scale)),
            "plot": lambda: plot_report(report, options.output / "pcie.png"),
        }
        for name, part in parts.items():
            try:
                print(f"- {name}", flush=True)
                out[name] = part()
            except Exception:  # one part's failure must not hide the others
                out[name] = {"error": traceback.format_exc()}
                traceback.print_exc()
            save()
    show_all(out)


def show_all(out: dict[str, Any]) -> None:
    """What was measured, in short."""
    report = out["report"]
    both = {str(key): round(value / 1e9, 2) for key, value in report["link"]["both"].items()}
    print(f"chosen {report['chosen']}\nboth raw {both}")
    rows = {"alone": report["alone"], **report["compared"], "missile to host": report["to_host"]}
    rows |= {f"loop in C, {name}": row for name, row in report["native_source"].items()}
    rows |= out.get("latencies", {})
    for name, row in rows.items():
        if isinstance(row, dict) and "latency" in row:
            cells = [
                f"{tenant} {found['p50_us']} {found['p99_us']} {found['p999_us']}"
                for tenant, found in row["latency"].items()
            ]
            print(f"{name:32} {' | '.join(cells)} | {row['bytes_per_s'] / 1e9:.1f} GB/s, {row['unfinished']}")
    print("shares", {case: (found["worst"], found["jain"]) for case, found in report["shares"].items()})
    for name in ("shares", "throughput", "idle", "minimums", "cold models"):
        print(name, json.dumps(out.get(name)))
    if "alone" in out.get("mix", {}):
        show(out["mix"])


if __name__ == "__main__":
    main()
