"""`missile profile`: measure a model package again, kernel by kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from missile.cli.compile import summary
from missile.cli.output import DeviceOption, JsonOption, console, print_json, stderr_console
from missile.compiler.package import FillStep, ModelPackage, read_package, write_package
from missile.compiler.preemptible import LONG_NS, block_ns, long_blocks
from missile.compiler.profile import profile_package
from missile.errors import MisuseError
from missile.gpu import open_gpu

__all__ = ["command"]


def command(
    directory: Annotated[Path, typer.Argument(help="The package's directory.", metavar="DIR")],
    device: DeviceOption = "auto",
    top: Annotated[int, typer.Option("--top", min=1, help="How many of the longest kernels to list.")] = 12,
    as_json: JsonOption = False,
) -> None:
    """Measure the package in DIR on a GPU and write the times into it."""
    package = read_package(directory)
    with open_gpu(device) as gpu, stderr_console().status("measuring"):
        if gpu.info.simulated:
            raise MisuseError(
                f"{gpu.info.device} is simulated: a profile is measured on a GPU, and nothing was changed."
            )
        package = profile_package(package, directory, gpu)
        sms = gpu.info.sms
    write_package(package, directory)
    if as_json:
        steps = [step.model_dump(mode="json", exclude={"arguments"}) for step in package.steps]
        long = [{"step": b.step, "kernel": b.kernel, "block_ns": b.block_ns} for b in long_blocks(package, sms)]
        print_json(summary(package) | {"profile": steps, "long_blocks": long})
        return
    console().print(_table(package, top, sms))
    if count := len(long_blocks(package, sms)):
        note = f"{count} launches have blocks that take longer than {LONG_NS / 1e3:.0f} us: preemption waits for them."
        console().print(note)


def _table(package: ModelPackage, top: int, sms: int) -> Table:
    """The kernels that take longest, launches of the same kernel taken together."""
    sources = {image.id: image.source for image in package.kernels}
    rows: dict[str, list[float]] = {}
    blocks: dict[str, float] = {}  # the longest, ns
    bounds: dict[str, str] = {}
    for step in package.steps:
        if isinstance(step, FillStep) or step.profile is None:
            continue
        profile = step.profile
        row = rows.setdefault(step.kernel, [0.0, 0.0, 0.0, 0.0])
        for place, value in enumerate((1, profile.solo_ns, profile.footprint_bytes, profile.operations)):
            row[place] += value
        bounds[step.kernel] = profile.bound.value
        blocks[step.kernel] = max(block_ns(profile, sms), blocks.get(step.kernel, 0.0))
    total = package.solo_ns or 1.0
    title = f"{package.name}, batch {package.batch}, on {package.gpu}: {total / 1e6:.3f} ms"
    table = Table(title=title, title_justify="left")
    for header in ("Kernel", "Launches", "Time, us", "Share", "Block, us", "GB/s", "TFLOP/s", "Bound by"):
        table.add_column(header, justify="left" if header in ("Kernel", "Bound by") else "right")
    for kernel, (count, time, nbytes, operations) in sorted(rows.items(), key=lambda r: -r[1][1])[:top]:
        table.add_row(
            sources.get(kernel) or kernel,
            f"{count:.0f}",
            f"{time / 1e3:.1f}",
            f"{time / total:.0%}",
            f"{blocks[kernel] / 1e3:.1f}",
            f"{nbytes / max(time, 1.0):.0f}",
            f"{operations / max(time, 1.0) / 1e3:.1f}",
            bounds[kernel],
        )
    return table
