"""Settings of policy `missile` side by side, with `orion` and `partition`, where LS requests are many.

    PYTHONPATH=src MISSILE_CACHE=CACHE python3 benchmarks/gpu/missile_settings.py -o OUT [--budget-s 90]

Each cell is one LS model at a share of its capacity beside one BE model. All settings of a cell run on the same arrivals;
rounds go on (with other arrivals) until the budget is used. Writes `settings.json.gz` after every round: figures and the raw
times of every LS request. Prints a table: LS p99 over that alone, share within 1.5 of it, BE rate over that alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from missile.bench.environment import describe_environment
from missile.bench.scenario import Scenario
from missile.bench.testbed import GpuTestbed, open_testbed
from missile.errors import MissileError
from missile.runtime.metrics import attainment
from missile.runtime.records import RunRecord, TenantRecord
from missile.runtime.tenant import Tenant

SLO_FACTOR = 1.5
CELLS = (
    ("mobilenet_v3_large", "densenet161", 0.3),
    ("efficientnet_b0", "decoder_1b", 0.3),
    ("resnet34", "densenet161", 0.6),
    ("efficientnet_b0", "bert_large", 0.6),
    ("squeezenet1_1", "densenet161", 0.6),
    ("mobilebert", "resnet152", 0.9),
)
PAUSES = "missile:pause=on"
SETTINGS = (
    PAUSES,
    f"{PAUSES},preempt=off",
    *(f"{PAUSES},lend={lend},ls_share={share}" for share in (0.5, 1.0, 0.75, 0.25) for lend in (0.15, 0.3, 0.45)),
    "orion:dur_threshold=0.5",
    "orion:dur_threshold=2",
)


@dataclass
class Session:
    """One opened testbed and what was measured on it. run_s: of each run, a tenth of it more as warm-up."""

    testbed: GpuTestbed
    run_s: float
    until: float
    capacity: dict[str, float] = field(default_factory=dict)
    alone: dict[tuple[str, int], TenantRecord] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def left(self) -> float:
        return self.until - time.monotonic()

    def lengths(self) -> dict[str, int]:
        return {"duration_ns": round(1.1e9 * self.run_s), "warmup_ns": round(1e8 * self.run_s)}

    def measure_capacity(self, model: str) -> None:
        if model in self.capacity:
            return
        loop = tenant(model, "LS", {"kind": "closed", "depth": 2})
        record = self.testbed.solo(loop, seed=1, duration_ns=330_000_000, warmup_ns=30_000_000)
        self.capacity[model] = len(record.tenants[0].done) / 0.3

    def solo(self, one: Tenant, seed: int) -> TenantRecord:
        key = (one.model_dump_json(), seed)
        if key not in self.alone:
            self.alone[key] = self.testbed.solo(one, seed=seed, **self.lengths()).tenants[0]
        return self.alone[key]

    def cell(self, ls: str, be: str, load: float, settings: Sequence[str], seed: int) -> None:
        self.measure_capacity(ls)
        rate = round(load * self.capacity[ls], 1)
        latency = tenant(ls, "LS", {"kind": "poisson", "rate_per_s": rate})
        bulk = tenant(be, "BE", {"kind": "closed", "depth": 2})
        alone, fast = self.solo(latency, seed), self.solo(bulk, seed)
        slo_ms = SLO_FACTOR * float(np.quantile(alone.latency, 0.99)) / 1e6
        tenants = [latency.model_copy(update={"slo_ms": slo_ms}), bulk]
        for setting in settings:
            if self.left() < 2.0 * self.run_s:
                return
            row: dict[str, Any] = {"cell": f"{ls} {load:.0%} + {be}", "setting": setting, "seed": seed, "rate": rate}
            try:
                record = self.testbed.shared(tenants, setting, seed=seed, **self.lengths())
                row |= figures(record, alone, fast, slo_ms)
            except MissileError as error:
                row["error"] = str(error)
            self.rows.append(row)
            print(short(row), flush=True)


def tenant(model: str, kind: str, arrivals: dict[str, Any]) -> Tenant:
    return Tenant.model_validate({"name": model, "class": kind, "model": model, "arrivals": arrivals})


def figures(record: RunRecord, alone: TenantRecord, fast: TenantRecord, slo_ms: float) -> dict[str, Any]:
    """Of one run, times in us. The raw times are offsets from each request's arrival."""
    ls, be = record.tenants
    if record.fault or not len(ls.done):
        return {"error": record.fault or "no LS request finished"}
    parts = {
        "latency": ls.done - ls.arrival,
        "dispatch": ls.dispatch - ls.arrival,
        "wait": ls.start - ls.dispatch,
        "service": ls.end - ls.start,
        "after": ls.done - ls.end,
        "loop": np.asarray(record.jitter_ns),
    }
    quantiles = {
        name: [round(float(q) / 1e3, 1) for q in np.quantile(times, (0.5, 0.9, 0.99))] if len(times) else []
        for name, times in parts.items()
    }
    solo = np.quantile(alone.latency, (0.5, 0.99))
    mine = np.quantile(ls.latency, (0.5, 0.99))
    return {
        "n": len(ls.done),
        "p50_over_solo": float(mine[0] / solo[0]),
        "p99_over_solo": float(mine[1] / solo[1]),
        "attained": attainment(ls, round(slo_ms * 1e6)),
        "rejected": ls.rejected,
        "be": len(be.done) / max(len(fast.done), 1),
        "solo_p99_us": float(solo[1]) / 1e3,
        "us": quantiles,
        "raw": {
            "arrival": ls.arrival.tolist(),
            **{name: (getattr(ls, name) - ls.arrival).tolist() for name in ("dispatch", "start", "end", "done")},
        },
    }


