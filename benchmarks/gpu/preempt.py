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
  variant "colored", in colored memory.

Models are packages in Missile's cache. OUT gets `preempt.json`.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from missile.coloring.pool import ColoredPool
from missile.coloring.shape import Form, Shape
from missile.coloring.shares import Share
from missile.coloring.translation import InPageTranslation
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.colored import ColoredKernels
from missile.compiler.library import find_package
from missile.compiler.package import BufferKind, KernelStep, ModelPackage
from missile.compiler.planning import needed_bytes
from missile.compiler.preemptible import block_ns, control_of, long_blocks, preempt_model
from missile.compiler.preemptible_code import PreemptibleKernels, build_preemptible, preemptible_kernels
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.fill import fill_entry
from missile.compiler.ptx.preempt import Look, Place
from missile.compiler.ptx.transfer import transfer_ptx
from missile.gpu import open_gpu
from missile.gpu.cuda.gpu import CudaGpu
from missile.gpu.interface import Graph, Launch, PreemptControl, Priority, Stream
from missile.probe.layout import PageLayout

MODELS = ("densenet161", "bert_large", "decoder_1b")
SEGMENT_NS = 300_000.0
AHEAD = ((300_000.0, 2), (100_000.0, 2), (50_000.0, 2))  # a segment's length, ns, and how many are on the GPU
COLORED = Shape(Form.IN_PAGE, PageLayout(2 << 20, (*range(8), 9)))  # Hopper's granules
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--parts", default="flag,overhead,latency,service,bits")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--preemptions", type=int, default=1000, help="of part bits, over all models")
    parser.add_argument("--probes", type=int, default=200, help="of part latency, for each model")
    parser.add_argument("--variants", nargs="*", default=["auto"], help="of the check: auto, or LOOK-PLACE")
    parser.add_argument("--urgent", default="resnet34", help="the latency-sensitive model of part service")
    parser.add_argument("--note", default="", help="written into the results")
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


# --- models
_MODELS: dict[tuple[str, str], tuple[BoundModel, BoundModel, float]] = {}
_POOLS: list[ColoredPool] = []


def _models(gpu: CudaGpu, name: str, variant: str) -> tuple[BoundModel, BoundModel, float]:
    """The model as it is and preemptible, in the same memory, and the seconds that it took to have the latter's code.

    variant: "auto" is what Missile takes, else the same look and place for all kernels. Kept until the end.
    """
    key = (name, variant)
    if key not in _MODELS:
        package, directory = find_package(name, None, gpu.info)
        assert directory is not None
        begin = time.perf_counter()
        if variant == "colored":
            plain = _models(gpu, name, "auto")[0]
            begin = time.perf_counter()
            code = preemptible_kernels(package, directory, COLORED)
            seconds = time.perf_counter() - begin
            _MODELS[key] = (plain, preempt_model(_colored(gpu, package, directory, code), gpu, code), seconds)
            return _MODELS[key]
        if variant == "auto":
            code = preemptible_kernels(package, directory)
        else:
            look, _, place = variant.partition("-")
            same = {image.id: Place(place) for image in package.kernels}
            with TemporaryDirectory() as apart:  # it is none that Missile should find
                (Path(apart) / "kernels").symlink_to(directory / "kernels")
                code = build_preemptible(package, Path(apart), look=Look(look), places=same)
        seconds = time.perf_counter() - begin
        known = next((entry[0] for (other, _), entry in _MODELS.items() if other == name), None)
        plain = bind(package, directory, gpu, tenant=name) if known is None else known
        _MODELS[key] = (plain, preempt_model(plain, gpu, code), seconds)
    return _MODELS[key]


