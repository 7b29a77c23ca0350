"""What disjoint colors don't isolate: kernels that touch no memory of their own, beside a tenant confined to its colors.

    PYTHONPATH=src python3 benchmarks/gpu/leftover.py -o OUT [--map MAP.json]

Instructions, kernel parameters and page tables lie where the driver put them, in all colors. On a quarter of the SMs run,
one at a time: straight-line code of growing size (more than the instruction caches hold, so that it is fetched through
L2), a chain of small kernels, and a loop that only computes; on the others a GEMV chain, a copy, or nothing, in plain
memory and in one half of the colors. OUT gets `leftover.json` with every sample.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from missile.bench.isolation.record import header_of
from missile.coloring.halves import find_halves
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Graph, Launch, Stream
from missile.probe import map_for
from missile.runtime.loading import Coloring, load_tenants
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import ClosedLoop

SIZES = (512, 2048, 8192, 32768)  # instructions, 16 bytes each
SAMPLES = 40
AHEAD = 24  # BE graphs in flight before the first sample


def straight(count: int) -> str:
    """PTX of a kernel of `count` multiply-adds without a loop, run `rounds` times over; no two of them can be merged."""
    body = "\n".join(f"  fma.rn.f32 %f{i % 8}, %f{i % 8}, %f9, %f{(i + 3) % 8};" for i in range(count))
    return f"""
.visible .entry straight_{count}(.param .u64 out, .param .u32 rounds)
{{
  .reg .f32 %f<10>;
  .reg .b32 %r<4>;
  .reg .b64 %rd<4>;
  .reg .pred %p<2>;
  ld.param.u64 %rd1, [out];
  ld.param.u32 %r1, [rounds];
  mov.u32 %r2, %tid.x;
  cvt.rn.f32.u32 %f9, %r2;
  mov.f32 %f0, 0f3F800000; mov.f32 %f1, %f9; mov.f32 %f2, %f9; mov.f32 %f3, %f9;
  mov.f32 %f4, %f9; mov.f32 %f5, %f9; mov.f32 %f6, %f9; mov.f32 %f7, %f9;
$round:
{body}
  sub.u32 %r1, %r1, 1;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra $round;
  setp.ne.u64 %p1, %rd1, 0;
  @!%p1 bra $end;
  add.f32 %f0, %f0, %f1; add.f32 %f0, %f0, %f2; add.f32 %f0, %f0, %f3; add.f32 %f0, %f0, %f4;
  add.f32 %f0, %f0, %f5; add.f32 %f0, %f0, %f6; add.f32 %f0, %f0, %f7;
  st.global.f32 [%rd1], %f0;
$end:
  ret;
}}"""


def victims(gpu: Gpu, owned: ExitStack, blocks: int) -> dict[str, Graph]:
    """Graphs that take about as long each: code once over, chains of empty kernels, one loop in the instruction cache."""
    major, minor = gpu.info.compute_capability
    head = f".version 8.0\n.target sm_{major}{minor}\n.address_size 64\n"
    module = gpu.load_module((head + "".join(map(straight, SIZES))).encode(), name="leftover")
    owned.callback(module.close)
    graphs = {}

    def add(name: str, count: int, rounds: int, launches: int) -> None:
        params = ((0).to_bytes(8, "little"), rounds.to_bytes(4, "little"))
        launch = Launch(module.kernel(f"straight_{count}"), (blocks, 1, 1), (128, 1, 1), 0, params)
        graphs[name] = gpu.create_graph([launch] * launches)
        owned.callback(graphs[name].close)

    for count in SIZES:
        add(f"{count * 16 >> 10} KiB of code, once over, 8 times", count, 1, 8)
    add("8 KiB of code in a loop", 512, 400, 1)
    add("100 kernels of 8 KiB", 512, 1, 100)
    return graphs


def neighbours(gpu: Gpu, owned: ExitStack, options: argparse.Namespace) -> dict[str, Graph | None]:
    channel_map = map_for(gpu, known=options.map, pages=512)
    halves = find_halves(channel_map)
    assert halves is not None
    found: dict[str, Graph | None] = {"nothing": None}
    for model in ("synthetic-gemv", "synthetic-copy"):
        for colored in (False, True):
            name = f"{model}-{'colored' if colored else 'plain'}"
            tenant = Tenant.model_validate(
                {"name": name, "class": "BE", "model": model, "arrivals": ClosedLoop(depth=1)}
            )
            coloring = Coloring(channel_map, {name: halves.sets[1]}) if colored else None
            loaded = owned.enter_context(load_tenants(gpu, [tenant], coloring=coloring)).tenants[0].model
            assert loaded is not None
            found[name] = loaded.graph
    return found


def measure(gpu: Gpu, ours: Stream, theirs: Stream, victim: Graph, neighbour: Graph | None) -> list[int]:
    """Durations of `victim`, ns, one at a time, the neighbour's queue never empty."""
    start, end = gpu.create_event(), gpu.create_event()
    taken = []
    for _ in range(AHEAD if neighbour else 0):
        assert neighbour is not None
        theirs.launch_graph(neighbour)
    for _ in range(SAMPLES):
        if neighbour is not None:
            theirs.launch_graph(neighbour)
            theirs.launch_graph(neighbour)
        ours.record(start)
        ours.launch_graph(victim)
        ours.record(end)
        ours.synchronize()
        taken.append(end.time_ns() - start.time_ns())
    gpu.synchronize()
    for event in (start, end):
        event.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("missile-out/leftover"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--map", type=Path, default=None)
    options = parser.parse_args()
    with ExitStack() as owned:
        gpu = owned.enter_context(open_gpu(options.device))
        split = gpu.split_sms([32])
        ours, theirs = gpu.create_stream(partition=split.parts[0]), gpu.create_stream(partition=split.remainder)
        owned.callback(theirs.close)
        owned.callback(ours.close)
        beside = neighbours(gpu, owned, options)
        samples: dict[str, dict[str, list[int]]] = {}
        for name, victim in victims(gpu, owned, 32).items():
            samples[name] = {other: measure(gpu, ours, theirs, victim, graph) for other, graph in beside.items()}
        result: dict[str, Any] = {**header_of(gpu), "samples_ns": samples}
    result["slowdown"] = {
        name: {other: round(median(times) / median(by["nothing"]), 3) for other, times in by.items()}
        for name, by in samples.items()
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "leftover.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, by in result["slowdown"].items():
        print(f"{name:40}", f"{median(samples[name]['nothing']) / 1e3:8.1f} us", by)


if __name__ == "__main__":
    main()
