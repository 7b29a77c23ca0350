"""Preemption of best-effort models on this machine's GPU: how fast, at what cost, and whether results stay the same.

    PYTHONPATH=src python3 benchmarks/gpu/preempt.py -o OUT [--parts flag,overhead,latency,service,bits] [--models NAME ...]

- flag: from the host's call that raises a flag to the GPU's answer, for each way to write it, on an idle GPU, beside a
  model, and beside large copies.
- overhead: whole models with the check in front of every block against the same without, by turns, nothing preempted.
- latency: a model runs at low priority, the flag goes up at a random instant and a probe is launched at high priority. It
  ends when its blocks run on all SMs at once: one with all shared memory and 1024 threads on each ("whole SMs"), or two with
  48 KiB and 128 threads ("parts of SMs"). Its time on an idle GPU is taken off.
- service: a latency-sensitive model at high priority starts at random instants of a best-effort model: its time when that
  one is preempted before it is launched, after it is launched, and not at all.
- bits: requests that are preempted again and again at random instants give the bytes that undisturbed ones give; with the
  variant "colored" in colored memory by a table of a page's frames, with "windows" by pairs, where accesses share lookups.
  1,000 of them over three models, each stopped after 8 s:
  --parts bits --variants windows --models resnet152 bert_large densenet161 --bits-s 8

Models are packages in Missile's cache. OUT gets `preempt.json`. Exits 1 when bytes differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from preempt_bits import bits, spin
from preempt_models import SEGMENT_NS, Loaded, gpu_ns

from missile.compiler.bind import bind
from missile.compiler.library import find_package
from missile.compiler.package import KernelStep
from missile.compiler.preemptible import block_ns, long_blocks
from missile.gpu import open_gpu
from missile.gpu.cuda.gpu import CudaGpu
from missile.gpu.interface import Graph, Launch, PreemptControl, Priority, Stream

MODELS = ("densenet161", "bert_large", "decoder_1b")
AHEAD = ((300_000.0, 2), (100_000.0, 2), (50_000.0, 2))  # a segment's length, ns, and how many are on the GPU
SHORT_NS, LONG_NS = 10_000, 30_000  # of a block: classes of kernels
WATCH = r"""
.version 8.0
.target sm_90
.address_size 64
.visible .entry watch(.param .u64 word, .param .u64 answer, .param .u32 value)
{
	.reg .b64 %rd<3>; .reg .b32 %r<3>; .reg .pred %p<2>;
	ld.param.b64 %rd1, [word];
	ld.param.b64 %rd2, [answer];
	ld.param.b32 %r2, [value];
	st.relaxed.sys.global.b32 [%rd2+4], %r2;
again:
	ld.relaxed.sys.global.b32 %r1, [%rd1];
	setp.ne.u32 %p1, %r1, %r2;
	@%p1 bra again;
	st.relaxed.sys.global.b32 [%rd2], %r2;
	ret;
}
"""
PROBE = r"""
.version 8.0
.target sm_90
.address_size 64
.visible .entry probe(.param .u64 counter, .param .u32 blocks)
{
	.reg .b64 %rd<5>; .reg .b32 %r<6>; .reg .pred %p<3>;
	mov.u32 %r1, %tid.x;
	setp.ne.u32 %p1, %r1, 0;
	@%p1 bra together;
	ld.param.b64 %rd1, [counter];
	ld.param.b32 %r2, [blocks];
	atom.global.add.u32 %r3, [%rd1], 1;
	div.u32 %r3, %r3, %r2;
	add.u32 %r3, %r3, 1;
	mul.lo.u32 %r3, %r3, %r2;
	mov.u64 %rd2, %globaltimer;
again:
	ld.relaxed.gpu.global.b32 %r4, [%rd1];
	mov.u64 %rd3, %globaltimer;
	sub.u64 %rd4, %rd3, %rd2;
	setp.gt.u64 %p2, %rd4, 20000000;
	@%p2 bra together;
	setp.lt.u32 %p2, %r4, %r3;
	@%p2 bra again;
together:
	bar.sync 0;
	ret;
}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--parts", default="flag,overhead,latency,service,bits")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--preemptions", type=int, default=1000, help="of part bits, over all models")
    parser.add_argument("--probes", type=int, default=200, help="of part latency, for each model")
    parser.add_argument(
        "--variants", nargs="*", default=["auto"], help="auto, colored, windows, or LOOK-PLACE of the check"
    )
    parser.add_argument("--urgent", default="resnet34", help="the latency-sensitive model of part service")
    parser.add_argument("--note", default="", help="written into the results")
    parser.add_argument("--bits-s", type=float, default=25.0, help="seconds of part bits at most, for each model")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with open_gpu("cuda:0") as gpu:
        assert isinstance(gpu, CudaGpu)
        results: dict[str, Any] = {"gpu": gpu.info.name, "driver": gpu.info.driver, "note": options.note}
        labels = [
            label
            for part in options.parts.split(",")
            for label in (["flag"] if part == "flag" else [f"{part}/{name}" for name in options.models])
        ]
        for label in labels:
            part, _, name = label.partition("/")
            begin = time.perf_counter()
            try:
                results[label] = flag(gpu, options) if part == "flag" else MEASUREMENTS[part](gpu, name, options)
            except Exception:
                traceback.print_exc()
                results[label] = {"error": traceback.format_exc(limit=1)}
            print(f"{label} ({time.perf_counter() - begin:.1f} s): {json.dumps(_short(results[label]))}", flush=True)
            (options.output / "preempt.json").write_text(json.dumps(results, indent=1))
    lines, right = table(results)
    if lines:
        print(f"\n{results['gpu']}, {', '.join(options.variants)}\n{lines}")
    return 0 if right else 1