def short(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['cell']:38} {row['setting']:58} {row['error']}"
    dispatch, service = row["us"]["dispatch"], row["us"]["service"]
    return (
        f"{row['cell']:38} {row['setting']:58} p50 {row['p50_over_solo']:.2f} p99 {row['p99_over_solo']:.2f} "
        f"met {row['attained']:.1%} BE {row['be']:.1%} dispatch {dispatch[0]:.0f}/{dispatch[2]:.0f} service {service[0]:.0f}"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each setting: the median over cells and rounds, and the worst."""
    lines = [f"{'setting':58} {'n':>3} {'p50':>5} {'p99':>5} {'worst':>6} {'met':>6} {'BE':>6}"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting and "error" not in row]
        if not mine:
            continue
        p50, p99, met, be = (
            np.array([row[name] for row in mine]) for name in ("p50_over_solo", "p99_over_solo", "attained", "be")
        )
        lines.append(
            f"{setting:58} {len(mine):3} {np.median(p50):5.2f} {np.median(p99):5.2f} {p99.max():6.2f} {met.min():6.1%} "
            f"{np.exp(np.log(np.maximum(be, 1e-3)).mean()):6.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget-s", type=float, default=90.0, help="from the start, loading and all")
    parser.add_argument("--run-s", type=float, default=1.0)
    parser.add_argument("--settings", help="instead of those here, with semicolons")
    parser.add_argument("--cells", help="instead of those here, with semicolons: LS model:BE model:share of capacity")
    options = parser.parse_args()
    until = time.monotonic() + options.budget_s
    settings = tuple(options.settings.split(";")) if options.settings else SETTINGS
    cells = CELLS
    if options.cells:
        cells = tuple((ls, be, float(load)) for ls, be, load in (cell.split(":") for cell in options.cells.split(";")))
    models = {name: kind for ls, be, _ in cells for name, kind in ((ls, "LS"), (be, "BE"))}
    loaded = [
        tenant(model, kind, {"kind": "closed"}).model_dump(by_alias=True, mode="json") for model, kind in models.items()
    ]
    scenario = Scenario.model_validate(
        {"duration_s": 1.0, "device": options.device, "policies": ["missile"], "tenant": loaded}
    )
    with open_testbed(scenario) as testbed:
        testbed.prepare(scenario.tenants, settings)
        session = Session(testbed, options.run_s, until)
        print(f"loaded, {session.left():.0f} s left", flush=True)
        seed = 0
        while session.left() > 5.0 * options.run_s:
            seed += 1
            for ls, be, load in cells:
                session.cell(ls, be, load, settings, seed)
            result = {
                "environment": describe_environment(testbed.info),
                "capacity": session.capacity,
                "run_s": options.run_s,
                "rows": session.rows,
            }
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "settings.json.gz").write_bytes(gzip.compress(json.dumps(result).encode(), 6))
    print(
        f"\n{'simulated ' if testbed.info.simulated else ''}{testbed.info.name}, {seed} rounds\n{table(session.rows)}"
    )


if __name__ == "__main__":
    main()
