"""`missile probe`: recover a GPU's channel map by measurement, verify it, write it down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from missile.cli.output import DeviceOption, JsonOption, console, print_json, stderr_console
from missile.errors import MisuseError
from missile.gpu import open_gpu, resolve
from missile.probe import ChannelMap, map_for, probe_gpu, write_map
from missile.probe.map_file import to_json
from missile.probe.pictures import draw

__all__ = ["command"]


def command(
    device: DeviceOption = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the map goes (JSON).", metavar="MAP.json")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="A picture of the map (PNG, SVG or PDF).", metavar="MAP.png")
    ] = None,
    pages: Annotated[
        int | None, typer.Option(help="Pages to classify; 64 GiB of them on hardware unless less is free.", min=2)
    ] = None,
    samples: Annotated[int, typer.Option(help="Granules measured in each page.", min=16)] = 48,
    interference: Annotated[bool, typer.Option(help="Measure what colors do to each other.")] = True,
    known: Annotated[
        Path | None,
        typer.Option(
            "--known",
            help="A map to verify, quickly; the GPU is probed only if it does not hold.",
            metavar="MAP.json",
        ),
    ] = None,
    counters: Annotated[bool, typer.Option(help="Count sectors per slice with ncu, too (takes a minute).")] = False,
    seed: Annotated[int, typer.Option(help="Of the choice of samples, and of the simulator's noise.")] = 0,
    json: JsonOption = False,
) -> None:
    """Recover a GPU's channel map by measurement, and verify it. Reads only; the GPU should be otherwise idle.

    With --known, a map from before is verified instead, and is the answer where it holds for this very chip.
    Refuses, with the reason, where the GPU is too noisy for a sure answer: for example because something else runs on it.
    """
    for path in (output, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise MisuseError(f"There is no directory {path.absolute().parent} to write {path.name} to.")
    name, why = resolve(device)
    screen = stderr_console()
    if why and not json:
        screen.print(f"Probing {name}: {why}.", markup=False)
    with open_gpu(name, seed=seed) as gpu, screen.status("opening") as status:
        if known is not None:
            found = map_for(
                gpu,
                known=known,
                pages=pages,
                interference=interference,
                seed=seed,
                progress=lambda text: status.update(text),
            )
        else:
            found = probe_gpu(
                gpu,
                pages=pages,
                samples=samples,
                interference=interference,
                seed=seed,
                progress=lambda text: status.update(text),
            )
    if counters:
        from missile.probe.counters import with_counters

        with screen.status("counting sectors per slice with ncu"):
            found = with_counters(found, name)
    if output is not None:
        write_map(found, output)
    if plot is not None:
        draw(found, plot)
    if json:
        print_json(to_json(found))
    else:
        _print(found, output)


def _print(found: ChannelMap, output: Path | None) -> None:
    table = Table(show_header=False, box=None)
    simulated = " (simulated)" if found.simulated else ""
    bases = ", ".join(str(digit.base) for digit in found.digits) or "none"
    topology = found.topology
    rows = [
        ("GPU", f"{found.gpu}{simulated}"),
        ("slices", f"{found.slices}"),
        (
            "granule",
            f"{found.granule_bytes} B in {len(found.layout.pieces())} piece(s) of {found.layout.piece_bytes} B",
        ),
        ("page", f"{found.page_bytes} B"),
        ("linear masks", " ".join(f"{mask:#x}" for mask in found.linear_masks) or "none"),
        ("non-linear digits", f"bases {bases}" if found.digits else "none"),
        ("channels", f"{len(found.channels)} groups of slices that share one" if found.channels else "not established"),
        ("colors", f"{len(found.colors)}, in frames of {found.frame_bytes} B"),
        ("SMs", f"{len(topology.sms)} in {len(topology.groups)} groups, {'2 halves' if topology.step else '1 half'}"),
        ("confidence", f"{found.confidence:.4%}"),
        ("seconds", f"{found.seconds:.1f}"),
    ]
    for key, value in rows:
        table.add_row(key, value)
    for witness in found.witnesses:
        table.add_row(f"witness: {witness.name}", f"{witness.verdict}: {witness.says}")
    screen = console()
    screen.print(table)
    if output is not None:
        screen.print(f"Written to {output}.", markup=False)
