"""What the PCIe scheduler must show on hardware, in one process; writes results.json and pcie.png.

PYTHONPATH=src python3 benchmarks/gpu/pcie.py -o OUT [--device cuda:0] [--scale S] [--packages DIR]
    [--parts a,b] [--add]

Parts run in the order given; each is written when it is done, with its seconds, so that whatever ends the run leaves what
came before. --add keeps the parts that OUT/results.json has already. pcie_merge.py puts parts of two results together.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pcie_cold import cold_models
from pcie_merge import merged
from pcie_mix import mix
from pcie_show import latency_line, show_all

from missile.files import write_whole
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.pcie.direct import Copier, Direct, DirectCopier
from missile.pcie.engine import CopyEngine, EngineOptions
from missile.pcie.link import LinkProfile, choose_options, measure_link
from missile.pcie.load import Bulk, LoadResult, Requests, Source, run_load
from missile.pcie.plot import plot_report
from missile.pcie.report import SHARE_CASES, Plan, Report, measure
from missile.pcie.runner import CopyThread
from missile.pcie.summary import latency_summary, share_deviation, windows
from missile.pcie.ticket import Direction
from missile.pcie.weights import MIB, Share

BOTH = (Direction.H2D, Direction.D2H)


RATE = 1000.0
"""Latency-sensitive copies per second, of each size."""


@dataclass(frozen=True, slots=True)
class Session:
    """What the parts stand on: the link as it was measured in this process. report: where that part was asked for."""

    gpu: Gpu
    link: LinkProfile
    options: EngineOptions
    report: Report | None = None


def loads(direction: Direction) -> tuple[list[Bulk], list[Requests]]:
    """Three bulk tenants, and latency-sensitive ones of two sizes."""
    return (
        [Bulk(name=f"bulk {index + 1}", directions=(direction,)) for index in range(3)],
        [
            Requests(name="ls 1 MiB", nbytes=MIB, rate=RATE, direction=direction),
            Requests(name="ls 4 KiB", nbytes=4 << 10, rate=RATE, direction=direction),
        ],
    )


def latency_row(result: LoadResult) -> dict[str, Any]:
    return {
        "latency": {tenant: latency_summary(times) for tenant, times in result.latency_ns.items()},
        "submitted_late": {tenant: latency_summary(times) for tenant, times in result.late_ns.items()},
        "unfinished": result.unfinished,
        "bytes_per_s": sum(result.rate(direction) for direction in Direction),
    }


def urgent(
    session: Session, seconds: float, repeats: int, keep: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Copies beside three bulk tenants by who makes them, both ways; and once with small ones that overtake.

    Each a list, one for each repeat; repeats take turns.
    """
    gpu = session.gpu
    overtaking = choose_options(session.link, overtake=True)
    sources = {"a loop in C": Source.NATIVE, "a loop in Python": Source.SPINNING}
    if gpu.info.simulated:
        del sources["a loop in C"]
    out: dict[str, Any] = {}

    def run(name: str, direction: Direction, source: Source, options: EngineOptions) -> None:
        bulk, requests = loads(direction)
        engine = CopyEngine(gpu, options)
        found = latency_row(run_load(gpu, engine, bulk, requests, duration_s=seconds, source=source))
        out.setdefault(name, []).append(found)
        print(f"  {latency_line(name, found)}", flush=True)
        keep(out)

    for _ in range(repeats):
        for direction in Direction:
            for name, source in sources.items():
                run(f"{name}, {direction}", direction, source, session.options)
    for name, source in sources.items():
        run(f"{name}, h2d, overtaking", Direction.H2D, source, overtaking)
    return out


def latencies(session: Session, seconds: float) -> dict[str, Any]:
    """What `measure` leaves out: the other ways of copying to the host, and the scheduler with a source that sleeps."""
    gpu = session.gpu
    bulk, requests = loads(Direction.H2D)
    bulk_back, back = loads(Direction.D2H)
    cases: dict[str, tuple[Copier, list[Bulk], list[Requests], Source]] = {
        "sleeping source, alone": (CopyEngine(session.gpu, session.options), [], requests, Source.SLEEPING),
        "sleeping source, beside": (CopyEngine(session.gpu, session.options), bulk, requests, Source.SLEEPING),
        "spinning source, alone to host": (CopyEngine(session.gpu, session.options), [], back, Source.SPINNING),
    }
    cases |= {f"{how}, to host": (DirectCopier(gpu, how), bulk_back, back, Source.SPINNING) for how in Direct}
    out = {}
    for name, (copier, others, mine, source) in cases.items():
        out[name] = latency_row(run_load(gpu, copier, others, mine, duration_s=seconds, source=source))
    return out


def shares(session: Session, seconds: float, rounds: int) -> dict[str, Any]:
    """Every case of shares by weight again, `rounds` times: what one run of half a second says differs from run to run."""
    out: dict[str, Any] = {}
    for _ in range(rounds):
        for case, weights in SHARE_CASES:
            named = {f"tenant {index + 1}": weight for index, weight in enumerate(weights)}
            tenants = [Bulk(name=name, share=Share(weight=weight), nbytes=64 * MIB) for name, weight in named.items()]
            result = run_load(session.gpu, CopyEngine(session.gpu, session.options), tenants, [], duration_s=seconds)
            found = share_deviation(result, named)
            out.setdefault(case, []).append({"worst": found["worst"], "jain": found["jain"]})
    return out


