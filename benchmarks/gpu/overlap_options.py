"""What both benchmarks of overlapped launches share: what they are told, the packages they find, and what they note."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from missile.bench.isolation.record import header_of
from missile.compiler.package import ModelPackage, read_package
from missile.files import write_whole
from missile.gpu.interface import Gpu

LS = (
    "resnet34", "mobilenet_v3_large", "mobilebert", "efficientnet_b0", "mobilevit_s", "squeezenet1_1", "shufflenet_v2",
    "efficientformer_l1",
)  # fmt: skip

Packages = dict[str, tuple[ModelPackage, Path]]


def read_options(description: str | None, seconds: float, rounds: int, rounds_help: str) -> argparse.Namespace:
    """The command line, and `started`: when it was read. Makes the folder for results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("missile-out/overlap"))
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--models", default="", help="of the twelve, with commas; all when left out")
    parser.add_argument("--map", type=Path, default=None)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--rounds", type=int, default=rounds, help=rounds_help)
    options = parser.parse_args()
    options.started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def find_packages(options: argparse.Namespace, models: Sequence[str]) -> Packages:
    """Those of `models` that were asked for and are there, in folders of their names."""
    chosen = [model for model in options.models.split(",") if model]
    found = {}
    for model in models:
        for directory in (options.packages / f"{model}-bdefault", options.packages / model):
            if (directory / "package.json").is_file() and (not chosen or model in chosen):
                found[model] = (read_package(directory), directory)
                break
    return found


class Makers:
    """Processes that make code, and threads that wait for them. seconds: what each piece took."""

    def __init__(self, *, spare: int, threads: int) -> None:
        self.seconds: dict[str, float] = {}
        cores = max((os.cpu_count() or 2) - spare, 1)
        self.workers = ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"))
        self.threads = ThreadPoolExecutor(threads)

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.workers.shutdown(cancel_futures=True)


class Record:
    """A benchmark's results, in a file that is whole whenever it stops, within the time that it was given."""

    def __init__(self, gpu: Gpu, options: argparse.Namespace, file: str, makers: Makers) -> None:
        self.result: dict[str, Any] = {**header_of(gpu), "stand_in_weights": True, "failures": []}
        self._started, self._seconds = options.started, options.seconds
        self._path, self._makers = options.out / file, makers

    @property
    def left(self) -> float:
        """Seconds."""
        return float(self._seconds - (time.monotonic() - self._started))

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails is noted, and the rest goes on, unless the GPU is lost."""
        try:
            yield
        except Exception as error:
            self.result["failures"].append({"what": what, "error": f"{type(error).__name__}: {error}"})
            traceback.print_exc()
            self.save()
            if getattr(error, "usable", "") == "nothing":
                raise
        self.result["elapsed_s"] = round(time.monotonic() - self._started, 1)

    def save(self) -> None:
        self.result["code_seconds"] = dict(self._makers.seconds)
        write_whole(self._path, json.dumps(self.result, indent=1) + "\n")
