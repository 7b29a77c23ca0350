"""The simulator against what was measured: the same scenario, policies in the same order, and the table of its error."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from missile.bench.fidelity import (
    Comparison,
    compare,
    host_factor,
    rank_by_be,
    rank_by_p99,
    service_factors,
    simulate,
    tabulate_error,
)
from missile.bench.results import Results, Run, read_results
from missile.bench.run import Bench, run_all
from missile.bench.scenario import Scenario
from missile.bench.summary import summarize
from missile.bench.testbed import open_testbed
from missile.gpu import open_gpu
from missile.runtime.loading import load_tenants
from missile.runtime.run import solo
from missile.runtime.tenant import Tenant

TENANT = Tenant.model_validate({"name": "ls", "class": "LS", "model": "synthetic-gemv", "arrivals": {"kind": "closed"}})
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
    found, wanted = ({policy.policy: policy.be_share or 0.0 for policy in one.policies} for one in (here, there))
    for more, less in itertools.combinations(rank_by_be(there), 2):
        if wanted[more] > 1.02 * wanted[less]:  # streams and priority give BE the same but for 0.2%
            assert found[more] > found[less]


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


def test_kernels_take_what_they_were_measured_to_take_alone(measured: Results) -> None:
    runs = [run for run in measured.runs if run.kind == "solo"]

    def scaled(run: Run, factor: float) -> Run:
        (row,) = run.tenants
        ends = [start + round(factor * (end - start)) for start, end in zip(row.start_ns, row.end_ns, strict=True)]
        return run.model_copy(update={"tenants": [row.model_copy(update={"end_ns": ends})]})

    shorter = [scaled(run, 0.8 if run.tenants[0].name == "detect" else 1.0) for run in runs]
    assert service_factors(shorter, runs) == pytest.approx(
        {run.tenants[0].name: 0.8 if run.tenants[0].name == "detect" else 1.0 for run in runs}, rel=1e-3
    )
    assert service_factors([], runs) == {}


def test_what_is_known_of_tenants_alone_is_enough_where_nothing_else_differs() -> None:
    """At a load that kernels as profiled could not take: what the host costs is told after kernels have their pace."""
    arrivals = {"kind": "poisson", "rate_per_s": 9000}
    ls = {"name": "ls", "class": "LS", "model": "synthetic-tiny", "arrivals": arrivals}
    scenario = Scenario.model_validate(
        {"device": "sim:h200", "duration_s": 0.1, "warmup_s": 0.01, "policies": ["streams"], "tenant": [ls]}
    )
    with open_testbed(scenario) as testbed:
        testbed.gpu.pace_kernels("ls", 0.5)
        testbed.gpu.slow_host(2.0)
        measured, _ = run_all(Bench(scenario, testbed), lambda *_: None)
    simulated = simulate(measured, "sim:h200")
    assert host_factor(measured.runs, simulated.runs) == pytest.approx(1.0, rel=0.1)
    assert service_factors(measured.runs, simulated.runs)["ls"] == pytest.approx(1.0, rel=0.02)
    (there,), (here,) = summarize(measured).solo_ls, summarize(simulated).solo_ls
    assert here.p50 == pytest.approx(there.p50, rel=0.05)
    assert here.p99.value == pytest.approx(there.p99.value, rel=0.1)


def test_a_plan_of_another_version_is_left_out_and_the_rest_is_simulated() -> None:
    tenants = [
        {"name": "ls", "class": "LS", "model": "synthetic-tiny", "arrivals": {"kind": "poisson", "rate_per_s": 1000}},
        {"name": "be", "class": "BE", "model": "synthetic-gemv", "arrivals": {"kind": "closed"}},
    ]
    scenario = {"device": "sim:h200", "duration_s": 0.1, "warmup_s": 0.01, "policies": ["streams"], "tenant": tenants}
    parsed = Scenario.model_validate(scenario)
    with open_testbed(parsed) as testbed:
        measured, _ = run_all(Bench(parsed, testbed), lambda *_: None)
    both = parsed.model_copy(update={"policies": ("streams", "missile")})
    old = measured.model_copy(update={"scenario": both, "plan": {"policy": "missile:no_such_option=1"}})
    simulated = simulate(old, "sim:h200")
    assert {run.policy for run in simulated.runs if run.kind == "policy"} == {"streams"}
    assert any("no_such_option" in note for note in simulated.notes)


def test_a_tenant_s_pace_scales_its_kernels_and_gaps_and_nobody_else_s() -> None:
    def took(factor: float, of: str) -> int:
        with open_gpu("sim:h200") as gpu, load_tenants(gpu, [TENANT]) as roster:
            gpu.pace_kernels(of, factor)
            record = solo(gpu, roster, "ls", seed=1, duration_ns=20_000_000)
            return int(np.median(record.tenants[0].service))

    assert took(0.5, "ls") == pytest.approx(0.5 * took(1.0, "ls"), rel=0.02)
    assert took(0.5, "other") == took(1.0, "ls")


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
