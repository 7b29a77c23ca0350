"""`missile bench --suite` and what belongs to it: run what is missing of a suite, predict it, and report what is there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from missile.bench.fidelity import compare
from missile.bench.scenario import Scenario
from missile.bench.suite.cells import SETTINGS, SUITES, Cell, select, settings_of
from missile.bench.suite.files import SuiteFolder, SuiteSettings, SuiteState
from missile.bench.suite.report import SuiteReport, write_suite_report
from missile.bench.suite.run import SuiteRun, predict
from missile.bench.suite.sampling import SAMPLE_RULE, sample, settings_that_won
from missile.bench.suite.summary import summarize_cells
from missile.bench.suite.tables import claim_table, family_table, to_terminal
from missile.bench.summary import summarize
from missile.cli.output import console, print_json, progress_bar
from missile.cli.stopping import stopping_on_sigterm
from missile.errors import MisuseError
from missile.gpu import open_gpu, resolve

__all__ = ["report_suite", "run_suite"]


def run_suite(
    name: str,
    out: Path,
    given: dict[str, Any],
    *,
    device: str | None,
    patterns: Sequence[str],
    models: Sequence[str],
    sampled: int | None,
    tuned_by: Path | None,
    budget_s: float | None,
    redo: bool,
    predict_on: str | None,
    as_json: bool,
) -> None:
    """Run what is missing of suite `name` in `out`, then report it.

    given: settings of the command line, by field of `SuiteSettings`; others are the folder's, or the defaults.
    sampled: run so many cells of the suite's sample. tuned_by: an earlier suite: baselines run only at settings that were
    their best somewhere in it. predict_on: a simulated GPU to run every measured cell on as well. Ctrl-C and SIGTERM end it
    with a report of the cells that are whole.
    """
    if name not in SUITES:
        raise MisuseError(f"Unknown suite {name!r}; known: {', '.join(SUITES)}.")
    if budget_s is not None and not budget_s > 0:
        raise MisuseError(f"--budget-s must be above 0, not {budget_s:g}.")
    _check_prediction(predict_on)
    cells = SUITES[name]()
    chosen = select(cells if sampled is None else sample(cells, sampled), patterns, models)
    how = [] if len(chosen) == len(cells) else [_how(len(chosen), patterns, models, sampled)]
    if tuned_by is not None:
        given["policies"], text = _tuned(tuned_by, given.get("policies") or tuple(SETTINGS))
        how.append(text)
    folder = SuiteFolder(out)
    folder.require(name, None, given)
    concrete, why = resolve(device or "auto")
    with open_gpu(concrete) as gpu:  # for its name alone: the models are loaded when it is known what is missing
        info = gpu.info
    folder.require(name, info, given)
    state = folder.state() or SuiteState(
        schema="missile-suite/1",
        suite=name,
        gpu=info.name,
        simulated=info.simulated,
        settings=SuiteSettings.given(given),
    )
    how += _cut(chosen, state.settings)
    state = state.model_copy(update={"chosen": tuple(dict.fromkeys((*state.chosen, *how)))})
    stopped: KeyboardInterrupt | None = None
    with progress_bar() as bar:
        task = bar.add_task("starting", total=None)

        def say(text: str) -> None:
            bar.console.print(text, soft_wrap=True, markup=False, highlight=False)

        def testbed(scenario: Scenario) -> AbstractContextManager[Any]:
            from missile.bench.testbed import open_testbed

            there = scenario.model_copy(update={"device": concrete, "seed": state.settings.seed})
            return open_testbed(there, lambda tenant: bar.update(task, description=f"loading {tenant}"))

        if why and not as_json:
            say(f"Device: {concrete} ({why}).")
        quiet = (lambda _: None) if as_json else say
        run = SuiteRun(folder, state, chosen, testbed, quiet, redo=redo)
        try:
            with stopping_on_sigterm() as run.check:
                run.run(budget_s)
            if predict_on is not None:
                for cell in predict(folder, chosen, predict_on, quiet):
                    bar.update(task, description=f"predicted {cell}")
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
    if folder.state() is not None:
        report_suite(out, out, as_json=as_json)
    if stopped is not None:
        raise stopped


def _how(count: int, patterns: Sequence[str], models: Sequence[str], sampled: int | None) -> str:
    """How cells were chosen, as a report says it."""
    parts = [] if sampled is None else [SAMPLE_RULE]
    parts += [f"names like {', '.join(patterns)}"] if patterns else []
    parts += [f"models {', '.join(models)} only"] if models else []
    return f"{count} cells asked for: {'; '.join(parts)}."


def _cut(cells: Sequence[Cell], settings: SuiteSettings) -> list[str]:
    """Which cells' runs are shorter than they would be, as a report says it."""
    shorter = {}
    for cell in cells:
        whole = cell.duration_s(settings.duration_s, settings.warmup_s)
        if settings.most_s is not None and settings.most_s < whole:
            shorter[cell.name] = whole
    if not shorter:
        return []
    names = ", ".join(f"{name} ({whole:g} s)" for name, whole in shorter.items())
    return [
        f"Runs were cut to {settings.most_s:g} s in cells that would take longer: {names}. LS tenants with fewer than 100 "
        "requests in a run have no p99 there; their objective goes by the longest of their requests alone."
    ]


