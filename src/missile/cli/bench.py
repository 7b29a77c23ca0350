"""`missile bench`: run a scenario under several policies; a table, results.json and report.html."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from missile.bench.report import write_report
from missile.bench.results import Results, read_results, write_results
from missile.bench.run import Bench, Step, run_all
from missile.bench.scenario import default_scenario, read_scenario
from missile.bench.summary import summarize
from missile.bench.table import render_table
from missile.cli.output import JsonOption, console, print_json, progress_bar, stderr_console
from missile.errors import MissileError, MisuseError

__all__ = ["command"]

_DEFAULT_OUT = Path("missile-out/bench")


def command(
    scenario: Annotated[
        Path | None, typer.Argument(metavar="[SCENARIO.toml]", help="What to run. Without it: the default scenario.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", "-d", metavar="DEVICE", help="auto, cuda:N, sim:NAME or sim:PATH.toml.")
    ] = None,
    policies: Annotated[
        str | None, typer.Option("--policies", "-p", metavar="A,B,C", help="Policies to compare, with commas.")
    ] = None,
    duration: Annotated[float | None, typer.Option(metavar="SECONDS", help="Length of each run.")] = None,
    repeats: Annotated[int | None, typer.Option(metavar="N", help="How often each policy is run.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of arrivals and noise.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where results.json and report.html go.")
    ] = _DEFAULT_OUT,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="RESULTS.json", help="Run nothing: table and report of an earlier run."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run LS and BE tenants under each policy on the same arrivals, and compare.

    Options given here replace what the scenario file says. Ctrl-C keeps what has been measured so far.
    """
    if report is not None:
        if scenario is not None:
            raise MisuseError("Give a scenario to run or --report with results to show, not both.")
        _show(read_results(report), report.parent if out == _DEFAULT_OUT else out, as_json=json)
        return
    chosen = read_scenario(scenario) if scenario else default_scenario()
    if duration is not None:
        # A short run asked for on the command line takes a short warm-up with it.
        chosen = chosen.changed(duration_s=duration, warmup_s=min(chosen.warmup_s, duration / 4))
    names = None if policies is None else tuple(name.strip() for name in policies.split(",") if name.strip())
    chosen = chosen.changed(device=device, policies=names, repeats=repeats, seed=seed)
    from missile.bench.testbed import open_testbed

    with open_testbed(chosen) as testbed:
        if testbed.why_device and not json:
            stderr_console().print(f"Device: {testbed.info.device} ({testbed.why_device}).", soft_wrap=True)
        bench = Bench(chosen, testbed)
        results, stopped = _run(bench)
    write_results(results, out / "results.json")
    _show(results, out, as_json=json)
    if stopped is not None:
        raise stopped


def _run(bench: Bench) -> tuple[Results, KeyboardInterrupt | MissileError | None]:
    with progress_bar() as bar:
        task = bar.add_task("starting", total=len(bench.steps))

        def on_step(index: int, step: Step) -> None:
            repeat = f"repeat {step.repeat + 1}/{bench.scenario.repeats}"
            bar.update(task, completed=index, description=f"{step}, {repeat}")

        return run_all(bench, on_step)


def _show(results: Results, directory: Path, *, as_json: bool) -> None:
    """Write the report into `directory` and say what came out."""
    summary = summarize(results)
    report = write_report(results, summary, directory / "report.html")
    if as_json:
        print_json(
            {
                "simulated": results.simulated,
                "gpu": results.gpu,
                "device": results.device,
                "interrupted": results.interrupted,
                "notes": results.notes,
                "summary": asdict(summary),
                "results": str(directory / "results.json"),
                "report": str(report),
            }
        )
        return
    screen = console()
    screen.print(render_table(results, summary))
    screen.print(f"\nRaw samples: {directory / 'results.json'}\nReport:      {report}", soft_wrap=True)
