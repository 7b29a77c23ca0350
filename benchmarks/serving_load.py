"""Load on a served model over loopback, and what the front end adds to each request.

    python benchmarks/serving_load.py -o benchmarks/results/serving-NAME

Starts `missile serve` with two tenants whose models do nothing (PyTorch on the CPU, one thread) and drives it from this
process, open loop: requests leave on a fixed schedule whether or not answers have come, so that a stall is seen. For each
case it reports

- `client`: scheduled send time to the whole answer read, ms, as a client sees it;
- `front`: what the server says of itself (Server-Timing): first bytes read to the engine's ring, and the engine's answer to
  the response's bytes, ms. This is the front-end overhead;
- `outside`: client time less the engine's own (queue, copy, execute), ms: front end, kernel, and this client together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import uvloop

VALUES = 153_600  # float32: 600 KiB

CONFIG = """
[server]
http_port = 0
grpc_port = 0
device = "cpu"
cpu_threads = 1

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

MODELS = """
import torch

class Summary(torch.nn.Module):
    def forward(self, x):
        return x[:, :8]

def summary(batch, size):
    return Summary(), torch.zeros(1, size)

def identity(batch):
    return torch.nn.Identity(), torch.zeros(1, 16)
"""

_TIMING = re.compile(rb"(front|queue|copy|execute);dur=([0-9.]+)")
_LENGTH = re.compile(rb"content-length: (\d+)")


@dataclass
class Case:
    """One load. `request` is the whole HTTP request."""

    name: str
    rate: float
    seconds: float
    connections: int
    request: bytes
    client_ms: list[float] = field(default_factory=list)
    front_ms: list[float] = field(default_factory=list)
    outside_ms: list[float] = field(default_factory=list)
    errors: int = 0


