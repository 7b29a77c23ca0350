"""The simulator's contention against what it was set by: models in closed loops on split SMs, simulated over measured.

    python benchmarks/simulator_sharing.py --device sim:h200

Reads `benchmarks/results/overlap-h200/tuned.json`. Prints a Markdown table: what each neighbour costs a model, over the
model alone on its SMs, geometric means over models of simulated over measured. Needs no GPU; half a minute.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np

from missile.bench.beside import Pair, service_ns

MEASURED = Path(__file__).parent / "results" / "overlap-h200" / "tuned.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="sim:h200")
    device = parser.parse_args().device
    data = json.loads(MEASURED.read_text(encoding="utf-8"))
    beside, alone = data["beside"]["plain"], data["tuned"]["plain"]

    @cache
    def simulated(pair: Pair) -> float:
        return service_ns(pair, device)

    print(
        "| SMs | launches | alone, over the whole GPU | " + " | ".join(n for n in beside["32"] if n != "nothing") + " |"
    )
    print("| --- " * 2 + "| ---: " * len(beside["32"]) + "|")
    logs: list[float] = []
    for sms, rows in beside.items():
        for code, overlaps in (("plain", False), ("alone", True)):
            cells = []
            for neighbour, cell in rows.items():
                ratios = []
                for model, times in cell["victims"].items():
                    if neighbour == "nothing":
                        base, base_sms = alone[model]["times"][code], 0
                    else:
                        base, base_sms = rows["nothing"]["victims"][model][code], int(sms)
                    there = times[code]["median_ns"] / base["median_ns"]
                    other = "" if neighbour == "nothing" else neighbour
                    here = simulated(Pair(model, other, int(sms), overlaps))
                    here /= simulated(Pair(model, "", base_sms, overlaps))
                    ratios.append(float(np.log(here / there)))
                logs += ratios
                cells.append(f"{np.exp(np.mean(ratios)):.2f}")
            print(
                f"| {sms} | {'overlap' if overlaps else 'one after another'} | " + " | ".join(cells) + " |", flush=True
            )
    close = np.mean(np.abs(logs) <= np.log(1.2))
    rms = np.exp(np.sqrt(np.mean(np.square(logs))))
    print(f"\nOf {len(logs)} ratios of single models {close:.0%} are within 20%; rms factor {rms:.2f}.")


if __name__ == "__main__":
    main()
