"""The serving engine on a GPU, without its front end: what a request takes from the ring to its answer.

    python benchmarks/serving_gpu.py -o benchmarks/results/serving-gpu-NAME

Checks the outputs against eager PyTorch, then drives an LS tenant (Poisson arrivals) alone and beside a BE tenant that
always has a request waiting, under each policy the server offers. Needs no network and none of the serving extra.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from missile.gpu import open_gpu
from missile.serving.config import parse_config
from missile.serving.link import Answer, CallKind, Link, Outcome
from missile.serving.tensors import BlockLayout, ModelSignature

TENANTS = """
[[tenant]]
name = "ls"
model = "{ls}"
class = "LS"
slo_ms = 20

[[tenant]]
name = "be"
model = "{be}"
class = "BE"
batch = {{max = {batch}}}
"""


class Bench:
    """The front end's side of a link to an engine process."""

    def __init__(self, device: str, policy: str, tenants: str) -> None:
        self.link, theirs = Link.create(512 << 20)
        bells = (self.link.call_bell.descriptor, self.link.answer_bell.descriptor)
        descriptors = (self.link.memory_fd, *bells, theirs.fileno())
        command = [sys.executable, "-m", "missile.serving.engine", *map(str, descriptors)]
        with theirs:
            self.process = subprocess.Popen(command, pass_fds=descriptors)
        hello = {
            "device": device,
            "policy": policy,
            "ls_share": 0.25,
            "cpu_threads": 1,
            "spin_us": 100,
            "watchdog_s": 60,
        }
        hello["folder"] = str(Path.cwd())
        self.link.control.send(hello)
        ready = self.link.control.receive()
        if ready is None or ready["op"] != "ready":
            raise SystemExit((ready or {"error": "the engine ended"})["error"])
        self.signatures: dict[int, ModelSignature] = {}
        for slot, tenant in enumerate(parse_config(tenants).tenants, start=1):
            self.link.control.send({"op": "load", "slot": slot, "tenant": tenant.model_dump(by_alias=True)})
            while (message := self.link.control.receive() or {"op": "failed", "error": "gone"})["op"] == "facts":
                pass
            if message["op"] != "loaded":
                self.process.kill()
                raise SystemExit(message["error"])
            self.signatures[slot] = ModelSignature.from_json(message["signature"])
        self.sent = 0

    def call(self, slot: int, batch: int, offset: int) -> int:
        self.sent += 1
        self.link.calls.push(CallKind.INFER, slot, self.sent, batch, offset, 0, time.monotonic_ns(), 0)
        self.link.call_bell.ring()
        return self.sent

    def answers(self) -> list[Answer]:
        found = []
        while (fields := self.link.answers.pop()) is not None:
            found.append(Answer._make(fields))
        return found

    def one(self, slot: int, batch: int, offset: int) -> Answer:
        self.call(slot, batch, offset)
        while not (found := self.answers()):
            time.sleep(0)
        return found[0]

    def stop(self) -> None:
        self.link.control.send({"op": "stop"})
        self.process.wait(30)


