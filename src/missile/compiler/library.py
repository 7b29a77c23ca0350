"""Where packages come from: recorded ones that ship with Missile for simulated GPUs, compiled ones for hardware."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from missile.compiler.package import ModelPackage, read_package
from missile.errors import MisuseError
from missile.files import write_whole
from missile.gpu.interface import GpuInfo
from missile.workloads.models import default_batch

__all__ = [
    "RECORDED",
    "default_cache",
    "find_package",
    "package_directory",
    "read_recorded",
    "recorded_packages",
    "write_recorded",
]

RECORDED = Path(__file__).parent / "recorded"


def find_package(
    model: str,
    batch: int | None,
    gpu: GpuInfo,
    cache: Path | None = None,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[ModelPackage, Path | None]:
    """The package of `model` at `batch` (None: the model's default) for `gpu`, and the directory it lies in.

    A simulated GPU gets the recorded package (directory None). Hardware gets the compiled one from `cache` (None:
    `default_cache()`), and where there is none it is compiled now, which takes minutes when shapes have to be tuned
    (`progress` is told what is being done).
    `model` may also be a package directory, which is taken as it is. MisuseError naming what is known otherwise.
    """
    directory = Path(model)
    if (directory / "package.json").is_file():
        return read_package(directory), directory
    batch = default_batch(model) if batch is None else batch
    if gpu.simulated:
        return _recorded(model, batch), None
    directory = package_directory(model, batch, gpu.name, cache)
    if (directory / "package.json").is_file():
        return read_package(directory), directory
    from missile.compiler.build import compile_model

    return compile_model(model, directory, batch=batch, device=gpu.device, progress=progress), directory


def default_cache() -> Path:
    """Where compiled packages are kept: `$MISSILE_CACHE`, or `missile/packages` in the user's cache directory."""
    if chosen := os.environ.get("MISSILE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "missile" / "packages"


def package_directory(model: str, batch: int, gpu_name: str, cache: Path | None = None) -> Path:
    """Where the package of `model` at `batch` for the GPU `gpu_name` lies in the cache."""
    return (cache or default_cache()) / _slug(gpu_name) / f"{_slug(model)}-b{batch}"


def recorded_packages() -> tuple[tuple[str, int], ...]:
    """The (model, batch) pairs that have a recorded package, sorted."""
    found = {_parse(path) for path in RECORDED.glob("*/*.json.gz")}
    return tuple(sorted(pair for pair in found if pair is not None))


def write_recorded(package: ModelPackage, root: Path = RECORDED) -> Path:
    """Keep `package`'s plan and profile (no kernels, no weights) under `root`; returns the file. Same input, same bytes."""
    path = root / _slug(package.gpu) / f"{_slug(package.name)}-b{package.batch}.json.gz"
    text = package.model_copy(update={"recorded": True}).model_dump_json()
    write_whole(path, gzip.compress(text.encode(), 9, mtime=0))
    return path


@lru_cache(maxsize=64)
def read_recorded(path: Path) -> ModelPackage:
    """Read one recorded package. MisuseError for a broken file."""
    try:
        return ModelPackage.model_validate(json.loads(gzip.decompress(path.read_bytes())))
    except (OSError, EOFError, ValueError, ValidationError) as error:
        raise MisuseError(f"The recorded package {path.name} can't be read: {str(error).splitlines()[0]}.") from error


def _recorded(model: str, batch: int) -> ModelPackage:
    paths = sorted(RECORDED.glob(f"*/{_slug(model)}-b{batch}.json.gz"))
    if paths:
        return read_recorded(paths[0])
    known = recorded_packages()
    batches = [str(b) for name, b in known if name == _slug(model)]
    if batches:
        raise MisuseError(
            f"Simulated GPUs run recorded packages, and {model!r} was recorded at batch {', '.join(batches)}, not {batch}."
        )
    names = ", ".join(sorted({name for name, _ in known})) or "none"
    raise MisuseError(f"Simulated GPUs run recorded packages, and {model!r} was never recorded; recorded are {names}.")


def _parse(path: Path) -> tuple[str, int] | None:
    match = re.fullmatch(r"(.+)-b(\d+)\.json\.gz", path.name)
    return (match[1], int(match[2])) if match else None


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
