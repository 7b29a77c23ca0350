"""Load on a served model over loopback, and what the front end adds to each request.

    python benchmarks/serving_load.py -o benchmarks/results/serving-NAME

Starts `missile serve` with two tenants whose models do nothing (PyTorch on the CPU, one thread) and drives it from this
process, open loop: requests leave on a fixed schedule whether or not answers have come, so that a stall is seen. For each
case it reports

- `client`: scheduled send time to the whole answer read, ms, as a client sees it;
- `front`: what the server says of itself (Server-Timing): first bytes read to the engine's ring, and the engine's answer to
  the response's bytes, ms. This is the front-end overhead;
- `outside`: client time less the server's parts, ms: the loopback interface, waking each other, and this client.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from serving_client import Flow, drive, http_request, tensor
from serving_setup import Setup, machine, parser, server_table, shared_memory, write_results

VALUES = 153_600  # float32: 600 KiB

CONFIG = (
    server_table(grpc_port=0)
    + """
[[tenant]]
name = "big"
model = "load_models:summary"
class = "LS"
slo_ms = 50
options = {size = 153600}

[[tenant]]
name = "small"
model = "load_models:identity"
class = "LS"
slo_ms = 50
quota = {queue = 2048}
"""
)

MODELS = {
    "load_models": """
import torch

class Summary(torch.nn.Module):
    def forward(self, x):
        return x[:, :8]

def summary(batch, size):
    return Summary(), torch.zeros(1, size)

def identity(batch):
    return torch.nn.Identity(), torch.zeros(1, 16)
"""
}


@dataclass(frozen=True)
class Case:
    """One load: requests that leave evenly at `rate` per second."""

    name: str
    rate: float
    connections: int
    request: bytes


def cases(region: str) -> list[Case]:
    values = np.random.default_rng(0).standard_normal(VALUES).astype(np.float32)
    size = values.nbytes
    as_binary = {"binary_data_output": True}
    place = {"shared_memory_region": region, "shared_memory_byte_size": size}
    shared = {"inputs": [tensor("input0", [1, VALUES], parameters=place)], "parameters": as_binary}
    binary = {
        "inputs": [tensor("input0", [1, VALUES], parameters={"binary_data_size": size})],
        "parameters": as_binary,
    }
    small = {"inputs": [tensor("input0", [1, 16], data=list(range(16)))]}
    small_binary = {
        "inputs": [tensor("input0", [1, 16], parameters={"binary_data_size": 64})],
        "parameters": as_binary,
    }
    small_raw = http_request("small", small_binary, values[:16].tobytes())
    return [
        Case("600 KiB, system shared memory, 500/s", 500, 8, http_request("big", shared)),
        Case("600 KiB, binary data, 500/s", 500, 8, http_request("big", binary, values.tobytes())),
        Case("64 B, binary data, 2000/s", 2000, 16, small_raw),
        Case("64 B, JSON, 5000/s", 5000, 32, http_request("small", small)),
        Case("64 B, binary data, 5000/s", 5000, 32, small_raw),
    ]


def run(setup: Setup, seconds: float, only: str) -> list[dict[str, object]]:
    name = f"missile-load-{os.getpid()}"
    found = []
    with (
        setup.served(CONFIG, models=MODELS) as address,
        shared_memory(name, bytes(VALUES * 4), address),
    ):
        for case in cases(name):
            if only and only not in case.name:
                continue
            flow = Flow(case.name, case.request, np.arange(case.rate * seconds) / case.rate, case.connections)
            took = drive([flow], address, seconds)
            result = {"case": case.name, "asked_per_s": case.rate, **flow.result()}
            result["answered_per_s"] = round(len(flow.client_ms) / took, 1)
            found.append(result)
            times = "  ".join(
                f"{part} p50 {result[part]['p50_ms']:.3f} p99 {result[part]['p99_ms']:.3f}"  # type: ignore[index]
                for part in ("front", "outside", "client")
            )
            print(f"{case.name:38} {result['answered_per_s']:>8}/s errors {flow.errors}  {times} ms", flush=True)
    return found


def main() -> None:
    options = parser(__doc__, seconds=20.0, of="each case")
    options.add_argument("--only", default="", help="cases whose name contains this")
    arguments = options.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Setup(Path(folder), arguments.server_cores), arguments.seconds, arguments.only)
    about["load_average_after"] = os.getloadavg()
    result = {
        "machine": about,
        "note": arguments.note,
        "server_cores": arguments.server_cores,
        "seconds": arguments.seconds,
        "cases": found,
    }
    write_results(arguments.output, result)


if __name__ == "__main__":
    main()
