"""Isolation through the server on a GPU: an LS tenant over HTTP, alone and beside a BE tenant that always has work.

    python benchmarks/serving_gpu.py -o benchmarks/results/serving-gpu-NAME

For each policy it starts `missile serve`, sends the LS tenant's requests on a Poisson schedule (inputs by system shared
memory, outputs as binary data), alone and beside a closed loop of whole BE batches, and reports what clients saw and
where the time went. `--bench` runs the same tenants, arrivals of the same rate, under `missile bench`, whose p99 beside
over p99 alone is what the server's should equal. Packages are taken from the cache; what is missing is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from serving_client import Flow, drive, http_request, served, shared_memory, tensor

from missile.gpu import open_gpu

CONFIG = """
[server]
http_port = 0
grpc_port = -1
device = "{device}"
policy = "{policy}"
cpu_threads = 1

[[tenant]]
name = "ls"
model = "{ls}"
class = "LS"
slo_ms = 20

[[tenant]]
name = "be"
model = "{be}"
class = "BE"
batch = {{max = {be_batch}}}
"""

SCENARIO = """
name = "serving"
device = "{device}"
seed = 1
duration_s = {seconds}
warmup_s = 0.25
repeats = 1
policies = [{policies}]

[[tenant]]
name = "ls"
class = "LS"
model = "{ls}"
batch = 1
slo_ms = 20
arrivals = {{ kind = "poisson", rate_per_s = {rate} }}

[[tenant]]
name = "be"
class = "BE"
model = "{be}"
batch = {be_batch}
arrivals = {{ kind = "closed", depth = 2 }}
"""


def image_request(model: str, batch: int, region: str, device: str) -> bytes:
    datatype, size = ("FP32", 4) if device == "cpu" else ("FP16", 2)
    place = {"shared_memory_region": region, "shared_memory_byte_size": batch * 3 * 224 * 224 * size}
    return http_request(
        model,
        {
            "inputs": [tensor("image", [batch, 3, 224, 224], datatype, parameters=place)],
            "parameters": {"binary_data_output": True},
        },
    )


def poisson(rate: float, seconds: float) -> np.ndarray:
    gaps = np.random.default_rng(1).exponential(1.0 / rate, int(rate * seconds * 2) + 16)
    due = np.cumsum(gaps)
    return due[due < seconds]


def measure(arguments: argparse.Namespace, policy: str, folder: Path) -> dict[str, object]:
    values = {**vars(arguments), "policy": policy}
    config = folder / f"{policy}.toml"
    config.write_text(CONFIG.format(**values))
    prefix = ["taskset", "-c", arguments.server_cores] if arguments.server_cores else []
    entry: dict[str, object] = {"policy": policy}
    log = folder / f"{policy}.log"
    with ExitStack() as stack:
        address = stack.enter_context(served(config, log=log, prefix=prefix))
        noise = np.random.default_rng(0).standard_normal(arguments.be_batch * 3 * 224 * 224)
        pixels = noise.astype(np.float32 if arguments.device == "cpu" else np.float16).tobytes()
        names = {who: f"missile-gpu-{os.getpid()}-{who}" for who in ("ls", "be")}
        for name in names.values():
            stack.enter_context(shared_memory(name, pixels, address))
        ls = image_request("ls", 1, names["ls"], arguments.device)
        be = image_request("be", arguments.be_batch, names["be"], arguments.device)
        drive([Flow("warm", ls, poisson(arguments.rate, 0.5)), Flow("warm", be, connections=1)], address, 0.5)
        for name, beside in (("alone", False), ("beside", True)):
            flows = [Flow("LS", ls, poisson(arguments.rate, arguments.seconds))]
            if beside:
                flows.append(Flow("BE", be, connections=arguments.be_outstanding))
            took = drive(flows, address, arguments.seconds)
            entry[name] = {"ls": flows[0].result()}
            if beside:
                entry[name]["be"] = flows[1].result()  # type: ignore[index]
                entry[name]["be_items_per_s"] = len(flows[1].client_ms) * arguments.be_batch / took  # type: ignore[index]
            shown = "  ".join(
                f"{part} {flows[0].result()[part]['p50_ms']:.3f}/{flows[0].result()[part]['p99_ms']:.3f}"  # type: ignore[index]
                for part in ("client", "front", "queue", "copy", "execute")
            )
            rate = f"  BE {len(flows[1].client_ms) * arguments.be_batch / took:.0f} items/s" if beside else ""
            print(f"{policy:10} {name:6} LS p50/p99 ms: {shown}  errors {flows[0].errors}{rate}", flush=True)
        if any(flow.errors for flow in flows):
            print(log.read_text()[-2000:], flush=True)
        inside = {k: v["p50_ms"] for k, v in flows[1].result().items() if isinstance(v, dict)}
        print(f"{policy:10} BE p50 ms: {inside}", flush=True)
    return entry


def bench(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The same tenants under `missile bench`: p50 and p99 of LS, ms, alone and under each policy."""
    policies = ", ".join(f'"{policy}"' for policy in arguments.policies.split(","))
    (folder / "scenario.toml").write_text(SCENARIO.format(**{**vars(arguments), "policies": policies}))
    out = folder / "bench"
    command = [sys.executable, "-m", "missile", "bench", str(folder / "scenario.toml"), "-o", str(out), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        print(ended.stderr[-2000:])
        return {"error": ended.stderr[-500:]}
    found: dict[str, dict[str, list[dict[str, object]]]] = json.loads(ended.stdout)
    summary = found["summary"]
    for name, rows in [("alone", summary["solo_ls"]), *((p["policy"], p["ls"]) for p in summary["policies"])]:
        row = rows[0]  # type: ignore[index]
        print(f"bench {name:10} LS p50 {row['p50']} p99 {row['p99']} ms, service p99 {row['service_p99']}", flush=True)
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try the benchmark itself")
    parser.add_argument("--policies", default="priority,partition")
    parser.add_argument("--ls", default="resnet34")
    parser.add_argument("--be", default="densenet161")
    parser.add_argument("--be-batch", type=int, default=32)
    parser.add_argument("--be-outstanding", type=int, default=3)
    parser.add_argument("--rate", type=float, default=300.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--server-cores", default="", help="the server's processors, as taskset takes them (0,1)")
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--note", default="", help="kept with the results (stand-in weights, say)")
    arguments = parser.parse_args()
    result: dict[str, object] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "note": arguments.note}
    failure = None
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for policy in arguments.policies.split(","):
            try:
                runs.append(measure(arguments, policy, Path(folder)))
            except SystemExit as error:  # one policy that fails leaves the others' numbers
                failure = error
                print(policy, error, flush=True)
        result["runs"] = runs
        if arguments.bench:
            result["bench"] = bench(arguments, Path(folder))
    if arguments.device != "cpu":
        with open_gpu(arguments.device) as gpu:
            result["machine"] = {"gpu": gpu.info.name, "driver": gpu.info.driver, "runtime": gpu.info.runtime}
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    if failure is not None:
        raise failure


if __name__ == "__main__":
    main()
