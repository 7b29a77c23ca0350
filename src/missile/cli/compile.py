"""`missile compile`: a model becomes a package of Triton kernels for this machine's GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from missile.cli.output import JsonOption, console, print_json, stderr_console
from missile.compiler.package import ModelPackage
from missile.errors import UnsupportedError
from missile.gpu import resolve

__all__ = ["command", "summary"]


def command(
    model: Annotated[str, typer.Argument(help="One of the twelve, or your own as MODULE:FACTORY.", metavar="MODEL")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The package's directory.", metavar="DIR")],
    batch: Annotated[
        int | None, typer.Option("--batch", help="Requests in a batch (default: the model's own).")
    ] = None,
    device: Annotated[str, typer.Option("--device", "-d", help="auto or cuda:N.", metavar="DEVICE")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compile MODEL for this machine's GPU: Triton kernels only, launch plan, weights, profile, check against eager."""
    from missile.compiler.build import compile_model
    from missile.workloads.models import default_batch

    default_batch(model)  # an unknown name is the first thing to say
    name, _ = resolve(device)
    if name.startswith("sim:"):
        raise UnsupportedError(
            "Compiling needs a GPU: packages are tuned and measured on it (simulated GPUs run recorded packages)."
        )
    screen = stderr_console()
    with screen.status(f"{model}: starting") as status:
        package = compile_model(
            model, output, batch=batch, device=name, progress=lambda what: status.update(f"{model}: {what}")
        )
    if as_json:
        print_json(summary(package) | {"directory": str(output)})
        return
    for line in _lines(package, output):
        console().print(line)


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