def _colored(gpu: CudaGpu, package: ModelPackage, directory: Path, code: PreemptibleKernels) -> BoundModel:
    """The model in memory whose granules are in random order. Only for `preempt_model`: it has no other code."""
    pages = -(-needed_bytes(package) // COLORED.layout.page_bytes) + 2
    places = np.random.default_rng(5).permutation(COLORED.layout.granules)
    pool = ColoredPool(gpu, pages)
    _POOLS.append(pool)
    share = Share(package.name, (0,), tuple(range(pages)), InPageTranslation(COLORED, places, pages))
    arch = package.arch + "a"
    transfer = assemble(transfer_ptx(COLORED, arch) + fill_entry(COLORED), arch=arch)
    return bind_colored(
        package, directory, gpu, pool.attach(share), kernels=ColoredKernels(COLORED, code.cubins, transfer)
    )


class Loaded:
    """A model as it is and preemptible, with segments of the latter. Close it."""

    def __init__(self, gpu: CudaGpu, name: str, variant: str = "auto", segment_ns: float = SEGMENT_NS) -> None:
        self.plain, self.model, self.build_s = _models(gpu, name, variant)
        self.gpu, self.package = gpu, self.model.package
        self.control = control_of(self.model)
        self.segments = _cut(self.model, segment_ns)
        self.graphs: list[Graph] = [gpu.create_graph(self.model.operations[a:b]) for a, b in self.segments]
        host = gpu.allocate_host(max(self.model.input_bytes, 1))
        _fill_inputs(self.package, host.array)
        self.stream = gpu.create_stream(priority=Priority.LOW)
        for model in (self.plain, self.model):
            if model.input_bytes:
                self.stream.copy_to_device(model.input_address, host)
        self.run()  # instantiates
        self.solo_ns = min(_timed(self.run) for _ in range(5))

    def run(self) -> None:
        self.launch(0)
        self.stream.synchronize()

    def launch(self, first: int, count: int = 1 << 16) -> None:
        """Segments from `first` on, as those of a new request: its results are right where `first` is 0."""
        self.control.begin(self.stream)
        for graph in self.graphs[first : first + count]:
            self.stream.launch_graph(graph)

    def resume(self, until: int = 1 << 16) -> bool:
        """Relaunch what is left of segments before `until`, False where nothing is. All launches have ended."""
        left = self.control.left()
        if left is None:
            return False
        self.control.resume(self.stream, left)
        first = next(index for index, (_, last) in enumerate(self.segments) if left.step < last)
        for graph in self.graphs[first:until]:
            self.stream.launch_graph(graph)
        return True

    def close(self) -> None:
        for graph in self.graphs:
            graph.close()
        self.stream.close()


def _cut(model: BoundModel, segment_ns: float) -> list[tuple[int, int]]:
    pieces, first, length = [], 0, 0.0
    for index, operation in enumerate(model.operations):
        length += operation.work.solo_ns if isinstance(operation, Launch) and operation.work else 0.0
        if length >= segment_ns or index + 1 == len(model.operations):
            pieces.append((first, index + 1))
            first, length = index + 1, 0.0
    return pieces


def _fill_inputs(package: ModelPackage, view: npt.NDArray[np.uint8]) -> None:
    view[:] = 0
    if all(spec.dtype in ("float16", "torch.float16") for spec in package.inputs):
        values = np.random.default_rng(0).standard_normal(view.nbytes // 2, dtype=np.float32).astype(np.float16)
        view[: values.nbytes] = values.view(np.uint8)


def _timed(run: Callable[[], object]) -> int:
    begin = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - begin


def _gpu_ns(gpu: CudaGpu, stream: Stream, graph: Graph, count: int) -> float:
    """Of one launch of `graph`, over `count` in a row, ns."""
    start, end = gpu.create_event(), gpu.create_event()
    stream.record(start)
    for _ in range(count):
        stream.launch_graph(graph)
    stream.record(end)
    stream.synchronize()
    length = (end.time_ns() - start.time_ns()) / count
    start.close()
    end.close()
    return float(length)


# --- overhead
def overhead(gpu: CudaGpu, name: str, options: argparse.Namespace) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for variant in options.variants:
        loaded = Loaded(gpu, name, variant)
        stream = loaded.stream
        pairs = []
        for _ in range(15):
            plain = _gpu_ns(gpu, stream, loaded.plain.graph, 5)
            checked = _gpu_ns(gpu, stream, loaded.model.graph, 5)
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
                times[which].append(_gpu_ns(gpu, loaded.stream, graph, 1) / 20)
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
        _spin(5e3 + rng.uniform(0.05, 0.85) * (loaded.solo_ns / total if ahead else loaded.solo_ns))
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


def _spin(duration_ns: float) -> None:
    end = time.perf_counter_ns() + duration_ns
    while time.perf_counter_ns() < end:
        pass


# --- bits
def bits(gpu: CudaGpu, name: str, options: argparse.Namespace) -> dict[str, Any]:
    loaded = Loaded(gpu, name, options.variants[0])
    rng = np.random.default_rng(2)
    control = loaded.control
    state = [b for b in loaded.package.buffers if b.kind is BufferKind.STATE]
    reader = _Reader(gpu, loaded)
    loaded.run()
    if len(np.unique(reader.output())) < 64 and loaded.model.shape is None:
        _reweigh(gpu, loaded)
    references = []
    for model in (loaded.plain, loaded.plain, loaded.model):
        control.begin(loaded.stream)
        loaded.stream.launch_graph(model.graph)
        references.append(reader.output(model))
    reference = references[0]
    target = -(-options.preemptions // len(options.models))
    preemptions = took_hold = requests = wrong = 0
    rounds: Counter[int] = Counter()
    steps: Counter[int] = Counter()
    begin = time.perf_counter()
    while preemptions < target and time.perf_counter() - begin < 25:
        reader.scramble()
        loaded.launch(0)
        count = 0
        while True:
            _spin(rng.uniform(0, 0.6) * loaded.solo_ns)
            if loaded.stream.idle():
                break
            control.raise_flag()
            preemptions += 1
            _spin(rng.uniform(0, 100_000))  # the flag may well be lowered before all have left
            control.lower_flag()
            loaded.stream.synchronize()
            gpu.synchronize()
            if (left := control.left()) is not None:
                steps[left.step] += 1
                took_hold += 1
                count += 1
            if not loaded.resume():
                break
        loaded.stream.synchronize()
        requests += 1
        rounds[count] += 1
        wrong += not np.array_equal(reader.output(), reference)
    out = {
        "undisturbed runs agree": [bool(np.array_equal(reference, other)) for other in references],
        "requests": requests,
        "preemptions": preemptions,
        "took hold": took_hold,
        "different steps": len(steps),
        "wrong outputs": wrong,
        "output bytes": int(reference.nbytes),
        "distinct output bytes": len(np.unique(reference)),
        "state buffers": len(state),
        "preemptions of a request": dict(sorted(rounds.items())),
        "marks left": reader.marks(),
    }
    loaded.close()
    return out


def _reweigh(gpu: CudaGpu, loaded: Loaded) -> None:
    """Random half-precision numbers for all large weights: those of a stand-in may make every output the same."""
    host = gpu.allocate_host(1 << 20)
    values = np.random.default_rng(3).standard_normal(host.nbytes // 2, dtype=np.float32) * 0.02
    host.array[:] = values.astype(np.float16).view(np.uint8)
    for buffer in loaded.package.buffers:
        if buffer.kind is BufferKind.WEIGHT and buffer.nbytes >= 1 << 16:
            for start in range(0, buffer.nbytes, host.nbytes):
                nbytes = min(host.nbytes, buffer.nbytes - start)
                loaded.stream.copy_to_device(loaded.model.addresses[buffer.id] + start, host, nbytes=nbytes)
    loaded.stream.synchronize()
    host.free()


class _Reader:
    """Outputs as bytes, and outputs and marks looked at between requests."""

    def __init__(self, gpu: CudaGpu, loaded: Loaded) -> None:
        self._model, self._stream = loaded.model, loaded.stream
        self._host = gpu.allocate_host(loaded.model.output_bytes)
        first, last = loaded.model.operations[0], loaded.model.operations[-1]
        assert isinstance(first, Launch)
        assert isinstance(last, Launch)
        self._marks = int.from_bytes(first.params[-2], "little")
        self._blocks = int.from_bytes(last.params[-2], "little") + int(np.prod(last.grid)) - self._marks
        self._gpu = gpu

    def output(self, model: BoundModel | None = None) -> npt.NDArray[np.uint8]:
        self._stream.copy_to_host(self._host, (model or self._model).output_address)
        self._stream.synchronize()
        return np.array(self._host.array)

    def scramble(self) -> None:
        """So that an output that is not written is not taken for a right one."""
        self._gpu._cu(
            "cuMemsetD8Async", self._model.output_address, 0xA5, self._model.output_bytes, self._stream.handle
        )

    def marks(self) -> int:
        """Marks that are set: none, once all requests have ended."""
        host = self._gpu.allocate_host(self._blocks)
        self._stream.copy_to_host(host, self._marks)
        self._stream.synchronize()
        count = int(np.count_nonzero(host.array))
        host.free()
        return count


MEASUREMENTS: dict[str, Callable[[CudaGpu, str, argparse.Namespace], dict[str, Any]]] = {
    "bits": bits,
    "latency": latency,
    "overhead": overhead,
    "service": service,
}

if __name__ == "__main__":
    main()
