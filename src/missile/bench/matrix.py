"""Every LS model next to every BE model, pair by pair: what `benchmarks/gpu_bench.py` runs and tabulates. Resumable.

Solo runs are made once per model and shared by all its pairs. Each pair is a results file of its own, written as soon as
the pair is done, so that a broken-off run goes on with the next pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from missile.bench.results import Results, Run, read_results, write_results
from missile.bench.run import Bench, Step, Testbed
from missile.bench.scenario import Scenario
from missile.bench.summary import PolicySummary, summarize
from missile.bench.table import format_share, three_digits
from missile.errors import MissileError

__all__ = ["Matrix", "Pair", "tabulate"]


@dataclass(frozen=True, slots=True)
class Pair:
    """An LS and a BE tenant, by name."""

    ls: str
    be: str

    @property
    def stem(self) -> str:
        return f"{self.ls}--{self.be}"


class Matrix:
    """All pairs of a scenario's LS and BE tenants under all its policies, into `directory`.

    scenario: holds every tenant; its policies, repeats and times hold for each pair.
    out_of_time: asked before each pair; True ends the run there (what is missing is made by the next call).
    """

    def __init__(self, scenario: Scenario, testbed: Testbed, directory: Path) -> None:
        self._scenario = scenario
        self._testbed = testbed
        self._directory = directory
        self.pairs = tuple(
            Pair(ls.name, be.name)
            for ls in scenario.tenants
            if ls.latency_sensitive
            for be in scenario.tenants
            if not be.latency_sensitive
        )

    def run(self, *, out_of_time: Callable[[], bool], say: Callable[[str], None]) -> list[Results]:
        """Make what is missing; returns the results of every pair that is there, in order."""
        found = {pair: results for pair in self.pairs if (results := self._read(pair)) is not None}
        missing = [pair for pair in self.pairs if pair not in found]
        solos = self._solos(missing, out_of_time, say)
        for pair in missing:
            if out_of_time():
                say(f"out of time; run it again for the {len(self.pairs) - len(found)} pairs that are missing")
                break
            found[pair] = self._run(pair, [*solos[pair.ls], *solos[pair.be]], say)
        return [found[pair] for pair in self.pairs if pair in found]

    def _solos(
        self, pairs: Sequence[Pair], out_of_time: Callable[[], bool], say: Callable[[str], None]
    ) -> dict[str, list[Run]]:
        solos: dict[str, list[Run]] = {}
        for name in dict.fromkeys(name for pair in pairs for name in (pair.ls, pair.be)):
            if out_of_time():
                break
            bench = Bench(self._scenario, self._testbed)
            for repeat in range(self._scenario.repeats):
                bench.execute(Step("solo", name, repeat))
            solos[name] = bench.runs
            say(f"{name} alone: done")
        return solos

    def _run(self, pair: Pair, solos: list[Run], say: Callable[[str], None]) -> Results:
        tenants = tuple(tenant for tenant in self._scenario.tenants if tenant.name in (pair.ls, pair.be))
        scenario = self._scenario.model_copy(update={"name": pair.stem, "tenants": tenants})
        bench = Bench(scenario, self._testbed, runs=list(solos))
        for step in bench.steps:
            if step.kind == "policy":
                bench.execute(step)
        results = bench.results()
        write_results(results, self._path(pair))
        line = "; ".join(f"{p.policy} {_verdict(p)}" for p in summarize(results).policies)
        say(f"{pair.ls} + {pair.be}: {line}")
        return results

    def _path(self, pair: Pair) -> Path:
        return self._directory / f"{pair.stem}.json.gz"

    def _read(self, pair: Pair) -> Results | None:
        """The pair's results when they are whole and of this scenario; else None, and they are made again."""
        try:
            results = read_results(self._path(pair))
        except MissileError:
            return None
        old, new = results.scenario, self._scenario
        same = (old.policies, old.repeats, old.duration_s, old.seed) == (
            new.policies,
            new.repeats,
            new.duration_s,
            new.seed,
        )
        return results if same and not results.interrupted else None


def _verdict(policy: PolicySummary) -> str:
    over = f"{policy.ls_over_solo:.2f}×" if policy.ls_over_solo else "–"
    return f"p99 {over} BE {format_share(policy.be_share)}"


def tabulate(results: Iterable[Results]) -> str:
    """A Markdown table: one row per pair and policy, with the pair's solo figures in a row before them."""
    figures = (
        "n",
        "LS p50 ms",
        "LS p99 ms (repeats)",
        "p99 / solo",
        "service p99 ms",
        "SLO met",
        "BE /s",
        "BE of solo",
    )
    lines = [f"| LS | BE | policy | {' | '.join(figures)} |", f"|{' --- |' * 3}{' ---: |' * len(figures)}"]
    for pair in results:
        summary = summarize(pair)
        for (policy, _, ls), (_, _, be) in zip(summary.ls_rows(), summary.be_rows(), strict=True):
            p99 = (
                "–"
                if ls.p99 is None
                else f"{three_digits(ls.p99.value)} ({three_digits(ls.p99.low)}–{three_digits(ls.p99.high)})"
            )
            cells = (
                ls.tenant,
                be.tenant,
                policy,
                str(ls.n),
                three_digits(ls.p50),
                p99,
                three_digits(ls.over_solo) if ls.over_solo else "",
                three_digits(ls.service_p99),
                format_share(ls.attainment),
                three_digits(be.rate.value),
                format_share(be.share.value) if be.share else "",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