class Connection(asyncio.Protocol):
    """Requests of one connection, one at a time; those that can't leave yet wait here."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.waiting: deque[float] = deque()
        self.sent_at: float | None = None
        self.received = bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, scheduled: float) -> None:
        self.waiting.append(scheduled)
        if self.sent_at is None:
            self._next()

    def _next(self) -> None:
        self.sent_at = self.waiting.popleft() if self.waiting else None
        if self.sent_at is not None and self.transport is not None:
            self.transport.write(self.case.request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.received[:end])
        if len(self.received) < end + 4 + int(_LENGTH.search(head)[1]):  # type: ignore[index]
            return
        took = (time.perf_counter() - self.sent_at) * 1000.0 if self.sent_at is not None else 0.0
        self.received.clear()
        if head.startswith(b"HTTP/1.1 200"):
            timing = {name: float(value) for name, value in _TIMING.findall(head)}
            self.case.client_ms.append(took)
            self.case.front_ms.append(timing[b"front"])
            self.case.outside_ms.append(took - timing[b"queue"] - timing[b"copy"] - timing[b"execute"])
        else:
            self.case.errors += 1
        self._next()

    @property
    def idle(self) -> bool:
        return self.sent_at is None


async def drive(case: Case, host: str, port: int) -> dict[str, object]:
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(lambda: Connection(case), host, port))[1] for _ in range(case.connections)
    ]
    total = int(case.rate * case.seconds)
    start = time.perf_counter() + 0.05
    for index in range(total):
        due = start + index / case.rate
        while (left := due - time.perf_counter()) > 0:
            await asyncio.sleep(left if left > 0.001 else 0)
        free = next((c for c in connections if c.idle), None)
        (free or connections[index % len(connections)]).send(due)
        if index % 64 == 0:
            await asyncio.sleep(0)
    give_up = time.perf_counter() + 10
    while not all(c.idle for c in connections) and time.perf_counter() < give_up:
        await asyncio.sleep(0.01)
    took = time.perf_counter() - start
    for connection in connections:
        if connection.transport is not None:
            connection.transport.close()
    warm = len(case.client_ms) // 10
    return {
        "case": case.name,
        "asked_per_s": case.rate,
        "answered_per_s": round(len(case.client_ms) / took, 1),
        "answered": len(case.client_ms),
        "errors": case.errors,
        **{
            key: summary(values[warm:])
            for key, values in (("client", case.client_ms), ("front", case.front_ms), ("outside", case.outside_ms))
        },
    }


def summary(values: list[float]) -> dict[str, float]:
    names = ("p50_ms", "p90_ms", "p99_ms", "p99.9_ms", "max_ms")
    found = np.percentile(values, [50, 90, 99, 99.9, 100]) if values else np.full(5, np.nan)
    return {name: round(float(value), 4) for name, value in zip(names, found, strict=True)}


def http_request(model: str, head: dict[str, object], tail: bytes = b"") -> bytes:
    body = json.dumps(head).encode()
    lines = [f"POST /v2/models/{model}/infer HTTP/1.1", "Host: localhost", f"Content-Length: {len(body) + len(tail)}"]
    if tail:
        lines.append(f"Inference-Header-Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body + tail


def tensor(name: str, shape: list[int], **more: object) -> dict[str, object]:
    return {"name": name, "datatype": "FP32", "shape": shape, **more}


def cases(seconds: float, region: str) -> list[Case]:
    values = np.random.default_rng(0).standard_normal(VALUES).astype(np.float32)
    size = values.nbytes
    binary = {
        "inputs": [tensor("input0", [1, VALUES], parameters={"binary_data_size": size})],
        "parameters": {"binary_data_output": True},
    }
    shared = {
        "inputs": [
            tensor("input0", [1, VALUES], parameters={"shared_memory_region": region, "shared_memory_byte_size": size})
        ],
        "parameters": {"binary_data_output": True},
    }
    small = {"inputs": [tensor("input0", [1, 16], data=list(range(16)))]}
    small_binary = {
        "inputs": [tensor("input0", [1, 16], parameters={"binary_data_size": 64})],
        "parameters": {"binary_data_output": True},
    }
    return [
        Case("600 KiB, system shared memory, 500/s", 500, seconds, 8, http_request("big", shared)),
        Case("600 KiB, binary data, 500/s", 500, seconds, 8, http_request("big", binary, values.tobytes())),
        Case(
            "64 B, binary data, 2000/s", 2000, seconds, 16, http_request("small", small_binary, values[:16].tobytes())
        ),
        Case("64 B, JSON, 5000/s", 5000, seconds, 32, http_request("small", small)),
        Case(
            "64 B, binary data, 5000/s", 5000, seconds, 32, http_request("small", small_binary, values[:16].tobytes())
        ),
    ]


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg(),
        **{name: metadata.version(name) for name in ("torch", "uvloop", "httptools", "orjson", "numpy")},
    }


async def run(folder: Path, seconds: float, only: str) -> list[dict[str, object]]:
    (folder / "load_models.py").write_text(MODELS)
    (folder / "serve.toml").write_text(CONFIG)
    command = [
        sys.executable,
        "-c",
        "import sys; from missile.cli import main; sys.exit(main())",
        "serve",
        str(folder / "serve.toml"),
        "--json",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    name = f"missile-load-{os.getpid()}"
    path = Path("/dev/shm") / name
    try:
        ready = json.loads(server.stdout.readline())  # type: ignore[union-attr]
        host, _, port = ready["http"].removeprefix("http://").rpartition(":")
        size = VALUES * 4
        path.write_bytes(bytes(size))
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), size):
            await register(host, int(port), name, size)
            found = []
            for case in cases(seconds, name):
                if only and only not in case.name:
                    continue
                result = await drive(case, host, int(port))
                found.append(result)
                front, client, outside = (result[k] for k in ("front", "client", "outside"))
                print(
                    f"{case.name:38} {result['answered_per_s']:>8}/s errors {case.errors}  "
                    f"front p50 {front['p50_ms']:.3f} p99 {front['p99_ms']:.3f}  "  # type: ignore[index]
                    f"outside p50 {outside['p50_ms']:.3f} p99 {outside['p99_ms']:.3f}  "  # type: ignore[index]
                    f"client p50 {client['p50_ms']:.3f} p99 {client['p99_ms']:.3f} ms",  # type: ignore[index]
                    flush=True,
                )
            return found
    finally:
        path.unlink(missing_ok=True)
        server.terminate()
        server.wait(30)


async def register(host: str, port: int, name: str, size: int) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps({"key": name, "byte_size": size}).encode()
    lines = [
        f"POST /v2/systemsharedmemory/region/{name}/register HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    answer = await reader.read()
    if b" 200 " not in answer.splitlines()[0]:
        raise SystemExit(answer.decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="folder for results.json")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each case")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--note", default="", help="kept with the results: what else ran on the machine")
    arguments = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        found = uvloop.run(run(Path(folder), arguments.seconds, arguments.only))
    about["load_average_after"] = os.getloadavg()
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        result = {"machine": about, "note": arguments.note, "seconds": arguments.seconds, "cases": found}
        (arguments.output / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
