"""`missile compile`: a model becomes a package of Triton kernels for this machine's GPU; with `--color`, colored too.

Code whose launches overlap is made along with it, so that the first load of an LS tenant need not.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from missile.cli.output import JsonOption, console, print_json, stderr_console
from missile.coloring.usual import usual_shapes
from missile.compiler.colored import color_kernels, has_mixed, is_colored, shape_name
from missile.compiler.overlap_table import Tuned
from missile.compiler.overlapped import is_overlapped, overlapped_kernels
from missile.compiler.package import ModelPackage, read_package
from missile.errors import MisuseError, UnsupportedError
from missile.gpu import open_gpu, resolve
from missile.probe import ChannelMap, map_for
from missile.probe.map_file import read_map
from missile.workloads.models import MODELS

__all__ = ["command", "summary"]


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="One of the twelve, your own as MODULE:FACTORY, or (with --color) a package's directory.",
            metavar="MODEL",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The new package's directory.", metavar="DIR")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Requests in a batch (default: the model's own).")
    ] = None,
    device: Annotated[str, typer.Option("--device", "-d", help="auto or cuda:N.", metavar="DEVICE")] = "auto",
    color: Annotated[bool, typer.Option("--color", help="Make code for colored memory, too.")] = False,
    channel_map: Annotated[
        Path | None,
        typer.Option(
            "--map", help="The GPU's channel map; with it, coloring a package needs no GPU.", metavar="MAP.json"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compile MODEL for this machine's GPU: Triton kernels only, launch plan, weights, profile, check against eager.

    Colored code goes into the package beside the plain one: for the forms of translation that tenants can come to have on
    this GPU, whatever their colors. For models that are not BE ones, code whose launches overlap is made as well. All of it
    is made when a tenant is loaded, too, where a package has none yet.
    """
    if channel_map is not None and not color:
        raise MisuseError("--map says what to color for; it goes with --color.")
    known = None if channel_map is None else read_map(channel_map)
    directory = Path(model)
    if (directory / "package.json").is_file():
        if not color:
            raise MisuseError(f"{model} is a package already; --color would add colored code to it.")
        if output is not None:
            raise MisuseError(f"{model} is a package already, and colored code goes into it: -o is for a new one.")
        package = read_package(directory)
    else:
        if output is None:
            raise MisuseError(f"Where should the package of {model!r} go? -o DIR says so.")
        package, directory = _compile(model, output, batch, device), output
    colored = _color(package, directory, known, device) if color else []
    overlapped = _overlap(package, directory) if _overlaps(package) else None
    if as_json:
        extra: dict[str, Any] = {"colored": colored} if color else {}
        print_json(summary(package) | {"directory": str(directory), "overlapped": overlapped} | extra)
        return
    lines = _lines(package, directory) + [_colored_line(row) for row in colored]
    for line in lines + ([] if overlapped is None else [_overlapped_line(overlapped)]):
        console().print(line)


def _compile(model: str, output: Path, batch: int | None, device: str) -> ModelPackage:
    from missile.compiler.build import compile_model
    from missile.workloads.models import default_batch

    default_batch(model)  # an unknown name is the first thing to say
    name, _ = resolve(device)
    if name.startswith("sim:"):
        raise UnsupportedError(
            "Compiling needs a GPU: packages are tuned and measured on it (simulated GPUs run recorded packages)."
        )
    with stderr_console().status(f"{model}: starting") as status:
        return compile_model(
            model, output, batch=batch, device=name, progress=lambda what: status.update(f"{model}: {what}")
        )


def _overlaps(package: ModelPackage) -> bool:
    """Whether a tenant may come to run the package with launches that overlap: an LS one, on a GPU that can."""
    info = MODELS.get(package.name)
    generation = re.fullmatch(r"sm_(\d+)[a-z]?", package.arch)
    return (info is None or info.kind == "ls") and generation is not None and int(generation[1]) >= 90