def _short(value: Any) -> Any:
    """`value` without raw samples."""
    return {k: _short(v) for k, v in value.items() if k != "raw"} if isinstance(value, dict) else value


def spread(samples: list[float]) -> dict[str, Any]:
    """Samples in us."""
    array = np.asarray(samples)
    found = {f"p{q}": round(float(np.percentile(array, q)), 2) for q in (50, 90, 99)} if len(array) else {}
    return {
        "n": len(array),
        **found,
        "max": round(float(array.max(initial=0.0)), 2),
        "raw": [round(s, 2) for s in samples],
    }


# --- flag
def flag(gpu: CudaGpu, options: argparse.Namespace) -> dict[str, Any]:
    """From before the call to the host's sight of the GPU's answer, us; and the call alone."""
    module = gpu.load_module(WATCH.encode(), name="watch")
    word, host, far = gpu.allocate(512), gpu.allocate_host(4096), gpu.allocate(256 << 20)
    large = gpu.allocate_host(64 << 20)
    watcher, copies = gpu.create_stream(priority=Priority.HIGH), gpu.create_stream()
    writer = gpu.create_stream(priority=Priority.HIGH)
    answers, source = host.array[:8].view(np.uint32), host.array[64:68].view(np.uint32)
    direct = host.array[128:132].view(np.uint32)
    cu = gpu._cu

    def by_copy(value: int) -> None:
        source[0] = value
        writer.copy_to_device(word.address, host, offset=64, nbytes=4)

    def by_store(value: int) -> None:
        direct[0] = value

    ways: dict[str, tuple[int, Callable[[int], None]]] = {
        "cuStreamWriteValue32": (
            word.address,
            lambda value: cu("cuStreamWriteValue32", writer.handle, word.address, value, 0),
        ),
        "4-byte copy": (word.address, by_copy),
        "cuMemsetD32Async": (word.address, lambda value: cu("cuMemsetD32Async", word.address, value, 1, writer.handle)),
        "store to host memory that blocks read": (host.address + 128, by_store),
    }
    kernel = module.kernel("watch")
    serial = 0
    out: dict[str, Any] = {}
    loaded = Loaded(gpu, options.models[0])
    for load in ("idle", "model", "copies"):
        for name, (where, write) in ways.items():
            total, call = [], []
            for _ in range(100):
                serial += 1
                if load == "model" and loaded.stream.idle():
                    loaded.launch(0)
                params = (
                    where.to_bytes(8, "little"),
                    host.address.to_bytes(8, "little"),
                    serial.to_bytes(4, "little"),
                )
                if load == "copies" and copies.idle():
                    for _ in range(4):
                        copies.copy_to_device(far.address, large)
                watcher.launch(Launch(kernel, (1, 1, 1), (1, 1, 1), 0, params))
                while answers[1] != serial:
                    pass
                time.sleep(2e-5)
                begin = time.perf_counter_ns()
                write(serial)
                called = time.perf_counter_ns()
                while answers[0] != serial:
                    pass
                total.append((time.perf_counter_ns() - begin) / 1e3)
                call.append((called - begin) / 1e3)
            out[f"{load}: {name}"] = {"answer_us": spread(total), "call_us": spread(call)}
            gpu.synchronize()
    loaded.close()
    for thing in (far, large, word, host):
        thing.free()
    return out


