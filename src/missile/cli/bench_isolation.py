"""`missile bench isolation`: what a neighbour costs, with and without disjoint colors of memory."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import RenderableType

from missile.bench.isolation.models import DEFAULT_BE, DEFAULT_LS, RealPlan
from missile.bench.isolation.models_plot import plot_models
from missile.bench.isolation.models_results import RealResults, pair_outcomes
from missile.bench.isolation.models_run import run_real
from missile.bench.isolation.models_table import render_real, render_real_markdown
from missile.bench.isolation.plan import FULL, QUICK
from missile.bench.isolation.plot import plot_isolation
from missile.bench.isolation.results import IsolationResults, outcomes
from missile.bench.isolation.run import run_micro
from missile.bench.isolation.table import render_isolation, render_markdown
from missile.cli.output import DeviceOption, JsonOption, console, print_json, progress_bar
from missile.compiler.objective import OverlapChoice
from missile.files import write_whole
from missile.gpu import open_gpu, resolve

__all__ = ["command"]


class Part(StrEnum):
    MICRO = "micro"
    MODELS = "models"


def command(
    device: DeviceOption = "auto",
    part: Annotated[
        Part, typer.Option(help="Working sets of chosen sizes and colors, or whole models beside each other.")
    ] = Part.MICRO,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Where results and pictures go; an unfinished run goes on."),
    ] = Path("missile-out/isolation"),
    quick: Annotated[bool, typer.Option("--quick", help="Few cells: a look, or a test.")] = False,
    known: Annotated[
        Path | None,
        typer.Option("--map", metavar="MAP.json", help="A channel map to verify and use in place of a probe."),
    ] = None,
    ls: Annotated[str | None, typer.Option(metavar="A,B", help="LS models, with --part models.")] = None,
    be: Annotated[str | None, typer.Option(metavar="A,B", help="BE models, with --part models.")] = None,
    duration: Annotated[float, typer.Option(metavar="SECONDS", help="Length of a run, with --part models.")] = 0.3,
    overlap: Annotated[
        OverlapChoice, typer.Option(help="How launches of LS models overlap, with --part models.")
    ] = OverlapChoice.ALONE,
    note: Annotated[str, typer.Option(help="Kept with the results of --part models.")] = "",
    seed: Annotated[int, typer.Option(help="Of the choice of samples, and of the simulator's noise.")] = 0,
    json: JsonOption = False,
) -> None:
    """Measure what an aggressor does to a victim on split SMs, with shared and with disjoint colors of memory.

    Either both pass over working sets of chosen sizes on chosen colors, or each LS model runs beside each BE model, in
    plain memory and on two halves of the colors. The GPU should be otherwise idle.
    """
    plan = RealPlan(
        ls=_names(ls, DEFAULT_LS[:2] if quick else DEFAULT_LS),
        be=_names(be, DEFAULT_BE[2:4] if quick else DEFAULT_BE),
        duration_s=duration,
        warmup_s=duration / 6,
        seed=seed + 1,
        overlap=overlap,
    )
    name, why = resolve(device)
    with progress_bar() as bar:
        task = bar.add_task("opening", total=None)
        if why and not json:
            bar.console.print(f"Device: {name} ({why}).", soft_wrap=True, markup=False)

        def progress(done: int, count: int, text: str) -> None:
            bar.update(task, completed=done, total=count or None, description=text)

        with open_gpu(name, seed=seed) as gpu:
            if part is Part.MODELS:
                notes = (note,) if note else ()
                models = run_real(gpu, plan, out / "models.json", known=known, notes=notes, progress=progress)
            else:
                cells = QUICK if quick else FULL
                micro = run_micro(gpu, cells, out / "isolation.json", known=known, seed=seed, progress=progress)
    if part is Part.MODELS:
        write_whole(out / "models.md", render_real_markdown(models))
        plot_models(models, out / "models.png")
        _show(models, pair_outcomes(models), render_real(models), out / "models.json", as_json=json)
    else:
        write_whole(out / "isolation.md", render_markdown(micro))
        plot_isolation(micro, out / "isolation.png")
        _show(micro, outcomes(micro), render_isolation(micro), out / "isolation.json", as_json=json)


def _names(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if text is None else tuple(filter(None, (part.strip() for part in text.split(","))))


def _show(
    results: IsolationResults | RealResults,
    found: Sequence[BaseModel],
    text: RenderableType,
    raw: Path,
    *,
    as_json: bool,
) -> None:
    if as_json:
        print_json(
            {
                "simulated": results.simulated,
                "gpu": results.gpu,
                "device": results.device,
                "outcomes": [outcome.model_dump(mode="json") for outcome in found],
                "results": str(raw),
            }
        )
        return
    screen = console()
    screen.print(text)
    screen.print(f"\nRaw samples: {raw}", soft_wrap=True, markup=False)
