"""Results of pcie.py, whole or in parts, as text: python3 benchmarks/gpu/pcie_show.py results.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def show_all(out: dict[str, Any]) -> None:
    """What was measured, in short."""
    for run in out.get("runs", []):
        print("run", run["created"], "seconds", run["seconds"], "raw", run["raw"])
    if "report" in out:
        _show_report(out["report"])
    for name in ("shares", "throughput", "idle", "minimums", "cold models"):
        if name in out:
            print(name, json.dumps(out[name]))
    for name, row in out.get("latencies", {}).items():
        print(latency_line(name, row))
    for name, rows in out.get("urgent", {}).items():
        for row in rows:
            print(latency_line(name, row))
    if "took_s" in out.get("mix", {}):
        show_mix(out["mix"])


def latency_line(name: str, row: dict[str, Any]) -> str:
    """p50, p99 and p99.9 of each tenant, us."""
    if "latency" not in row:
        return f"{name} {row}"
    cells = [
        f"{tenant} {found['p50_us']} {found['p99_us']} {found['p999_us']}" for tenant, found in row["latency"].items()
    ]
    return f"{name:36} {' | '.join(cells)} | {row['bytes_per_s'] / 1e9:.1f} GB/s, {row['unfinished']}"


def _show_report(report: dict[str, Any]) -> None:
    both = {str(key): round(value / 1e9, 2) for key, value in report["link"]["both"].items()}
    print(f"chosen {report['chosen']}\nboth raw {both}")
    rows = {"alone": report["alone"], **report["compared"], "missile to host": report["to_host"]}
    rows |= {f"loop in C, {name}": row for name, row in report["native_source"].items()}
    for name, row in rows.items():
        print(latency_line(name, row))
    print("shares", {case: (found["worst"], found["jain"]) for case, found in report["shares"].items()})


def show_mix(found: dict[str, Any]) -> None:
    """Every tenant under every policy that was run."""
    print("  seconds", found["took_s"], "left out", found.get("left_out"), "errors", found.get("errors"))
    for policy, tenants in found.items():
        if policy in ("took_s", "errors") or not isinstance(tenants, dict):
            continue
        for name, row in tenants.items():
            latency, cold = row["latency"], row.get("cold")
            print(
                f"  {policy:28} {name:8} {row['per_s']:8.1f}/s p50 {latency['p50_us']} p99 {latency['p99_us']} us, "
                f"{row['unfinished']} unfinished, {row['refused']} refused"
                + (f", cold {cold['median_ms']} of {cold['ideal_ms']:.1f} ms, worst {cold['worst_ms']}" if cold else "")
            )


if __name__ == "__main__":
    show_all(json.loads(Path(sys.argv[1]).read_text()))
