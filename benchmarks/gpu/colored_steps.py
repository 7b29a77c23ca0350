"""Every kernel of compiled models, plain and colored, on this machine's GPU: the same bits, and what it costs.

    PYTHONPATH=src python3 benchmarks/gpu/colored_steps.py -o OUT PACKAGE... [--seconds 60]

PACKAGE: a folder with `package.json` and `kernels/` (weights are not needed: buffers hold the same random numbers in both).
Each kernel runs by itself, with its launch as in the model's plan, on memory of its own; all frames of memory are the
tenant's, in random order. The sum over a plan weighs each launch by how often the plan makes it. OUT gets `steps.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from colored import ARCH, PAGES, Runner, Variant, by_turns, chosen

from missile.coloring.pool import ColoredPool, TenantMemory
from missile.coloring.shares import Share
from missile.compiler.package import KernelStep, ModelPackage, PointerArgument, read_package
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.rewrite import rewrite
from missile.compiler.ptx.transfer import GATHER, SCATTER, transfer_ptx
from missile.gpu import open_gpu
from missile.gpu.interface import Launch

_CLASSES = (("_tem_", "GEMM and convolution"), ("_poi_", "pointwise"), ("_per_", "reduction"), ("_red_", "reduction"))


def _wants_indices(kernel: str) -> bool:
    """Whether random numbers will not do as what it gathers by: it would stop the GPU with an assertion."""
    return "embedding" in kernel or "index" in kernel


def steps_of(package: ModelPackage) -> list[tuple[KernelStep, int]]:
    """Launches that differ by more than which buffers of the same sizes they use, and how often the plan makes each."""
    sizes = {buffer.id: buffer.nbytes for buffer in package.buffers}
    found: dict[Any, tuple[KernelStep, int]] = {}
    for step in package.steps:
        if isinstance(step, KernelStep) and not _wants_indices(step.kernel):
            shape = tuple(sizes[a.buffer] if isinstance(a, PointerArgument) else a.value for a in step.arguments)
            key = (step.kernel, step.grid, shape)
            found[key] = (step, found[key][1] + 1 if key in found else 1)
    return list(found.values())


class Memory:
    """The buffers of one step: `plain` in ordinary memory, and the same bytes for every tenant."""

    def __init__(self, step: KernelStep, package: ModelPackage) -> None:
        sizes = {buffer.id: buffer.nbytes for buffer in package.buffers}
        names = dict.fromkeys(a.buffer for a in step.arguments if isinstance(a, PointerArgument))
        self.step = step
        self.fresh = {name: torch.randn(-(-max(sizes[name], 16) // 16) * 8, device="cuda").half() for name in names}
        self.plain = {name: tensor.clone() for name, tensor in self.fresh.items()}
        torch.cuda.synchronize()

    def launch(self, kernel: Any, addresses: dict[str, int], *constants: bytes) -> Launch:
        step = self.step
        values = [
            (addresses[a.buffer] + a.offset).to_bytes(8, "little")
            if isinstance(a, PointerArgument)
            else bytes.fromhex(a.value)
            for a in step.arguments
        ]
        return Launch(kernel, step.grid, step.block, step.shared_bytes, (*values, *constants))


def build(folder: Path, kernels: list[str], variants: tuple[Variant, ...]) -> dict[str, dict[str, bytes]]:
    """Cubins by variant and kernel, and `transfer` of each."""

    def made(variant: Variant, name: str) -> bytes:
        text = (folder / "kernels" / f"{name}.ptx").read_text()
        return assemble(
            variant.rewritten(rewrite(text, variant.shape, name=name, placement=variant.placement).ptx),
            arch=ARCH,
            name=name,
        )

    with ThreadPoolExecutor(14) as workers:
        pending = {v.name: {name: workers.submit(made, v, name) for name in kernels} for v in variants}
        built = {v: {name: future.result() for name, future in row.items()} for v, row in pending.items()}
    for variant in variants:
        built[variant.name]["transfer"] = assemble(transfer_ptx(variant.shape, ARCH), arch=ARCH)
    return built


def measure(
    folder: Path, runner: Runner, tenants: dict[str, TenantMemory], variants: tuple[Variant, ...], deadline: float
) -> list[dict[str, Any]]:
    package = read_package(folder)
    entries = {image.id: image.entry for image in package.kernels}
    steps = steps_of(package)
    started = time.monotonic()
    built = build(folder, sorted({step.kernel for step, _ in steps}), variants)
    print(f"{package.name}: {len(steps)} launches, built in {time.monotonic() - started:.1f} s", flush=True)
    moves = {v.name: [runner.kernel(built[v.name]["transfer"], entry) for entry in (SCATTER, GATHER)] for v in variants}
    rows = []
    for step, count in steps:
        if time.monotonic() > deadline:
            print(f"out of time in {package.name}", flush=True)
            break
        row: dict[str, Any] = {"model": package.name, "kernel": step.kernel, "grid": step.grid, "count": count}
        try:
            row |= _step(package, folder, step, entries[step.kernel], runner, tenants, variants, built, moves)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            if getattr(error, "usable", "") == "nothing":
                return [*rows, row]
        rows.append(row)
    return rows


def _step(
    package: ModelPackage, folder: Path, step: KernelStep, entry: str, runner: Runner,
    tenants: dict[str, TenantMemory], variants: tuple[Variant, ...], built: Any, moves: Any,
) -> dict[str, Any]:  # fmt: skip
    memory = Memory(step, package)
    plain_kernel = runner.kernel((folder / "kernels" / f"{step.kernel}.cubin").read_bytes(), entry)
    launches = [memory.launch(plain_kernel, {name: t.data_ptr() for name, t in memory.plain.items()})]
    runner.run(launches[0])
    expected = {name: t.clone() for name, t in memory.plain.items()}
    wrong, registers, held = [], [plain_kernel.registers], []
    try:
        for variant in variants:
            tenant, (scatter, gather) = tenants[variant.name], moves[variant.name]
            buffers = {name: tenant.allocate(t.nbytes) for name, t in memory.fresh.items()}
            held += buffers.values()
            for name, tensor in memory.fresh.items():
                runner.run(runner.move(scatter, tenant, tensor.data_ptr(), buffers[name].address, tensor.nbytes))
            kernel = runner.kernel(built[variant.name][step.kernel], entry)
            registers.append(kernel.registers)
            launches.append(memory.launch(kernel, {n: b.address for n, b in buffers.items()}, tenant.constants))
            runner.run(launches[-1])
            for name, tensor in expected.items():
                got = torch.empty_like(tensor)
                torch.cuda.synchronize()
                runner.run(runner.move(gather, tenant, got.data_ptr(), buffers[name].address, got.nbytes))
                if not torch.equal(got.view(torch.uint8), tensor.view(torch.uint8)) and variant.name not in wrong:
                    wrong.append(variant.name)
        times = by_turns(runner.gpu, runner.stream, launches)
    finally:
        for buffer in held:
            buffer.free()
    return {
        "wrong": wrong,
        "registers": registers,
        "plain_ns": times[0],
        "ns": dict(zip((v.name for v in variants), times[1:], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--variants", default="", help="names, separated by semicolons; all where left out")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    variants = chosen(arguments.variants)
    torch.manual_seed(0)
    rng = np.random.default_rng(4)
    rows: list[dict[str, Any]] = []
    with open_gpu("cuda:0") as gpu:
        result: dict[str, Any] = {"gpu": gpu.info.name, "driver": gpu.info.driver, "torch": torch.__version__}
        stream = gpu.create_stream()
        with ExitStack() as pools:
            tenants = {}
            for v in variants:
                pool = pools.enter_context(ColoredPool(gpu, PAGES))
                pages = tuple(rng.permutation(PAGES).tolist())
                tenants[v.name] = pool.attach(Share(v.name, (), pages, v.translation(True, rng)))
            runner = Runner(gpu, stream)
            for folder in arguments.packages:
                try:
                    rows += measure(folder, runner, tenants, variants, deadline)
                except Exception:
                    traceback.print_exc()
        stream.close()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "steps.json").write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
    report(rows, [v.name for v in variants])


def report(rows: list[dict[str, Any]], names: list[str]) -> None:
    done = [row for row in rows if "ns" in row]
    print(f"{len(rows)} launches, {len(rows) - len(done)} failed, wrong: {sum(len(r['wrong']) for r in done)}")
    for row in done:
        if row["wrong"]:
            print(f"  WRONG {row['model']} {row['kernel']}: {row['wrong']}")
    print(
        f"{'sum over the plan':34s}"
        + " ".join(f"{model[:14]:>14s}" for model in dict.fromkeys(r["model"] for r in done))
    )
    for name in names:
        cells = []
        for model in dict.fromkeys(r["model"] for r in done):
            mine = [r for r in done if r["model"] == model]
            cells.append(sum(r["ns"][name] * r["count"] for r in mine) / sum(r["plain_ns"] * r["count"] for r in mine))
        mean = math.exp(sum(map(math.log, cells)) / len(cells)) if cells else math.nan
        print(f"{name:34s}" + " ".join(f"{cell:14.3f}" for cell in cells) + f"  geometric mean {mean:.3f}")
    for mark, what in _CLASSES:
        mine = [r for r in done if mark in r["kernel"]]
        if mine:
            plain = sum(r["plain_ns"] * r["count"] for r in mine)
            said = ", ".join(f"{n} {sum(r['ns'][n] * r['count'] for r in mine) / plain:.3f}" for n in names)
            print(f"{what} {mark}: {plain / 1e3:.0f} us plain; {said}")
    worst = sorted(done, key=lambda r: -(min(r["ns"].values()) - r["plain_ns"]) * r["count"])[:15]
    for row in worst:
        said = ", ".join(f"{row['ns'][n] / row['plain_ns']:.2f}" for n in names)
        what = f"{row['model']} {row['kernel']} {row['grid']} x{row['count']}"
        print(f"{what}: {row['plain_ns']:.0f} ns; {said}; {row['registers']}")


if __name__ == "__main__":
    main()