def _overlap(package: ModelPackage, directory: Path) -> dict[str, Any]:
    """Plain code whose launches overlap as is best alone on the GPU; how many kernels have it, and how long it took."""
    with stderr_console().status(f"{package.name}: launches that overlap"):
        started = time.perf_counter()
        fresh = not is_overlapped(directory, Tuned())
        found = overlapped_kernels(package, directory, Tuned())
        return {"kernels": len(found.cubins), "made": fresh, "seconds": time.perf_counter() - started}


def _color(package: ModelPackage, directory: Path, known: ChannelMap | None, device: str) -> list[dict[str, Any]]:
    """Code for every shape that there is none for yet; what was made or found, and how long it took."""
    with stderr_console().status(f"{package.name}: looking at the GPU's memory") as status:
        if known is None:
            name, _ = resolve(device)
            if name.startswith("sim:"):
                raise UnsupportedError(
                    "Coloring needs the channel map of the GPU that the package is for: --map MAP.json."
                )
            with open_gpu(name) as gpu:
                known = map_for(gpu, progress=lambda what: status.update(f"{package.name}: {what}"))
        if known.gpu != package.gpu:
            raise MisuseError(f"The channel map is of {known.gpu!r}, the package is for {package.gpu!r}.")
        rows = []
        for shape in usual_shapes(known):
            for overlap in (None, Tuned()) if _overlaps(package) else (None,):
                status.update(f"{package.name}: coloring, form {shape.form}")
                started = time.perf_counter()
                mixed = overlap is not None and has_mixed(package, shape)  # as LS models are loaded
                fresh = not is_colored(directory, shape, mixed=mixed, overlap=overlap)
                if fresh:
                    color_kernels(package, directory, shape, mixed=mixed, overlap=overlap)
                row = {"form": str(shape.form), "shape": shape_name(shape), "overlaps": overlap is not None}
                rows.append(row | {"made": fresh, "seconds": time.perf_counter() - started})
        return rows


def _colored_line(row: dict[str, Any]) -> str:
    what = ", launches overlap" if row["overlaps"] else ""
    return f"Colored, form {row['form']} ({row['shape']}){what}: {_done(row)}."


def _overlapped_line(row: dict[str, Any]) -> str:
    return f"Launches overlap, {row['kernels']} kernels: {_done(row)}."


def _done(row: dict[str, Any]) -> str:
    return f"made in {row['seconds']:.1f} s" if row["made"] else "was there already"


def summary(package: ModelPackage) -> dict[str, Any]:
    """A package in a few numbers. Times in ns; `ratio`: against eager under a CUDA graph."""
    ratio = package.solo_ns / package.eager_ns if package.solo_ns and package.eager_ns else None
    return {
        "model": package.name,
        "batch": package.batch,
        "gpu": package.gpu,
        "steps": len(package.steps),
        "kernels": len(package.kernels),
        "weight_bytes": package.weight_bytes,
        "relative_error": package.relative_error,
        "solo_ns": package.solo_ns,
        "eager_ns": package.eager_ns,
        "ratio": ratio,
    }


def _lines(package: ModelPackage, output: Path) -> list[str]:
    lines = [
        f"{package.name}, batch {package.batch}, for {package.gpu}: {len(package.steps)} launches of "
        f"{len(package.kernels)} kernels, {package.weight_bytes / 1e6:.0f} MB of weights, all of them Triton's."
    ]
    if package.relative_error is not None:
        lines.append(f"Relative error against eager fp16: {package.relative_error:.1e}.")
    if package.solo_ns and package.eager_ns:
        lines.append(
            f"Alone on the GPU: {package.solo_ns / 1e6:.3f} ms; eager under a CUDA graph {package.eager_ns / 1e6:.3f} ms "
            f"(x{package.solo_ns / package.eager_ns:.2f})."
        )
    return [*lines, f"Written to {output}."]
