"""`missile bench`: run a scenario, or a suite of them, under several policies; a table, raw results and report.html."""

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
from missile.cli.output import JsonOption, console, print_json, progress_bar
from missile.cli.stopping import stopping_on_sigterm
from missile.cli.suite import report_suite, run_suite
from missile.compiler.objective import OverlapChoice
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
    overlap: Annotated[
        OverlapChoice | None,
        typer.Option(
            metavar="HOW",
            help="Launches of LS models overlap as is best alone, beside BE work, or not: alone, beside, off.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where results.json and report.html go.")
    ] = _DEFAULT_OUT,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="RESULTS.json",
            help="Run nothing: table and report of an earlier run, or a suite's folder.",
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run what is missing of a whole suite in DIR: paper.")
    ] = None,
    cells: Annotated[
        str | None, typer.Option(metavar="A*,B*", help="With --suite: only cells whose names match, with commas.")
    ] = None,
    models: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="With --suite: only cells of these models.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget-s", metavar="SECONDS", help="With --suite: begin no cell that goes beyond it."),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --suite: the first N cells of a sample that is fair to all kinds."),
    ] = None,
    tuned_by: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="With --suite: of each baseline only settings that were its best in this suite."
        ),
    ] = None,
    most: Annotated[
        float | None,
        typer.Option(
            "--most-s",
            metavar="SECONDS",
            help="With --suite: no run is longer, also in cells whose slowest tenants would need that; the report says so.",
        ),
    ] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="With --suite: make cells again that were made otherwise.")
    ] = False,
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="sim:NAME", help="With --suite, or --report of one: run what was measured on a simulated GPU too."
        ),
    ] = None,
    explained: Annotated[
        bool, typer.Option("--explain", help="Say why missile's plan is what it is, and what would break first.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Run LS and BE tenants under each policy on the same arrivals, and compare.

    Options given here replace what the scenario file says. Ctrl-C and SIGTERM keep what has been measured so far.
    """
    if suite is None and (redo or any(given is not None for given in (cells, models, budget, sample, tuned_by, most))):
        raise MisuseError("--cells, --models, --sample, --tuned-by, --budget-s, --most-s and --redo go with --suite.")
    if predict is not None and suite is None and (report is None or not report.is_dir()):
        raise MisuseError("--predict goes with --suite, or with --report and a suite's folder.")
    if sum(choice is not None for choice in (scenario, report, suite)) > 1:
        raise MisuseError("Give a scenario to run, a --suite to run or a --report to show, and one of them only.")
    if overlap is not None and (suite is not None or report is not None):
        raise MisuseError(
            "--overlap goes with a scenario: in a suite all LS models' launches overlap, as is best alone."
        )
    if suite is not None:
        settings = {"duration_s": duration, "repeats": repeats, "seed": seed, "policies": _policies(policies)}
        settings["most_s"] = most
        run_suite(
            suite,
            Path("missile-out") / suite if out == _DEFAULT_OUT else out,
            {name: value for name, value in settings.items() if value is not None},
            device=device,
            patterns=_names(cells),
            models=_names(models),
            sampled=sample,
            tuned_by=tuned_by,
            budget_s=budget,
            redo=redo,
            predict_on=predict,
            as_json=json,
        )
        return
    if report is not None:
        if report.is_dir():
            report_suite(report, report if out == _DEFAULT_OUT else out, as_json=json, predict_on=predict)
            return
        where = report.parent if out == _DEFAULT_OUT else out
        _show(read_results(report), report, where, as_json=json, explained=explained)
        return
    chosen = read_scenario(scenario) if scenario else default_scenario()
    if duration is not None:
        # A short run asked for on the command line takes a short warm-up with it.
        chosen = chosen.changed(duration_s=duration, warmup_s=min(chosen.warmup_s, duration / 4))
    chosen = chosen.changed(device=device, policies=_policies(policies), repeats=repeats, seed=seed, overlap=overlap)
    from missile.bench.testbed import open_testbed

    with progress_bar() as bar:
        task = bar.add_task("starting", total=None)
        with open_testbed(chosen, lambda tenant: bar.update(task, description=f"loading {tenant}")) as testbed:
            if testbed.why and not json:
                bar.console.print(f"Device: {testbed.info.device} ({testbed.why}).", soft_wrap=True, markup=False)
            bench = Bench(chosen, testbed)
            bar.update(task, total=len(bench.steps))
            with stopping_on_sigterm() as check:

                def on_step(index: int, step: Step) -> None:
                    check()
                    bar.update(task, completed=index, description=str(step))

                results, stopped = run_all(bench, on_step)
    raw = out / "results.json"
    write_results(results, raw)
    _show(results, raw, out, as_json=json, explained=explained)
    if stopped is not None:
        raise stopped
    for tenant, error in results.failures.items():
        raise MissileError(f"Tenant {tenant!r} did not run to the end, the others did: {error}")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in (text or "").split(","))))


def _policies(text: str | None) -> tuple[str, ...] | None:
    """The policies in `text`. A comma also separates one policy's options: "partition:a=1,b=2,streams" names two."""
    if text is None:
        return None
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if names and "=" in part and ":" not in part:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return tuple(names)


def _show(results: Results, raw: Path, directory: Path, *, as_json: bool, explained: bool) -> None:
    """Write the report into `directory` and say what came out; `raw` is where the results are."""
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
                "plan": results.plan,
                "results": str(raw),
                "report": str(report),
            }
        )
        return
    screen = console()
    screen.print(render_table(results, summary))
    if explained:
        text = results.plan["text"] if results.plan else "Policy missile did not run, so nothing was planned."
        screen.print(f"\n{text}", soft_wrap=True, markup=False, highlight=False)
    screen.print(f"\nRaw samples: {raw}\nReport:      {report}", soft_wrap=True, markup=False)
