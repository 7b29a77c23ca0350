"""Ten times more requests than a tenant can serve, for a while: what is refused, how fast, and how soon all is well again.

    python benchmarks/serving_overload.py -o benchmarks/results/serving-overload-NAME

A model that takes 4 ms (CPU device, LS, SLO 40 ms, at most 32 requests waiting) can do 250 requests/s. It gets 100/s, then
2,500/s, then 100/s again, open loop. It has recovered at the first of twenty requests in a row of which none is refused, or
takes longer than the slowest before the overload; how many later ones do is told beside it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from serving_client import Flow, drive, http_request, summary, tensor
from serving_setup import Setup, parser, server_table, write_results

RATE, OVERLOAD = 100.0, 2500.0
IN_A_ROW = 20

CONFIG = (
    server_table()
    + """
[[tenant]]
name = "slow"
model = "overload_models:slow"
class = "LS"
slo_ms = 40
quota = {queue = 32}
"""
)

MODELS = {
    "overload_models": """
import time, torch

class Slow(torch.nn.Module):
    def forward(self, x):
        time.sleep(0.004)
        return x + 1

def slow(batch):
    return Slow(), torch.zeros(1, 16)
"""
}


def measure(setup: Setup, seconds: float) -> dict[str, object]:
    request = http_request("slow", {"inputs": [tensor("input0", [1, 16], data=[0.0] * 16)]})
    load_before = os.getloadavg()
    with setup.served(CONFIG, models=MODELS) as address:
        phases = [
            Flow("before", request, np.arange(RATE * seconds) / RATE, 8),
            Flow("overload", request, seconds + np.arange(OVERLOAD * seconds) / OVERLOAD, 128, quiet=True),
            Flow("after", request, 2 * seconds + np.arange(RATE * seconds) / RATE, 8),
        ]
        drive(phases, address, 3 * seconds)
    before, overload, after = phases
    bound = summary(before.client_ms)["max_ms"]
    fine = [good and took <= bound for _, took, good in sorted(after.answers)]
    first = next((at for at in range(len(fine) - IN_A_ROW) if all(fine[at : at + IN_A_ROW])), None)
    recovered = None if first is None else round(sorted(after.answers)[first][0] - 2 * seconds, 3)
    refused = [took for _, took, good in overload.answers if not good]
    return {
        "seconds": seconds,
        "load_average": [load_before, os.getloadavg()],
        "before": summary(before.client_ms),
        "answered": len(overload.client_ms),
        "refused": len(refused),
        "refused_after": summary(refused),
        "answered_in": summary(overload.client_ms),
        "after": summary(after.client_ms),
        "refused_later": after.errors,
        "recovered_s": recovered,
        "late_afterwards": None if first is None else fine[first:].count(False),
    }


def main() -> None:
    arguments = parser(__doc__, seconds=5.0, of="each of the three phases").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Setup(Path(folder), arguments.server_cores), arguments.seconds)
    for name, value in result.items():
        print(f"{name:14} {value}")
    write_results(arguments.output, {"note": arguments.note, **result})


if __name__ == "__main__":
    main()
