"""The simulator against what was measured: the same scenario, policies in the same order, and the table of its error."""

from __future__ import annotations

from pathlib import Path

import pytest

from missile.bench.fidelity import Comparison, compare, host_factor, rank_by_be, rank_by_p99, simulate, tabulate_error
from missile.bench.results import Results, Run, read_results
from missile.bench.summary import summarize
from missile.gpu import open_gpu

MEASURED = Path(__file__).parents[2] / "benchmarks/results/h200-default/results.json.gz"


@pytest.fixture(scope="module")
def measured() -> Results:
    return read_results(MEASURED)


def test_the_simulator_ranks_the_policies_as_the_gpu_does(measured: Results) -> None:
    once = measured.model_copy(update={"scenario": measured.scenario.model_copy(update={"repeats": 1})})
    simulated = simulate(once, "sim:h200", duration_s=1.6)
    assert simulated.simulated
    assert not measured.simulated
    here, there = summarize(simulated), summarize(measured)
    for tenant in ("detect", "classify"):  # the third has too few requests in this time for a p99
        assert rank_by_p99(here, tenant) == rank_by_p99(there, tenant)
    assert rank_by_be(here) == rank_by_be(there)


def test_the_host_is_as_slow_as_it_was_measured_alone(measured: Results) -> None:
    runs = [run for run in measured.runs if run.kind == "solo"]

    def slower(factor: float) -> list[Run]:
        """Solo runs whose requests waited longer to be launched."""
        changed = []
        for run in runs:
            (row,) = run.tenants
            late = [
                at + round(factor * (launched - at))
                for at, launched in zip(row.arrival_ns, row.dispatch_ns, strict=True)
            ]
            changed.append(run.model_copy(update={"tenants": [row.model_copy(update={"dispatch_ns": late})]}))
        return changed

    assert host_factor(runs, runs) == 1.0
    assert host_factor(slower(3.0), runs) == pytest.approx(3.0, rel=1e-3)
    assert host_factor([], runs) == 1.0


def test_a_slower_host_makes_calls_cost_more_and_nothing_else() -> None:
    with open_gpu("sim:h200") as gpu:
        event, stream = gpu.create_event(), gpu.create_stream()
        took = []
        for factor in (1.0, 3.0):
            gpu.slow_host(factor)
            begin = gpu.now_ns()
            stream.record(event)
            took.append(gpu.now_ns() - begin)
        assert took[1] == pytest.approx(3 * took[0], abs=2)


def test_a_run_compared_with_itself_has_no_error(measured: Results) -> None:
    found = compare(summarize(measured), summarize(measured))
    assert {one.figure for one in found} == {"p50", "p99", "rate"}
    assert {one.policy for one in found} == {"temporal", "streams", "priority", "partition"}
    assert all(one.ratio == 1.0 for one in found)
    assert "Furthest off" not in tabulate_error(found)


def test_the_table_counts_what_is_close_and_names_what_is_not() -> None:
    def one(ratio: float, tenant: str = "a") -> Comparison:
        return Comparison("streams", tenant, "b", "p99", 2.0, 2.0 * ratio)

    table = tabulate_error([one(1.1), one(0.9), one(4.0, "far")])
    assert "| streams | p99 | 3 | 1.58 | 2.24 | 2 |" in table
    assert "| streams | far | b | p99 | 2 | 8 |" in table
    assert "| streams | a |" not in table