# --- overhead
def overhead(gpu: CudaGpu, name: str, options: argparse.Namespace) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for variant in options.variants:
        loaded = Loaded(gpu, name, variant)
        stream = loaded.stream
        pairs = []
        for _ in range(15):
            plain = gpu_ns(gpu, stream, loaded.plain.graph, 5)
            checked = gpu_ns(gpu, stream, loaded.model.graph, 5)
            pairs.append((plain, checked))
        ratios = [checked / plain for plain, checked in pairs[2:]]
        out[variant] = {
            "plain_us": round(float(np.median([p for p, _ in pairs[2:]])) / 1e3, 1),
            "checked_us": round(float(np.median([c for _, c in pairs[2:]])) / 1e3, 1),
            "ratio": round(float(np.median(ratios)), 4),
            "spread": [round(min(ratios), 4), round(max(ratios), 4)],
            "build_s": round(loaded.build_s, 1),
            "steps": _steps(gpu, loaded),
        }
        loaded.close()
    return out


def _steps(gpu: CudaGpu, loaded: Loaded) -> dict[str, Any]:
    """The kernels that cost most, alone and many times in a row (so with a warm L2): (step, blocks, us, ratio)."""
    heavy: dict[str, tuple[float, int, int]] = {}  # by kernel: its longest launch, ns; step; blocks
    for index, step in enumerate(loaded.package.steps):
        if isinstance(step, KernelStep) and step.profile:
            entry = (step.profile.solo_ns, index, step.profile.blocks)
            heavy[step.kernel] = max(entry, heavy.get(step.kernel, entry))
    rows = []
    for _, index, blocks in sorted(heavy.values(), reverse=True)[:24]:
        graphs = [
            gpu.create_graph([operations[index]] * 20)
            for operations in (loaded.plain.operations, loaded.model.operations)
        ]
        times: list[list[float]] = [[], []]
        for _ in range(6):
            for which, graph in enumerate(graphs):
                times[which].append(gpu_ns(gpu, loaded.stream, graph, 1) / 20)
        plain, checked = (float(np.median(t[1:])) for t in times)
        rows.append((index, blocks, round(plain / 1e3, 2), round(checked / plain, 4)))
        for graph in graphs:
            graph.close()
    ratios = [row[-1] for row in rows]
    return {"median": round(float(np.median(ratios)), 4), "worst": max(ratios), "raw": rows}


