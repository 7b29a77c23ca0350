"""What the PCIe scheduler's design rests on, measured: which copies overtake which, and what the host's steps cost.

PYTHONPATH=src python3 benchmarks/gpu/pcie_facts.py -o OUT [--device cuda:0]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from missile.gpu import open_gpu
from missile.gpu.interface import DeviceBuffer, Gpu, HostBuffer, Priority, Stream
from missile.pcie.runner import Sleeper
from missile.pcie.weights import MIB

_CAP_NS = 250_000_000  # a starved copy is not waited for any longer


def beside(
    gpu: Gpu,
    host: HostBuffer,
    device: DeviceBuffer,
    bulk: Stream,
    other: Stream,
    *,
    chunk: int,
    depth: int,
    nbytes: int,
) -> dict[str, float | int]:
    """`bulk` always has `depth` chunks queued; copies of `nbytes` go to `other` at random moments, for a quarter second."""
    spare = [gpu.create_event(timing=False) for _ in range(depth)]
    flying: list[Any] = []
    mark = gpu.create_event(timing=False)
    rng = np.random.default_rng(1)
    moved = 0
    times: list[float] = []
    pending = -1
    begin = now = gpu.now_ns()
    due = now + 200_000
    while now - begin < _CAP_NS:
        if flying and flying[0].done():
            spare.append(flying.pop(0))
            moved += chunk
        while len(flying) < depth:
            event = spare.pop(0)
            bulk.copy_to_device(device.address, host, nbytes=chunk)
            bulk.record(event)
            flying.append(event)
        now = gpu.now_ns()
        if pending < 0 and now >= due:
            pending = now
            other.copy_to_device(device.address + device.nbytes // 2, host, nbytes=nbytes)
            other.record(mark)
        if pending >= 0 and mark.done():
            now = gpu.now_ns()
            times.append((now - pending) / 1e3)
            pending, due = -1, now + int(rng.exponential(300_000))
    out: dict[str, float | int] = {"copies": len(times), "bulk_GB_s": round(moved / (now - begin), 2)}
    if pending >= 0:
        out["still_waiting_us"] = round((now - pending) / 1e3)
    if times:
        out |= {"p50_us": round(float(np.median(times)), 1), "max_us": round(max(times), 1)}
    gpu.synchronize()
    for event in (*spare, *flying, mark):
        event.close()
    return out


def overtaking(gpu: Gpu) -> dict[str, Any]:
    host, device = gpu.allocate_host(64 * MIB), gpu.allocate(128 * MIB)
    host.array[:] = 1
    bulk = gpu.create_stream()
    streams = {
        "same stream": bulk,
        "another": gpu.create_stream(),
        "high priority": gpu.create_stream(priority=Priority.HIGH),
    }
    cases = [(MIB, 2), (2 * MIB, 2), (4 * MIB, 2), (64 * MIB, 4)]
    return {
        f"{nbytes >> 10} KiB on {name}, beside {depth} x {chunk // MIB} MiB": beside(
            gpu, host, device, bulk, stream, chunk=chunk, depth=depth, nbytes=nbytes
        )
        for nbytes in (4 << 10, 64 << 10, MIB)
        for chunk, depth in cases
        for name, stream in streams.items()
    }


def host_calls(gpu: Gpu) -> dict[str, float]:
    """Microseconds of each call that the scheduler makes per chunk."""
    host, device, stream = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB), gpu.create_stream()
    events = [gpu.create_event(timing=False) for _ in range(200)]

    def each(call: Callable[[int], Any], count: int = 200) -> float:
        begin = time.perf_counter()
        for index in range(count):
            call(index)
        taken = time.perf_counter() - begin
        gpu.synchronize()
        return round(taken / count * 1e6, 2)

    out = {
        "copy": each(lambda _: stream.copy_to_device(device.address, host, nbytes=4096)),
        "record": each(lambda index: stream.record(events[index])),
    }
    stream.copy_to_device(device.address, host)
    stream.record(events[0])
    out["query"] = each(lambda _: events[0].done())
    sleeper = Sleeper(gpu)
    for asked in (10, 20, 50):
        times = []
        for _ in range(300):
            begin = gpu.now_ns()
            sleeper.wait((), begin + asked * 1000)
            times.append((gpu.now_ns() - begin) / 1e3)
        out[f"sleep of {asked}"] = round(float(np.median(times)), 1)
    return out


def host_copies(gpu: Gpu) -> dict[str, float]:
    """GB/s from pageable into pinned memory, by threads."""
    pinned = gpu.allocate_host(128 * MIB)
    source = np.ones(128 * MIB, np.uint8)
    out = {}
    for workers in (1, 2, 4, 8):
        with ThreadPoolExecutor(workers) as pool:
            for _ in range(2):  # the first touches the pages
                begin = time.perf_counter()
                list(
                    pool.map(
                        lambda i: np.copyto(pinned.array[i : i + MIB], source[i : i + MIB]), range(0, 128 * MIB, MIB)
                    )
                )
                out[f"{workers} threads"] = round(128 * MIB / (time.perf_counter() - begin) / 1e9, 1)
    return out


def page_mapping(gpu: Gpu) -> dict[str, float]:
    """Microseconds per page of mapping and unmapping, by pages at a time."""
    pages = [gpu.create_page() for _ in range(64)]
    span = gpu.reserve(64 * gpu.info.page_bytes)
    out = {}
    for count in (1, 8, 64):
        for verb, call in (
            ("map", lambda count=count: span.map(0, pages[:count])),
            ("unmap", lambda count=count: span.unmap(0, count * gpu.info.page_bytes)),
        ):
            begin = time.perf_counter()
            call()
            out[f"{verb} {count}"] = round((time.perf_counter() - begin) / count * 1e6, 1)
    span.free()
    for page in pages:
        page.release()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with open_gpu(options.device) as gpu:
        out: dict[str, Any] = {"gpu": gpu.info.name, "simulated": gpu.info.simulated}
        for part in (overtaking, host_calls, host_copies, page_mapping):
            out[part.__name__] = part(gpu)
            print(part.__name__, json.dumps(out[part.__name__], indent=1), flush=True)
    (options.output / "facts.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
