"""The results of the benchmark of whole models as lines and tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def line(row: dict[str, Any]) -> str:
    rolled = row.get("rolled", {}).get("ns", {})
    cells = [f"not unrolled, plain {kind} {found['ratio']:.3f}" for kind, found in rolled.items()]
    for name, v in row.get("variants", {}).items():
        if "sums_ns" in v:
            cells.append(f"{name} by way {', '.join(f'{w} {n / 1e3:.0f} us' for w, n in v['sums_ns'].items())}")
            cells.append(f"chosen {', '.join(f'{w} {n}' for w, n in v['chosen'].items())}")
    cells += [
        f"{name} {v['ratio']:.3f} ({v['ratio_kernels']:.3f}){'' if v['same_bits'] else ' WRONG'}"
        if "ratio" in v
        else f"{name} {'same' if v.get('same_bits') else v.get('error', 'WRONG')}"
        for name, v in row.get("variants", {}).items()
    ]
    return f"{row['model']:20s} {row.get('error', '')}" + "; ".join(cells)


def table(result: dict[str, Any], names: Sequence[str]) -> str:
    """The result in Markdown: ratios by model, and by class of kernel."""
    lines = [f"| model | batch | plain, us | {' | '.join(names)} |", "| --- | ---: | ---: |" + " ---: |" * len(names)]
    for row in result["rows"]:
        found = row.get("variants", {})
        plain = next((v["plain_ns"] for v in found.values() if "plain_ns" in v), math.nan)
        cells = [_cell(found.get(name, {})) for name in names]
        lines.append(f"| {row['model']} | {row.get('batch', '')} | {plain / 1e3:.0f} | {' | '.join(cells)} |")
    means = [f"{result['mean'][name]['ratio']:.3f}" for name in names]
    lines += [f"| geometric mean | | | {' | '.join(means)} |", ""]
    kinds = sorted({kind for name in names for kind in result["mean"][name]["classes"]})
    if kinds:
        lines += [f"| class of kernel | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
        for kind in kinds:
            values = [result["mean"][name]["classes"].get(kind, math.nan) for name in names]
            lines.append(f"| {kind} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any]) -> str:
    if "ratio" not in found:
        return "-"
    return f"{found['ratio']:.3f}" + ("" if found["same_bits"] else " WRONG")


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def report(result: dict[str, Any], names: Sequence[str], output: Path) -> None:
    """Geometric means over the models, as a whole and by class of kernel; written to `output` with the rest."""
    result["mean"] = {}
    for name in names:
        rows = [row["variants"][name] for row in result["rows"] if "ratio" in row.get("variants", {}).get(name, {})]
        classes = sorted({kind for row in rows for kind in row["classes"].get("ns", {})})
        by_class = {
            kind: _mean([r["classes"]["ns"][kind]["ratio"] for r in rows if kind in r["classes"].get("ns", {})])
            for kind in classes
        }
        same = [bool(row.get("variants", {}).get(name, {}).get("same_bits")) for row in result["rows"]]
        result["mean"][name] = {"models": len(same), "same_bits": sum(same)}
        if rows:
            result["mean"][name] |= {
                "timed": len(rows),
                "ratio": _mean([row["ratio"] for row in rows]),
                "ratio_kernels": _mean([row["ratio_kernels"] for row in rows]),
                "ratio_early": _mean([row.get("ratio_early", row["ratio"]) for row in rows]),
                "worst": max(row["ratio"] for row in rows),
                "classes": by_class,
            }
    (output / "models.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "models.md").write_text(table(result, [name for name in names if "ratio" in result["mean"][name]]))
