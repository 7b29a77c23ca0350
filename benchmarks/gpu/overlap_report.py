"""Tables of what `overlap_tune.py` measured.

python3 benchmarks/gpu/overlap_report.py OUT/overlap2.json > tuned.md
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

GOAL = 1.15  # time beside a neighbour over time alone with the same share
Row = dict[str, Any]


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    return math.exp(fmean(map(math.log, values)))


def medians(times: Row) -> dict[str, float]:
    return {name: row["median_ns"] for name, row in times.items() if isinstance(row, dict)}


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def choices(tuned: Row) -> list[str]:
    """The objectives that places were found for: `beside` only where there were BE models."""
    return [
        name for name in ("alone", "beside") if all(name in row["times"] for m in tuned.values() for row in m.values())
    ]


def alone(tuned: Row) -> list[str]:
    """Alone on the whole GPU, over the plain plan launched one after another."""
    lines = []
    found = choices(tuned)
    for memory, first in (("plain", "plain"), ("colored", "colored")):
        rows, all_ratios = [], []
        for model, row in tuned[memory].items():
            base = medians(tuned["plain"][model]["times"])
            times = medians(row["times"])
            over = times["alone"] / base["alone"]
            ratios = [times[name] / base["plain"] for name in (first, "late", *found)] + [over]
            all_ratios.append(ratios)
            places = "/".join(str(len(names)) for names in row["choices"]["alone"].values())
            rows.append([model, f"{times['alone'] / 1e3:.1f}", *(f"{ratio:.3f}" for ratio in ratios), places])
        means = [mean(column) for column in zip(*all_ratios, strict=True)]
        rows.append(["geometric mean", "", *(f"{value:.3f}" for value in means), ""])
        head = ["", "`alone`, us", "one after another", "`LATE`", *(f"`{name}`" for name in found)]
        lines += [f"**Alone on the whole GPU, {memory} memory, over plain launches one after another**", ""]
        lines += table([*head, "`alone` over plain `alone`", "start/late/never in `alone`"], rows)
    return lines


def beside(result: Row, memory: str, sms: str) -> list[str]:
    first = "plain" if memory == "plain" else "colored"
    cells = result["beside"][memory][sms]
    free = {model: medians(times) for model, times in cells["nothing"]["victims"].items()}
    whole = {model: medians(row["times"])["plain"] for model, row in result["tuned"]["plain"].items()}
    own, over, count = [], [], []
    found = choices(result["tuned"])
    order = " > ".join(["one after another", *(f"`{name}`" for name in found)])
    for neighbour, cell in cells.items():
        times = {model: medians(row) for model, row in cell["victims"].items()}
        codes = (first, *found)
        ratios = {model: [t[code] / free[model][code] for code in codes] for model, t in times.items()}
        if neighbour != "nothing":
            own.append([neighbour, *(" > ".join(f"{r:.2f}" for r in row) for row in ratios.values())])
            count.append((neighbour.startswith("synthetic"), [row[1] for row in ratios.values()]))
        rates = [
            v["neighbour_per_s"] * cell["neighbour_alone_ns"] / 1e9
            for v in cell["victims"].values()
            if neighbour != "nothing"
        ]
        kept = f"{min(rates):.2f} to {max(rates):.2f}" if rates else ""
        over.append([neighbour, *(" > ".join(f"{t[c] / whole[m]:.2f}" for c in codes) for m, t in times.items()), kept])
    real = [ratio for synthetic, ratios in count if not synthetic for ratio in ratios]
    met = sum(ratio <= GOAL for ratio in real)
    title = f"{memory} memory, {sms} SMs"
    lines = [
        f"**{title}: LS time over the same code alone on the same SMs**, {order}",
        "",
    ]
    lines += table(["beside", *free], own)
    if real:
        lines += [f"With `alone`, {met} of {len(real)} pairs with BE models are at most {GOAL}.", ""]
    lines += [
        f"**{title}: LS time over plain launches one after another, alone on the whole GPU**; BE rate over alone on its SMs",
        "",
    ]
    return lines + table(["beside", *free, "BE keeps"], over)


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text())
    print("# Launches that overlap, places found kernel by kernel: all tables\n")
    print(
        f"Made by `benchmarks/gpu/overlap_report.py` from `{Path(sys.argv[1]).name}`. One NVIDIA H200, stand-in weights.\n"
    )
    lines = alone(result["tuned"])
    for memory in ("plain", "colored"):
        for sms in result["beside"][memory]:
            lines += beside(result, memory, sms)
    races = result["races"].values()
    print("\n".join(lines))
    runs, wrong = (sum(race[key] for race in races) for key in ("runs", "wrong"))
    near = any("densenet161" in cells for cells in result["beside"]["plain"].values())
    print(f"**Races**: {runs} runs {'beside densenet161' if near else 'alone'}, {wrong} wrong outputs.")


if __name__ == "__main__":
    main()
