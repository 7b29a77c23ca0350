"""Running a suite: capacities, then cell by cell, each kept as soon as it is whole. Resumable at every cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from missile.bench.fidelity import simulate
from missile.bench.results import Results, Run
from missile.bench.run import Bench, Step, Testbed
from missile.bench.scenario import Scenario
from missile.bench.suite.cells import Cell, settings_of
from missile.bench.suite.files import SuiteFolder, SuiteState
from missile.bench.summary import summarize
from missile.bench.table import format_share, three_digits
from missile.errors import GpuError, MissileError
from missile.runtime.tenant import Tenant

__all__ = ["SuiteRun", "predict"]

Say = Callable[[str], None]

_CAPACITY_S = 0.3  # of each model, after a tenth of it


@dataclass
class SuiteRun:
    """Makes what is missing of `cells` in `folder`.

    open_testbed: loads a scenario's tenants; asked once, for all that the missing cells need. clock: seconds.
    redo: cells that were made otherwise are made again instead of refused. check: called before each run; raises what ends
    the suite.
    """

    folder: SuiteFolder
    state: SuiteState
    cells: Sequence[Cell]
    open_testbed: Callable[[Scenario], AbstractContextManager[Any]]
    say: Say
    clock: Callable[[], float] = time.monotonic
    redo: bool = False
    check: Callable[[], None] = lambda: None
    _solos: dict[tuple[str, float], list[Run]] = field(default_factory=dict, init=False)
    _began: float = field(default=0.0, init=False)

    def run(self, budget_s: float | None = None) -> list[str]:
        """Run until all is there, or the next cell would not fit in `budget_s`, judged by the length of its runs and the
        slowest cell before it.

        Returns the names of the cells that are still missing.

        Raises what made further cells pointless: a lost GPU, Ctrl-C. What was whole by then is kept.
        """
        began = self._began = self.clock()
        missing = [cell for cell in self.cells if not self._done(cell)]
        if not missing:
            return []
        everything = self._everything(missing)
        with self.open_testbed(everything) as testbed:
            self.folder.keep_state(self.state)
            # All at once, where there is room for all: processes start side by side, and serve several cells.
            testbed.prepare(everything.tenants, everything.policies)
            self._measure_capacities(missing, testbed)
            left = list(missing)
            pace = 0.0  # the slowest cell so far, per second of its runs
            while left:
                expected = pace * _run_s(self._scenario(left[0]))
                if budget_s is not None and self.clock() - began + expected > budget_s:
                    self._say(f"out of time: {len(left)} of {len(self.cells)} cells are missing")
                    break
                cell = left.pop(0)
                scenario = self._scenario(cell)
                testbed.prepare(scenario.tenants, scenario.policies)
                start = self.clock()
                self._run_cell(cell, scenario, testbed)
                pace = max(pace, (self.clock() - start) / _run_s(scenario))
        return [cell.name for cell in left]

    def _done(self, cell: Cell) -> bool:
        try:
            scenario = self._scenario(cell)
        except KeyError:  # a capacity that was never measured
            return False
        return self.folder.done(cell, scenario, redo=self.redo)

    def _scenario(self, cell: Cell) -> Scenario:
        settings = self.state.settings
        return cell.scenario(
            self.state.capacity,
            most_s=settings.most_s,
            duration_s=settings.duration_s,
            warmup_s=settings.warmup_s,
            repeats=settings.repeats,
            seed=settings.seed,
            policies=settings_of(settings.policies),
        )

    def _everything(self, cells: Sequence[Cell]) -> Scenario:
        """A scenario with every tenant of `cells`, for the testbed to load. Their arrivals come with each run."""
        tenants = {
            tenant["name"]: tenant | {"arrivals": {"kind": "closed"}} for cell in cells for tenant in cell.tenants
        }
        policies = settings_of(self.state.settings.policies)
        return Scenario.model_validate({"duration_s": 1.0, "policies": policies, "tenant": list(tenants.values())})

    def _measure_capacities(self, cells: Sequence[Cell], testbed: Testbed) -> None:
        """Of the LS models that `cells` need and that have none yet."""
        wanted = {t["model"]: t for cell in cells for t in cell.tenants if t["class"] == "LS"}
        for model, tenant in wanted.items():
            if model in self.state.capacity:
                continue
            self.check()
            loop = Tenant.model_validate({**tenant, "arrivals": {"kind": "closed", "depth": 2}})
            duration = round(_CAPACITY_S * 1e9)
            record = testbed.solo(loop, seed=self.state.settings.seed, duration_ns=duration, warmup_ns=duration // 10)
            if record.interrupted:
                raise KeyboardInterrupt
            rate = len(record.tenants[0].done) / (0.9 * _CAPACITY_S)
            if not rate:
                raise MissileError(
                    f"{model} finished nothing alone, so its capacity is unknown: {record.tenants[0].error}"
                )
            self.state = self.state.model_copy(update={"capacity": {**self.state.capacity, model: round(rate, 1)}})
            self.folder.keep_state(self.state)
            self._say(f"{model} alone: {rate:.0f} requests/s at most")

    def _run_cell(self, cell: Cell, scenario: Scenario, testbed: Testbed) -> None:
        solos = [run for tenant in scenario.tenants for run in self._solo(tenant, scenario, testbed)]
        bench = Bench(scenario, testbed, runs=solos)
        given_up: set[str] = set()
        for step in bench.steps:
            if step.kind == "policy" and step.what not in given_up:
                self.check()
                try:
                    bench.execute(step)
                except MissileError as error:
                    if _lost(testbed, error):
                        raise
                    given_up.add(step.what)
                    bench.notes.append(f"Policy {step.what} was left out: {error}")
        self.folder.keep(bench.results(), self.folder.cell_path(cell))
        self._say(f"{cell.name}: {_in_short(bench.results())}")

    def _say(self, text: str) -> None:
        self.say(f"[{self.clock() - self._began:6.1f} s] {text}")

    def _solo(self, tenant: Tenant, scenario: Scenario, testbed: Testbed) -> list[Run]:
        """The tenant alone on these arrivals; cells in which it has the same share one measurement of this call."""
        key = (tenant.model_dump_json(), scenario.duration_s)
        if key not in self._solos:
            alone = Bench(scenario, testbed)
            for repeat in range(scenario.repeats):
                alone.execute(Step("solo", tenant.name, repeat))
            self._solos[key] = alone.runs
        return self._solos[key]


def _run_s(scenario: Scenario) -> float:
    """Seconds of all runs of a cell."""
    return scenario.duration_s * scenario.repeats * (len(scenario.policies) + len(scenario.tenants))


def _lost(testbed: Testbed, error: MissileError) -> bool:
    """Whether nothing can be run any more after `error`."""
    if isinstance(error, GpuError) and error.usable == "nothing":
        return True
    gpu = getattr(testbed, "gpu", None)
    try:
        if gpu is not None:
            gpu.synchronize()
    except GpuError:
        return True
    return False


def _in_short(results: Results) -> str:
    parts = []
    for policy in summarize(results).policies:
        over = three_digits(policy.ls_over_solo) + "×" if policy.ls_over_solo else "–"
        parts.append(f"{policy.policy} p99 {over} BE {format_share(policy.be_share)}")
    return "; ".join(parts)


def predict(folder: SuiteFolder, cells: Sequence[Cell], device: str, say: Say) -> Iterator[str]:
    """Run every measured cell again on the simulated GPU `device`, those that have no prediction yet; yields their names."""
    for name, measured in folder.read(cells).items():
        cell = next(cell for cell in cells if cell.name == name)
        path = folder.prediction_path(cell)
        if path.is_file():
            continue
        folder.keep(simulate(measured, device), path)
        say(f"{name}: predicted on {device}")
        yield name