def throughput(session: Session, seconds: float, rounds: int) -> dict[str, Any]:
    """One bulk tenant, each direction and both at once, against the raw link; and what the scheduler costs the CPU."""
    out: dict[str, Any] = {}
    cases = [("h2d", BOTH[:1]), ("d2h", BOTH[1:]), *(("both", BOTH) for _ in range(rounds))]
    for name, directions in cases:
        bulk = Bulk(name="bulk", directions=directions)
        result = run_load(session.gpu, CopyEngine(session.gpu, session.options), [bulk], [], duration_s=seconds)
        raw = (
            session.link.both
            if name == "both"
            else {direction: session.link.raw(direction) for direction in directions}
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


def idle_cpu(session: Session, seconds: float) -> dict[str, float]:
    """CPU of an idle engine on a thread of its own."""
    with CopyEngine(session.gpu, session.options) as engine:
        engine.admit("idle")
        with CopyThread(engine):
            begin, cpu = time.perf_counter(), time.process_time()
            time.sleep(seconds)
            return {"cpu_cores": (time.process_time() - cpu) / (time.perf_counter() - begin)}


def minimums(session: Session, seconds: float) -> dict[str, Any]:
    """A light tenant with a promise and a limited one beside a flood; the least and the most in any 100 ms."""
    promised, limit = 0.3 * session.link.raw(Direction.H2D), 0.1 * session.link.raw(Direction.H2D)
    tenants = [
        Bulk(name="flood", share=Share(weight=20)),
        Bulk(name="limited", share=Share(weight=20, limit=limit)),
        Bulk(name="promised", share=Share(weight=0.05, minimum=promised)),
    ]
    result = run_load(session.gpu, CopyEngine(session.gpu, session.options), tenants, [], duration_s=seconds)
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
    parser.add_argument("--scale", type=float, default=1.0, help="of all durations and repeats")
    parser.add_argument(
        "--packages", type=Path, help="where compiled packages lie, in MODEL-bN (else: the usual cache)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--add", action="store_true", help="to the parts that OUT/results.json has already")
    parser.add_argument("--mix-s", type=float, default=60.0, help="what the mix may take, with all that it loads")
    options = parser.parse_args()
    chosen = options.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"Unknown part {unknown[0]!r}; there are {', '.join(PARTS)}.")
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / "results.json"
    faulthandler.register(signal.SIGTERM, chain=True)  # who ends a run that takes too long learns where it was
    before = json.loads(target.read_text()) if options.add and target.exists() else {}
    with open_gpu(options.device) as gpu:
        show_all(measure_parts(gpu, chosen, options, lambda out: _write(target, merged(before, out))))


def _write(target: Path, out: dict[str, Any]) -> None:
    write_whole(target, json.dumps(out, indent=1) + "\n")


def measure_parts(
    gpu: Gpu, chosen: Sequence[str], options: argparse.Namespace, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Every part of `chosen`, saved one by one."""
    scale, seconds = options.scale, dict[str, float]()
    about: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": gpu.info.name,
        "simulated": gpu.info.simulated,
        "scale": scale,
        "seconds": seconds,
    }
    out: dict[str, Any] = {"runs": [about]}
    session = _session(gpu, "report" in chosen, scale, seconds)
    about["raw"] = {direction: session.link.raw(direction) for direction in Direction}
    about["bypass"] = session.link.bypass
    if session.report is not None:
        out["report"] = session.report.as_dict()
        save(out)
    shares_s = max(0.25, 0.8 * scale)

    def keep_mix(found: dict[str, Any]) -> None:
        save(out | {"mix": found})

    parts: dict[str, Callable[[], Any]] = {
        "throughput": lambda: throughput(session, max(0.3, 1.5 * scale), 3),
        "idle": lambda: idle_cpu(session, max(0.3, scale)),
        "shares": lambda: shares(session, shares_s, 2),
        "mix": lambda: mix(gpu, options.packages, max(0.4, 4 * scale), options.mix_s, keep_mix),
        "cold models": lambda: cold_models(
            gpu, session.options, session.link.raw(Direction.H2D), max(4, round(11 * scale)), options.packages
        ),
        "urgent": lambda: urgent(session, 3.0 * scale, 2, lambda found: save(out | {"urgent": found})),
        "latencies": lambda: latencies(session, 2.0 * scale),
        "minimums": lambda: minimums(session, max(0.4, scale)),
        "plot": lambda: session.report and plot_report(session.report, options.output / "pcie.png"),
    }
    for name in chosen:
        if name == "report":
            continue
        at = time.monotonic()
        try:
            print(f"- {name}", flush=True)
            out[name] = parts[name]()
        except Exception:  # one part's failure must not hide the others
            out[name] = {"error": traceback.format_exc()}
            traceback.print_exc()
        seconds[name] = round(time.monotonic() - at, 2)
        print(f"  {seconds[name]:.1f} s", flush=True)
        save(out)
    return out


PARTS = (
    "report", "throughput", "idle", "shares", "mix", "cold models", "urgent", "latencies", "minimums", "plot"
)  # fmt: skip
"""In order of worth."""


def _session(gpu: Gpu, whole: bool, scale: float, seconds: dict[str, float]) -> Session:
    """whole: measure all that `missile pcie` does, not the raw link only."""
    at = time.monotonic()
    if whole:
        plan = Plan(compare_s=4.0 * scale, shares_s=max(0.25, 0.8 * scale), rate=RATE)
        report = measure(gpu, plan, progress=lambda text: print(f"- {text}", flush=True))
        session = Session(gpu, report.link, report.options, report)
    else:
        print("- raw link", flush=True)
        link = measure_link(gpu)
        session = Session(gpu, link, choose_options(link))
    seconds["report" if whole else "raw link"] = round(time.monotonic() - at, 2)
    return session


if __name__ == "__main__":
    main()