# --- latency
class Probe:
    """Launches that end when their blocks run on all SMs at once."""

    def __init__(self, gpu: CudaGpu, kind: str) -> None:
        kernel = gpu.load_module(PROBE.encode(), name="probe").kernel("probe")
        each, threads, shared = (1, 1024, kernel.largest_shared_bytes) if kind == "whole SMs" else (2, 128, 48 << 10)
        self._counter = gpu.allocate(512)
        self.stream = gpu.create_stream(priority=Priority.HIGH)
        blocks = each * gpu.info.sms
        params = (self._counter.address.to_bytes(8, "little"), blocks.to_bytes(4, "little"))
        self.graph = gpu.create_graph([Launch(kernel, (blocks, 1, 1), (threads, 1, 1), shared, params)])
        gpu._cu("cuMemsetD32Async", self._counter.address, 0, 1, self.stream.handle)
        self.stream.synchronize()

    def close(self) -> None:
        self.stream.close()
        self.graph.close()
        self._counter.free()


class Urgent:
    """A graph on a stream of high priority, timed from before the host's first call to when the host sees its end."""

    ORDERS = ("preempt, launch", "launch, preempt", "launch only")

    def __init__(self, gpu: CudaGpu, stream: Stream, graph: Graph, control: PreemptControl) -> None:
        self._gpu, self._stream, self._graph, self._control = gpu, stream, graph, control
        self._done = gpu.create_event(timing=False)
        for _ in range(20):
            self.take("launch only")
        self.idle = {order: spread([self.take(order) for _ in range(60)]) for order in self.ORDERS}
        self.base = {order: self.idle[order]["p50"] for order in self.ORDERS}

    def take(self, order: str) -> float:
        """us. The flag is down again afterwards."""
        begin = time.perf_counter_ns()
        if order == "preempt, launch":
            self._control.raise_flag()
        self._stream.launch_graph(self._graph)
        self._stream.record(self._done)
        if order == "launch, preempt":
            self._control.raise_flag()
        while not self._done.done():
            pass
        took = (time.perf_counter_ns() - begin) / 1e3
        if order != "launch only":
            self._control.lower_flag()
        return took


def disturbed(
    loaded: Loaded, urgent: Urgent, order: str, count: int, ahead: int = 0
) -> tuple[list[float], list[int], list[float]]:
    """`count` times at random instants: us, the step where blocks left (-1: none), us for a step to drain.

    ahead: how many segments the model has on the GPU; the instant lies in the first of them. 0: all of a request.
    """
    rng = np.random.default_rng(1)
    took, where, drains = [], [], []
    total = len(loaded.segments)
    ahead = min(ahead, total)
    for _ in range(count):
        first = int(rng.integers(0, total - ahead + 1)) if ahead else 0
        loaded.launch(first, ahead or total)
        spin(5e3 + rng.uniform(0.05, 0.85) * (loaded.solo_ns / total if ahead else loaded.solo_ns))
        begin = time.perf_counter_ns()
        took.append(urgent.take(order))
        loaded.stream.synchronize()
        ended = (time.perf_counter_ns() - begin) / 1e3
        left = loaded.control.left()
        where.append(-1 if left is None else left.step)
        if left is not None:
            until = first + (ahead or total)
            drains.append(ended / max(loaded.segments[until - 1][1] - left.step, 1))
            loaded.resume(until)
            loaded.stream.synchronize()
    return took, where, drains


