"""The simulator against what was measured: the same scenario, policies in the same order, and the table of its error."""

from __future__ import annotations

from pathlib import Path

import pytest

from missile.bench.fidelity import Comparison, compare, rank_by_be, rank_by_p99, simulate, tabulate_error
from missile.bench.results import Results, read_results
from missile.bench.summary import summarize

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
