"""Compile the twelve models on this machine's GPU, check each against eager, time it, and say what came out.

    PYTHONPATH=src python3 benchmarks/gpu/compile_models.py -o OUT [MODEL ...] [--batch N] [--processes N]

Each model is compiled in a process of its own, several at a time; only one of them measures on the GPU at any moment.
OUT gets `packages/`, `recorded/` (plan and profile, for the simulated GPU), the tuning table, and `compile_models.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO

from missile.compiler.tuning import TuningTable, table_path


class _GpuLock(AbstractContextManager[object]):
    """Held around measurements, so that no other process's kernels are measured along. Reentrant in one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._depth = 0
        self.waited = 0.0

    def __enter__(self) -> _GpuLock:
        if self._depth == 0:
            start = time.monotonic()
            self._file = self._path.open("wb")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self.waited += time.monotonic() - start
        self._depth += 1
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0 and self._file is not None:
            import torch

            torch.cuda.synchronize()
            self._file.close()


def compile_one(model: str, batch: int | None, out: Path) -> dict[str, object]:
    import torch

    from missile.compiler.build import compile_model
    from missile.compiler.library import write_recorded
    from missile.errors import MissileError

    start = time.monotonic()
    stages: list[tuple[float, str]] = []
    gpu = torch.cuda.get_device_name()
    table = TuningTable.load(table_path(gpu), gpu)
    lock = _GpuLock(out / "gpu.lock")
    row: dict[str, object] = {"model": model, "batch": batch}
    kept = out / "tuning" / f"{model}-b{batch or 'default'}.json"
    _keep_saving(table, kept)
    try:
        package = compile_model(
            model,
            out / "packages" / f"{model}-b{batch or 'default'}",
            batch=batch,
            table=table,
            measuring=lock,
            progress=lambda what: stages.append((round(time.monotonic() - start, 1), what)),
        )
    except MissileError as error:
        row["error"] = str(error)
    else:
        write_recorded(package, out / "recorded")
        assert package.solo_ns
        assert package.eager_ns
        row |= {
            "batch": package.batch,
            "gpu": package.gpu,
            "steps": len(package.steps),
            "kernels": len(package.kernels),
            "relative_error": package.relative_error,
            "solo_ms": package.solo_ns / 1e6,
            "eager_ms": package.eager_ns / 1e6,
            "ratio": package.solo_ns / package.eager_ns,
            "weight_mb": package.weight_bytes / 1e6,
        }
    table.save(kept)
    return row | {
        "measured": table.measured,
        "waited_s": round(lock.waited, 1),
        "seconds": round(time.monotonic() - start, 1),
        "stages": stages,
    }


def _keep_saving(table: TuningTable, path: Path) -> None:
    """Save the table every few seconds, so that a run that is cut short loses no measurement."""

    def loop() -> None:
        while True:
            time.sleep(5)
            with contextlib.suppress(RuntimeError):  # it grew meanwhile: next time
                table.save(path)

    threading.Thread(target=loop, daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="which models (default: all twelve)")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        row = compile_one(options.models[0], options.batch, options.out)
        print(json.dumps(row))
        return int("error" in row)
    from missile.workloads.models import model_names

    waiting = list(options.models or reversed(model_names()))  # the large ones take longest and go first
    running: dict[subprocess.Popen[str], str] = {}
    rows: list[dict[str, object]] = []
    threads = max(2, 2 * (os.cpu_count() or 2) // options.processes)  # compiling comes in bursts
    while waiting or running:
        while waiting and len(running) < options.processes:
            model = waiting.pop(0)
            command = [sys.executable, __file__, model, "--one", "-o", str(options.out)]
            command += ["--batch", str(options.batch)] if options.batch else []
            environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
            log = (options.out / f"{model}.log").open("w")
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
            running[process] = model
        for process in [p for p in running if p.poll() is not None]:
            model = running.pop(process)
            assert process.stdout is not None
            lines = process.stdout.read().strip().splitlines()
            failed = {"model": model, "error": f"the process ended with {process.returncode}; see {model}.log"}
            rows.append(json.loads(lines[-1]) if lines and lines[-1].startswith("{") else failed)
            (options.out / "compile_models.json").write_text(json.dumps(rows, indent=1) + "\n")
            print(_line(rows[-1]), flush=True)
        time.sleep(0.2)
    _merge_tables(options.out)
    ratios = [float(str(row["ratio"])) for row in rows if "ratio" in row]
    if ratios:
        product = 1.0
        for ratio in ratios:
            product *= ratio
        print(f"geometric mean against eager under a graph: {product ** (1 / len(ratios)):.3f} ({len(ratios)} models)")
    return int(any("error" in row for row in rows))


def _line(row: dict[str, object]) -> str:
    if "error" in row:
        return f"{row['model']:22} {row['error']}"
    return (
        f"{row['model']:22} b{row['batch']:<3} {row['solo_ms']:8.3f} ms, eager {row['eager_ms']:8.3f} "
        f"(x{row['ratio']:.2f}), error {row['relative_error']:.1e}, "
        f"{row['steps']} steps, {row['measured']} tuned, {row['seconds']} s"
    )


def _merge_tables(out: Path) -> None:
    """All processes' tables into one beside them, named as it is in the repository."""
    merged: TuningTable | None = None
    for path in sorted((out / "tuning").glob("*.json")):
        table = TuningTable.load(path, "")
        if merged is None:
            merged = table
        else:
            merged.merge(table)
    if merged is not None:
        merged.save(out / table_path(merged.gpu).name)


if __name__ == "__main__":
    sys.exit(main())