def latency(gpu: CudaGpu, name: str, options: argparse.Namespace) -> dict[str, Any]:
    segment_ns, ahead = AHEAD[1]
    loaded = Loaded(gpu, name, options.variants[0], segment_ns)
    profiles = [step.profile if isinstance(step, KernelStep) else None for step in loaded.package.steps]
    block_us = [0.0 if p is None else block_ns(p, gpu.info.sms) / 1e3 for p in profiles]
    out: dict[str, Any] = {
        "long blocks": [(e.step, round(e.block_ns / 1e3, 1)) for e in long_blocks(loaded.package, gpu.info.sms)]
    }
    for kind in ("whole SMs", "parts of SMs"):
        probe = Probe(gpu, kind)
        urgent = Urgent(gpu, probe.stream, probe.graph, loaded.control)
        part: dict[str, Any] = {"idle": urgent.idle}
        for order in Urgent.ORDERS:
            # What is not preempted goes on until its request ends.
            took, where, drains = disturbed(
                loaded, urgent, order, options.probes, 0 if order == "launch only" else ahead
            )
            samples = [value - urgent.base[order] for value in took]
            part[order] = spread(samples)
            if order == "launch only":
                continue
            part[f"{order}: us for a launch that leaves"] = spread(drains)
            classes = ["none left" if step < 0 else _class(block_us[step] * 1e3) for step in where]
            for label in sorted(set(classes)):
                part[f"{order}: blocks {label}"] = spread(
                    [s for s, c in zip(samples, classes, strict=True) if c == label]
                )
            worst = sorted(zip(samples, where, strict=True), reverse=True)[:5]
            part[f"{order}: worst"] = [(round(us, 1), step) for us, step in worst]
        out[kind] = part
        probe.close()
    loaded.close()
    return out


def service(gpu: CudaGpu, name: str, options: argparse.Namespace) -> dict[str, Any]:
    package, directory = find_package(options.urgent, None, gpu.info)
    model = bind(package, directory, gpu, tenant=options.urgent)
    stream = gpu.create_stream(priority=Priority.HIGH)
    out: dict[str, Any] = {"urgent": options.urgent}
    for segment_ns, ahead in ((SEGMENT_NS, 0), *AHEAD):
        loaded = Loaded(gpu, name, options.variants[0], segment_ns)
        urgent = Urgent(gpu, stream, model.graph, loaded.control)
        out["alone"] = urgent.idle["launch only"]
        where = f"{ahead} segments of {segment_ns / 1e3:.0f} us" if ahead else "whole request"
        for order in Urgent.ORDERS:
            if order != "launch only" or not ahead:
                took, _, drains = disturbed(loaded, urgent, order, options.probes if ahead else 80, ahead)
                out[f"{where}: {order}"] = spread(took)
                out[f"{where}: {order}: us for a launch that leaves"] = spread(drains)
        loaded.close()
    stream.close()
    model.close()
    return out


def _class(block_ns: float) -> str:
    if block_ns <= SHORT_NS:
        return f"up to {SHORT_NS // 1000} us"
    return f"{SHORT_NS // 1000} to {LONG_NS // 1000} us" if block_ns <= LONG_NS else f"over {LONG_NS // 1000} us"


# --- bits
def unchanged(gpu: CudaGpu, name: str, options: argparse.Namespace) -> dict[str, Any]:
    target = -(-options.preemptions // len(options.models))
    return bits(gpu, name, options.variants[0], preemptions=target, most_s=options.bits_s)


def table(results: dict[str, Any]) -> tuple[str, bool]:
    """What part bits found, a line for each model, and whether all of it is right."""
    lines, right = (
        [f"{'bits':16} {'requests':>8} {'preempted':>9} {'held':>5} {'steps':>5} {'distinct':>8} {'wrong':>6}"],
        True,
    )
    for label, found in results.items():
        if not label.startswith("bits/"):
            continue
        if "error" in found:
            lines.append(f"{label[5:]:16} {found['error'].strip().splitlines()[-1]}")
            right = False
            continue
        wrong = found["wrong outputs"] + found["undisturbed runs agree"].count(False) + (found["marks left"] > 0)
        right = right and not wrong
        lines.append(
            f"{label[5:]:16} {found['requests']:8} {found['preemptions']:9} {found['took hold']:5} "
            f"{found['different steps']:5} {found['distinct output bytes']:8} {wrong:6}"
        )
    return "\n".join(lines) if len(lines) > 1 else "", right


MEASUREMENTS: dict[str, Callable[[CudaGpu, str, argparse.Namespace], dict[str, Any]]] = {
    "bits": unchanged,
    "latency": latency,
    "overhead": overhead,
    "service": service,
}

if __name__ == "__main__":
    sys.exit(main())
