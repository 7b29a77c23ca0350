"""The bench loop: its order, its arrivals, and what is left when something stops it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from missile.bench.report import render_report
from missile.bench.run import Bench, Planned, run_all
from missile.bench.scenario import Scenario
from missile.bench.summary import summarize
from missile.errors import KernelFaultError, MisuseError, UnsupportedError


def _run(scenario: Scenario, testbed: Any) -> Any:
    return run_all(Bench(scenario, testbed), lambda index, step: None)


def test_solo_first_then_every_policy_in_each_repeat(scenario: Scenario, toy_testbed: Any) -> None:
    testbed = toy_testbed()
    results, stopped = _run(scenario, testbed)
    tenants, policies = ["detect", "rank", "reindex", "decode"], ["temporal", "streams", "priority", "partition"]
    assert stopped is None
    assert testbed.calls == tenants * 3 + policies * 3
    assert [run.seed for run in results.runs if run.policy == "streams"] == [7, 8, 9]
    assert results.simulated
    assert not results.interrupted


def test_every_policy_meets_the_same_arrivals(scenario: Scenario, toy_testbed: Any) -> None:
    results, _ = _run(scenario, toy_testbed())
    for repeat in range(3):
        runs = [run for run in results.runs if run.repeat == repeat and run.kind == "policy"]
        firsts = {tuple(run.tenants[0].arrival_ns[:100]) for run in runs}
        assert len(firsts) == 1


def test_objectives_follow_from_solo_runs(scenario: Scenario, toy_testbed: Any) -> None:
    results, _ = _run(scenario, toy_testbed())
    detect, rank, reindex, _ = results.tenants
    alone = [
        run.tenants[0].record().latency
        for run in results.runs
        if run.tenants[0].name == "detect" and run.kind == "solo"
    ]
    pooled = sorted(value for latency in alone for value in latency.tolist())
    assert detect.slo_ms == pytest.approx(1.5 * pooled[-(-99 * len(pooled) // 100) - 1] / 1e6)
    assert (rank.slo_ms, reindex.slo_ms) == (6.0, None)
    assert reindex.batch == 32  # the model's usual one


def test_the_longest_of_too_few_requests_alone_stands_for_a_p99(scenario: Scenario, toy_testbed: Any) -> None:
    results, _ = _run(scenario.changed(duration_s=0.3, warmup_s=0.1, repeats=1), toy_testbed())
    alone = next(run for run in results.runs if run.kind == "solo").tenants[0].record().latency
    assert 20 <= len(alone) < 100
    assert results.tenants[0].slo_ms == pytest.approx(1.5 * max(alone) / 1e6)
    assert results.tenants[0].slo_text == f"1.5 × the longest of {len(alone)} solo requests"
    results, _ = _run(scenario.changed(duration_s=0.02, warmup_s=0.0, repeats=1), toy_testbed())
    assert results.tenants[0].slo_ms is None


def test_policies_are_told_objectives_in_ms(
    scenario: Scenario, toy_testbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    whole = toy_testbed.shared

    def listening(self: Any, tenants: Any, policy: str, **more: Any) -> Any:
        told.append([(tenant.slo_ms, tenant.slo_factor) for tenant in tenants])
        return whole(self, tenants, policy, **more)

    monkeypatch.setattr(toy_testbed, "shared", listening)
    results, _ = _run(scenario, toy_testbed())
    detect = results.tenants[0]
    assert all(row == [(detect.slo_ms, None), (6.0, None), (None, None), (None, None)] for row in told)


def test_missile_runs_what_the_planner_chose(
    scenario: Scenario, toy_testbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ran = [], []
    monkeypatch.setattr(toy_testbed, "describe", lambda self, policy: policy)

    def plan(self: Any, tenants: Any, *, seed: int, solos: Any) -> Planned:
        asked.append((seed, sorted(solos), solos["detect"].seed))
        return Planned("missile:pause=off,ls_share=0.5", {"accepted": True, "text": "So."})

    def shared(self: Any, tenants: Any, policy: str, **more: Any) -> Any:
        ran.append(policy)
        return self._run(tenants, "streams", policy, more["seed"], more["duration_ns"], more["warmup_ns"])

    monkeypatch.setattr(toy_testbed, "plan", plan)
    monkeypatch.setattr(toy_testbed, "shared", shared)
    policies = ("missile", "missile:preempt=off", "missile:ls_share=0.3,preempt=off", "streams")
    results, _ = _run(scenario.changed(policies=policies, repeats=2), toy_testbed())
    planned = "missile:pause=off,ls_share=0.5"
    assert ran == [planned, f"{planned},preempt=off", "missile:ls_share=0.3,preempt=off", "streams"] * 2
    # Once, on arrivals that no run has, knowing the first run of each tenant alone.
    assert asked == [(7 + 1_000_003, ["decode", "detect", "rank", "reindex"], 7)]
    assert results.plan == {"accepted": True, "text": "So."}
    assert [run.policy for run in results.runs[-4:]] == list(policies)
    assert "Why missile runs as it does" in render_report(results, summarize(results))


def test_interruption_keeps_what_was_measured(scenario: Scenario, toy_testbed: Any) -> None:
    results, stopped = _run(scenario, toy_testbed(fail_at={("priority", 8): KeyboardInterrupt()}))
    assert isinstance(stopped, KeyboardInterrupt)
    assert results.interrupted
    assert len(results.runs) == 12 + 4 + 2
    assert "interrupted" in results.notes[-1]


def test_a_fault_keeps_the_runs_before_it(scenario: Scenario, toy_testbed: Any) -> None:
    fault = KernelFaultError("cuEventQuery", "CUDA_ERROR_ILLEGAL_ADDRESS", tenant="decode")
    results, stopped = _run(scenario, toy_testbed(fail_at={("streams", 7): fault}))
    assert stopped is fault
    assert len(results.runs) == 12 + 1
    assert "decode" in results.notes[-1]


def test_a_run_that_a_fault_ended_is_kept_and_not_averaged_in(
    scenario: Scenario, toy_testbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toy_testbed.shared

    def faulty(self: Any, tenants: Any, policy: str, **more: Any) -> Any:
        record = whole(self, tenants, policy, **more)
        return dataclasses.replace(record, fault="Tenant decode's kernel faulted.") if policy == "priority" else record

    monkeypatch.setattr(toy_testbed, "shared", faulty)
    results, stopped = _run(scenario, toy_testbed())
    assert str(stopped) == "Tenant decode's kernel faulted."
    assert [run.policy for run in results.runs if run.kind == "policy"] == ["temporal", "streams", "priority"]
    assert [policy.policy for policy in summarize(results).policies] == ["temporal", "streams"]


@pytest.mark.parametrize(
    ("known", "suspects", "said"),
    [
        ("decode", ("decode",), "cuEventQuery failed for tenant 'decode':"),
        ("", ("decode",), "Tenant 'decode' ended the run: cuEventQuery failed:"),
        ("", ("rank", "decode"), "Tenant 'rank' or 'decode' ended the run: cuEventQuery failed:"),
        ("", (), "cuEventQuery failed:"),
    ],
)
def test_a_fault_names_the_tenants_that_may_be_to_blame(
    scenario: Scenario,
    toy_testbed: Any,
    monkeypatch: pytest.MonkeyPatch,
    known: str,
    suspects: tuple[str, ...],
    said: str,
) -> None:
    fault = str(KernelFaultError("cuEventQuery", "CUDA_ERROR_ILLEGAL_ADDRESS", tenant=known))
    whole = toy_testbed.shared

    def faulty(self: Any, tenants: Any, policy: str, **more: Any) -> Any:
        record = whole(self, tenants, policy, **more)
        blamed = [
            dataclasses.replace(tenant, error=f"Perhaps: {fault}" if tenant.name in suspects else "")
            for tenant in record.tenants
        ]
        return dataclasses.replace(record, fault=fault, tenants=tuple(blamed))

    monkeypatch.setattr(toy_testbed, "shared", faulty)
    results, stopped = _run(scenario, toy_testbed())
    assert str(stopped).startswith(said)
    assert results.runs[-1].fault == fault
    assert said in results.notes[-1]


def test_a_policy_that_this_gpu_cannot_do_is_left_out(scenario: Scenario, toy_testbed: Any) -> None:
    testbed = toy_testbed(fail_at={("partition", 7): UnsupportedError("no SM partitions here.")})
    results, stopped = _run(scenario, testbed)
    assert stopped is None
    assert testbed.calls.count("partition") == 1
    assert {run.policy for run in results.runs if run.kind == "policy"} == {"temporal", "streams", "priority"}
    assert results.notes == ["Policy partition was left out: no SM partitions here."]


def test_an_unknown_policy_stops_before_anything_runs(scenario: Scenario, toy_testbed: Any) -> None:
    testbed = toy_testbed()
    with pytest.raises(MisuseError, match=r"'fair'.*temporal, streams, priority, partition"):
        Bench(scenario.changed(policies=("streams", "fair")), testbed)
    assert testbed.calls == []