def check(bench: Bench, slot: int, model: str, batch: int) -> float:
    """Relative error of the served outputs against eager PyTorch."""
    import torch

    from missile.workloads.models import build_model

    signature = bench.signatures[slot]
    layout = BlockLayout.of(signature, batch)
    built = build_model(model, batch, device="cuda")
    given = [tensor.contiguous() for tensor in built.inputs]
    for start, tensor in zip(layout.inputs, given, strict=True):
        raw = tensor.cpu().numpy().tobytes()
        bench.link.arena[start : start + len(raw)] = raw
    answer = bench.one(slot, batch, 0)
    if answer.outcome != Outcome.DONE:
        raise SystemExit(f"{model}: outcome {Outcome(answer.outcome).name}")
    expected = built.run().float().cpu().numpy()
    raw = bytes(bench.link.arena[layout.outputs[0] : layout.outputs[0] + layout.output_sizes[0]])
    ours = np.frombuffer(raw, np.float16).astype(np.float32).reshape(expected.shape)
    del built
    torch.cuda.empty_cache()
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def drive(bench: Bench, rate: float, seconds: float, be_batch: int) -> dict[str, float]:
    """LS Poisson at `rate`; BE, when `be_batch`, with two requests always outstanding. Latencies in ms."""
    chance = np.random.default_rng(1)
    arrivals = np.cumsum(chance.exponential(1e9 / rate, int(rate * seconds))).astype(np.int64)
    be_offset, ls_offset = 64 << 20, 8 << 20
    outstanding: dict[int, int] = {}
    be: set[int] = set()
    latencies: list[float] = []
    parts: list[tuple[float, float, float]] = []
    done_be = 0
    for _ in range(2 if be_batch else 0):
        be.add(bench.call(2, be_batch, be_offset))
    start = time.monotonic_ns()
    due = 0
    while due < len(arrivals) or outstanding:
        if not due % 64 and bench.process.poll() is not None:
            raise SystemExit("the engine ended")
        now = time.monotonic_ns() - start
        while due < len(arrivals) and arrivals[due] <= now:
            outstanding[bench.call(1, 1, ls_offset + (due % 32) * (1 << 20))] = int(arrivals[due])
            due += 1
        for answer in bench.answers():
            if answer.outcome != Outcome.DONE:
                raise SystemExit(f"outcome {Outcome(answer.outcome).name}")
            if answer.id in be:
                be.discard(answer.id)
                done_be += be_batch
                if due < len(arrivals):
                    be.add(bench.call(2, be_batch, be_offset))
            else:
                latencies.append((time.monotonic_ns() - start - outstanding.pop(answer.id)) / 1e6)
                copies = answer.copy_in_ns + answer.copy_out_ns
                parts.append((answer.queue_ns / 1e6, copies / 1e6, answer.execute_ns / 1e6))
    took = (time.monotonic_ns() - start) / 1e9
    while be:
        be -= {answer.id for answer in bench.answers()}
    queue, copy, execute = np.median(parts, axis=0)
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "ls_requests": len(latencies), "ls_p50_ms": float(p50), "ls_p99_ms": float(p99), "queue_p50_ms": float(queue),
        "copy_p50_ms": float(copy), "execute_p50_ms": float(execute), "be_items_per_s": done_be / took,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--ls", default="squeezenet1_1")
    parser.add_argument("--be", default="resnet34")
    parser.add_argument("--be-batch", type=int, default=1)
    parser.add_argument("--rate", type=float, default=300.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    tenants = TENANTS.format(ls=arguments.ls, be=arguments.be, batch=arguments.be_batch)
    found = []
    for policy in ("priority", "partition"):
        bench = Bench(arguments.device, policy, tenants)
        entry: dict[str, object] = {"policy": policy, "ls": arguments.ls, "be": arguments.be, "rate": arguments.rate}
        entry["relative_error"] = {
            "ls": check(bench, 1, arguments.ls, 1),
            "be": check(bench, 2, arguments.be, arguments.be_batch),
        }
        for name, batch in (("alone", 0), ("beside", arguments.be_batch)):
            drive(bench, arguments.rate, 0.5, batch)
            entry[name] = drive(bench, arguments.rate, arguments.seconds, batch)
            print(policy, name, {k: round(v, 3) for k, v in entry[name].items()}, flush=True)  # type: ignore[attr-defined]
        print(policy, "relative error", entry["relative_error"], flush=True)
        bench.stop()
        found.append(entry)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        gpu = open_gpu(arguments.device)
        about = {"gpu": gpu.info.name, "driver": gpu.info.driver, "runtime": gpu.info.runtime}
        gpu.close()
        (arguments.output / "results.json").write_text(json.dumps({"machine": about, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