def _tuned(source: Path, policies: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """`policies` as an earlier suite leaves them, and that in a sentence."""
    folder = SuiteFolder(source)
    if (state := folder.state()) is None:
        raise MisuseError(f"{source} holds no suite: there is no suite.json in it.")
    cells: tuple[Cell, ...] = SUITES[state.suite]()
    found = summarize_cells(cells, folder.read(cells))
    kept = settings_that_won(policies, found)
    gone = [setting for setting in settings_of(policies) if setting not in kept]
    text = (
        f"Baselines run at the settings that were their best in at least one of {len(found)} cells measured before "
        f"({state.gpu}); left out: {', '.join(gone) or 'none'}."
    )
    return kept, text


def report_suite(source: Path, out: Path, *, as_json: bool, predict_on: str | None = None) -> None:
    """Table, `report.html` and `tables.md` of the suite that lies in `source`, its cells predicted first where asked for."""
    _check_prediction(predict_on)
    folder = SuiteFolder(source)
    state = folder.state()
    if state is None:
        raise MisuseError(f"{source} holds no suite: there is no suite.json in it.")
    if predict_on is not None:
        with progress_bar() as bar:
            task = bar.add_task("predicting", total=None)
            for cell in predict(folder, SUITES[state.suite](), predict_on, lambda _: None):
                bar.update(task, description=f"predicted {cell}")
    report = gather(folder, state)
    page = write_suite_report(report, out)
    if as_json:
        print_json(
            {
                "simulated": state.simulated,
                "gpu": state.gpu,
                "cells": [cell.cell.name for cell in report.cells],
                "planned": report.planned,
                "families": [asdict(family) for family in report.families],
                "claims": [asdict(claim) for claim in report.claims],
                "report": str(page),
            }
        )
        return
    what = f"{state.gpu} · suite {state.suite} · {len(report.cells)} of {report.planned} cells"
    title = Text.assemble(("simulated " if state.simulated else "", "bold yellow"), (what, "bold"))
    tables = [to_terminal(family_table(report.families))]
    if report.claims:
        tables.append(to_terminal(claim_table(report.claims)))
    screen = console()
    screen.print(Group(title, Text(""), *tables))
    screen.print(f"Raw samples: {source / 'cells'}\nReport:      {page}", soft_wrap=True, markup=False)


def _check_prediction(device: str | None) -> None:
    if device is not None and not device.startswith("sim:"):
        raise MisuseError(f"--predict takes a simulated GPU, such as sim:h200, not {device!r}.")


def gather(folder: SuiteFolder, state: SuiteState) -> SuiteReport:
    """Everything a report of the folder says."""
    cells: tuple[Cell, ...] = SUITES[state.suite]()
    results = folder.read(cells)
    simulated = folder.read(cells, simulated=True)
    predictions = [
        comparison
        for name, measured in results.items()
        if name in simulated
        for comparison in compare(summarize(measured), summarize(simulated[name]))
    ]
    on = next((prediction.device for prediction in simulated.values()), "")
    return SuiteReport(state, len(cells), summarize_cells(cells, results), results, predictions, on)
