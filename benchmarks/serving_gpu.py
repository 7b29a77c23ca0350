"""Isolation through the server on a GPU: an LS tenant over HTTP, alone and beside a BE tenant that always has work.

    python benchmarks/serving_gpu.py -o benchmarks/results/serving-gpu-NAME

With several policies it ends with a table of them: what LS clients waited alone and beside BE, whether `--slo-ms` held, BE
items/s, how often BE was preempted and how long it ran beside LS requests. In about 12 s a setting once code is there:

    python benchmarks/serving_gpu.py -o OUT --rate 900 --slo-ms 3 --seconds 3 --most-seconds 45 \
        --settings "missile;missile:lend=0.3,ls_share=0.25;missile:lend=0.45,ls_share=0.25"

For each setting, in their order, it starts `missile serve`, sends the LS tenant's requests on a Poisson schedule (inputs by
system shared memory, outputs as binary data), alone and beside a closed loop of whole BE batches, and reports what clients
saw and where the time went. A setting is a policy, or one with `+colors` (disjoint colors for both, of the map `--map`) or
`+hosted` (the BE tenant's weights on the host). The setting `bench` runs the same tenants, arrivals of the same
rate, under `missile bench` with the plain policies among the settings; with it comes a verdict: whether LS beside BE through
the server is within 5% of the bench's, plus what the server costs alone. Results are written after every setting. Packages
are taken from the cache, or `--ls` and `--be` name directories; what is missing is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from serving_client import Flow, drive, http_request, tensor
from serving_setup import Address, Setup, parser, server_state, server_table, shared_memory, write_results

from missile.gpu import open_gpu

TENANTS = """
[[tenant]]
name = "ls"
model = "{ls}"
class = "LS"
slo_ms = {slo_ms}
{ls_lines}
[[tenant]]
name = "be"
model = "{be}"
class = "BE"
batch = {{max = {be_batch}}}
{be_lines}
"""

LS_COLORS, BE_COLORS = [0, 2, 5], [1, 3, 4]  # halves that split nearly every pair of granules of an H200
SWAP_MIB = 256

SCENARIO = """
name = "serving"
device = "{device}"
seed = 1
duration_s = {seconds}
warmup_s = 0.4
repeats = 1
policies = [{policies}]

[[tenant]]
name = "ls"
class = "LS"
model = "{ls}"
batch = 1
slo_ms = {slo_ms}
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


def configuration(arguments: argparse.Namespace, setting: str) -> str:
    policy, _, variant = setting.partition("+")
    lines, server = {"ls_lines": "", "be_lines": ""}, {}
    if variant == "colors":
        lines |= {"ls_lines": f"colors = {LS_COLORS}", "be_lines": f"colors = {BE_COLORS}"}
        if arguments.map:
            server["channel_map"] = str(arguments.map.resolve())
    elif variant == "hosted":
        lines["be_lines"], server["swap_mib"] = 'residency = "host"', SWAP_MIB
    elif variant:
        raise SystemExit(f"{setting}: there is no variant {variant!r}; known are colors and hosted.")
    table = server_table(device=arguments.device, policy=policy, **server)
    return table + TENANTS.format(**vars(arguments), **lines)


def measure(arguments: argparse.Namespace, setting: str, setup: Setup) -> dict[str, object]:
    entry: dict[str, object] = {"setting": setting}
    begun = time.monotonic()
    with ExitStack() as stack:
        address = stack.enter_context(setup.served(configuration(arguments, setting), name=setting))
        entry["start_s"] = round(time.monotonic() - begun, 2)
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
            entry[name] = {"ls": flows[0].result(), "met": met(flows[0], arguments.slo_ms)}
            if beside:
                entry[name]["be"] = flows[1].result()  # type: ignore[index]
                entry[name]["be_items_per_s"] = len(flows[1].client_ms) * arguments.be_batch / took  # type: ignore[index]
            shown = "  ".join(
                f"{part} {flows[0].result()[part]['p50_ms']:.3f}/{flows[0].result()[part]['p99_ms']:.3f}"  # type: ignore[index]
                for part in ("client", "front", "queue", "copy", "execute", "outside")
            )
            rate = f"  BE {len(flows[1].client_ms) * arguments.be_batch / took:.0f} items/s" if beside else ""
            print(f"{setting:14} {name:6} LS p50/p99 ms: {shown}  errors {flows[0].errors}{rate}", flush=True)
            entry[name]["state"] = granted(address)  # type: ignore[index]
        if any(flow.errors for flow in flows):
            print(setup.log(setting)[-2000:], flush=True)
        inside = {k: v["p50_ms"] for k, v in flows[1].result().items() if isinstance(v, dict)}
        print(f"{setting:14} BE p50 ms: {inside}; started in {entry['start_s']} s", flush=True)
    entry["log"] = [line for line in setup.log(setting).splitlines() if "tenant" in line][-12:]
    return entry


def met(flow: Flow, slo_ms: float) -> float:
    """Share of all requests that were answered, in time for the client."""
    return sum(ms <= slo_ms for ms in flow.client_ms) / max(flow.sent, 1)


