"""What both benchmarks of overlapped launches are told, and the packages that they find."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from missile.compiler.package import ModelPackage, read_package

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
