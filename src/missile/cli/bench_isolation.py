"""`missile bench isolation`: what a neighbour costs, with and without disjoint colors of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from missile.bench.isolation_plan import FULL, QUICK
from missile.bench.isolation_plot import plot_isolation
from missile.bench.isolation_results import outcomes
from missile.bench.isolation_run import run_micro
from missile.bench.isolation_table import render_isolation, render_markdown
from missile.cli.output import DeviceOption, JsonOption, console, print_json, progress_bar
from missile.files import write_whole
from missile.gpu import open_gpu, resolve

__all__ = ["command"]


def command(
    device: DeviceOption = "auto",
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Where isolation.json and pictures go; an unfinished run goes on."
        ),
    ] = Path("missile-out/isolation"),
    quick: Annotated[bool, typer.Option("--quick", help="Few cells: a look, or a test.")] = False,
    known: Annotated[
        Path | None,
        typer.Option("--map", metavar="MAP.json", help="A channel map to verify and use in place of a probe."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of samples, and of the simulator's noise.")] = 0,
    json: JsonOption = False,
) -> None:
    """Measure what an aggressor does to a victim on split SMs, with shared and with disjoint colors of memory.

    Victim and aggressor pass over working sets of chosen sizes, on chosen colors; nothing of the slices is shared where
    their colors differ. The GPU should be otherwise idle.
    """
    name, why = resolve(device)
    path = out / "isolation.json"
    with progress_bar() as bar:
        task = bar.add_task("opening", total=None)
        if why and not json:
            bar.console.print(f"Device: {name} ({why}).", soft_wrap=True, markup=False)
        with open_gpu(name, seed=seed) as gpu:
            results = run_micro(
                gpu,
                QUICK if quick else FULL,
                path,
                known=known,
                seed=seed,
                progress=lambda done, count, text: bar.update(
                    task, completed=done, total=count or None, description=text
                ),
            )
    write_whole(out / "isolation.md", render_markdown(results))
    plot_isolation(results, out / "isolation.png")
    if json:
        print_json(
            {
                "simulated": results.simulated,
                "gpu": results.gpu,
                "device": results.device,
                "outcomes": [outcome.model_dump(mode="json") for outcome in outcomes(results)],
                "results": str(path),
            }
        )
        return
    screen = console()
    screen.print(render_isolation(results))
    screen.print(f"\nRaw samples: {path}", soft_wrap=True, markup=False)