def table(runs: Sequence[dict[str, Any]], slo_ms: float) -> str:
    titles = {"alone p50/p99": 14, "beside p50/p99": 14, "met": 6, "BE/s": 7, "preempted": 9, "lent s": 7}
    lines = [" ".join([f"{'LS ms, clients':36}", *(f"{title:>{width}}" for title, width in titles.items())])]
    for run in runs:
        if "beside" not in run:
            continue
        alone, beside = run["alone"]["ls"]["client"], run["beside"]["ls"]["client"]
        before, after = run["alone"]["state"]["be"], run["beside"]["state"]["be"]
        counts = [f"{after[k] - before.get(k, 0):.3g}" if k in after else "-" for k in ("preemptions", "lent_seconds")]
        lines.append(
            f"{run['setting']:36} {alone['p50_ms']:6.2f} /{alone['p99_ms']:6.2f} {beside['p50_ms']:6.2f} "
            f"/{beside['p99_ms']:6.2f} {run['beside']['met']:6.1%} {run['beside']['be_items_per_s']:7.0f} "
            f"{counts[0]:>9} {counts[1]:>7}"
        )
    return "\n".join([*lines, f"met: of requests sent beside BE, answered within {slo_ms:g} ms"])


def granted(address: Address) -> dict[str, object]:
    """What the server says it has granted its tenants, and what they used."""
    tenants = server_state(address)["tenants"]
    return {tenant["name"]: {k: v for k, v in tenant.get("granted", {}).items() if v is not None} for tenant in tenants}


def named(settings: str) -> list[str]:
    """Single settings: between semicolons where there is one or a policy has options, else between commas."""
    return settings.split(";") if ";" in settings or ":" in settings else settings.split(",")


def bench(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The same tenants under `missile bench`: p50 and p99 of LS, ms, alone and under each policy."""
    plain = [setting for setting in named(arguments.settings) if "+" not in setting and setting != "bench"]
    policies = ", ".join(f'"{policy}"' for policy in dict.fromkeys(plain))
    device = "sim:h100" if arguments.device == "cpu" else arguments.device
    values = {**vars(arguments), "policies": policies, "device": device}
    (folder / "scenario.toml").write_text(SCENARIO.format(**values))
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


def verdicts(result: dict[str, Any]) -> list[dict[str, object]]:
    """Each plain policy's LS p99 beside BE through the server, and what it may be: 1.05 times the bench's, plus what the
    server costs alone (its p99 less the bench's; client and loopback are in it).

    with_front_ms: 1.05 times the bench's, plus the front end's own p99 beside BE.
    """
    summary = result.get("bench", {}).get("summary")
    if not summary:
        return []
    alone = _value(summary["solo_ls"][0]["p99"])
    benched = {entry["policy"]: _value(entry["ls"][0]["p99"]) for entry in summary["policies"]}
    found: list[dict[str, object]] = []
    for run in result["runs"]:
        policy = run["setting"]
        there = benched.get(policy)
        if alone is None or there is None or "beside" not in run:
            continue  # the bench gives no p99 of few requests
        served_alone, beside = (run[when]["ls"]["client"]["p99_ms"] for when in ("alone", "beside"))
        front = run["beside"]["ls"]["front"]["p99_ms"]
        bound, strict = 1.05 * there + max(0.0, served_alone - alone), 1.05 * there + front
        entry = {
            "p99_ms": beside,
            "bench_p99_ms": there,
            "bound_ms": round(bound, 4),
            "with_front_ms": round(strict, 4),
        }
        found.append({"policy": policy, **entry, "alone_ms": served_alone, "bench_alone_ms": alone})
    return found


def show(found: list[dict[str, object]]) -> None:
    for one in found:
        print(
            "{policy}: LS p99 beside BE {p99_ms:.3f} ms through the server, {bench_p99_ms:.3f} in the bench; alone "
            "{alone_ms:.3f} and {bench_alone_ms:.3f}: at most {bound_ms:.3f} ms for what the server costs alone, "
            "{with_front_ms:.3f} for the front end's own p99".format(**one),  # type: ignore[str-format]
            flush=True,
        )


def _value(spread: dict[str, float] | None) -> float | None:
    """The percentile of a bench's entry, ms, without its bounds."""
    return None if spread is None else spread["value"]


def main() -> None:
    options = parser(__doc__, seconds=5.0, of="each load")
    options.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try the benchmark itself")
    options.add_argument("--settings", default="missile,bench,priority,partition", help="with commas, or semicolons")
    options.add_argument("--slo-ms", type=float, default=20.0, help="the LS tenant's; what `lend` of missile goes by")
    options.add_argument("--map", type=Path, help="the GPU's channel map, for +colors")
    options.add_argument("--ls", default="resnet34")
    options.add_argument("--be", default="densenet161")
    options.add_argument("--be-batch", type=int, default=32)
    options.add_argument("--be-outstanding", type=int, default=3)
    options.add_argument("--rate", type=float, default=300.0)
    options.add_argument("--most-seconds", type=float, default=1e9, help="start no setting later than this")
    arguments = options.parse_args()
    result: dict[str, object] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "note": arguments.note}
    if arguments.device != "cpu":
        with open_gpu(arguments.device) as gpu:
            result["machine"] = {"gpu": gpu.info.name, "driver": gpu.info.driver, "runtime": gpu.info.runtime}
    failure = None
    begun = time.monotonic()
    runs: list[dict[str, object]] = []
    result["runs"] = runs
    with tempfile.TemporaryDirectory() as folder:
        for setting in named(arguments.settings):
            if time.monotonic() - begun > arguments.most_seconds:
                print(f"{setting}: no time is left", flush=True)
                continue
            try:
                if setting == "bench":
                    result["bench"] = bench(arguments, Path(folder))
                else:
                    runs.append(measure(arguments, setting, Setup(Path(folder), arguments.server_cores)))
            except (SystemExit, OSError) as error:  # one setting that fails leaves the others' numbers
                failure = error
                print(setting, error, flush=True)
            result["verdicts"] = verdicts(result)
            write_results(arguments.output, result)
    show(verdicts(result))
    if len(runs) > 1:
        print(f"\n{table(runs, arguments.slo_ms)}")
    if failure is not None:
        raise failure


if __name__ == "__main__":
    main()
