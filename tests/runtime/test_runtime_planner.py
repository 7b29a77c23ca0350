from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from missile.errors import MisuseError
from missile.gpu.work import KernelWork
from missile.runtime import planning
from missile.runtime.explanation import explain, plan_data
from missile.runtime.lending import lending
from missile.runtime.loading import load_tenants
from missile.runtime.planner import (
    Candidate,
    Measured,
    candidates,
    fitting_sms,
    make_plan,
    rates_changed,
)
from missile.runtime.planning import plan_tenants
from missile.runtime.policies import create_policy
from missile.runtime.prediction import Demand, Machine, Share, predict, service_on, wait_p99
from missile.runtime.preempting import make_preemptible
from missile.runtime.run import run, solo

MACHINE = Machine(sms=132, unit=8, least=8, memory_rate=4e12)
MS = 1e6

kernels = st.builds(
    KernelWork,
    blocks=st.integers(1, 5000),
    blocks_per_sm=st.integers(1, 8),
    footprint_bytes=st.integers(0, 1 << 27),
    solo_ns=st.floats(1_000.0, 1e5),
)
models = st.lists(kernels, min_size=1, max_size=12).map(tuple)


def ls(
    name: str = "ls", rate: float = 300.0, slo_ms: float | None = 1.0, service_ms: float = 0.3, **more: object
) -> Demand:
    return Demand(name, True, service_ms * MS, rate, None if slo_ms is None else slo_ms * MS, **more)


def be(name: str = "be", **more: object) -> Demand:
    return Demand(name, False, 5 * MS, works=(KernelWork(4000, solo_ns=20_000.0),), **more)


# --- prediction
@given(works=models, fewer=st.integers(8, 131), more=st.integers(8, 132))
def test_fewer_sms_are_never_faster_and_all_of_them_are_as_alone(works, fewer, more):
    demand = ls(works=works)
    low, high = sorted((fewer, more))
    assert service_on(demand, MACHINE, low) >= service_on(demand, MACHINE, high) * (1 - 1e-9)
    assert service_on(demand, MACHINE, high) >= demand.service_ns * (1 - 1e-9)
    assert service_on(demand, MACHINE, 132) == demand.service_ns


def test_kernels_that_need_few_sms_or_wait_for_memory_keep_their_speed():
    small = ls(works=(KernelWork(16, solo_ns=10_000.0),))
    assert service_on(small, MACHINE, 32) == pytest.approx(small.service_ns)
    full = KernelWork(1320, solo_ns=100_000.0)
    assert service_on(ls(works=(full,)), MACHINE, 66) == pytest.approx(2 * 0.3 * MS)
    hungry = replace(full, footprint_bytes=400_000_000)
    assert service_on(ls(works=(hungry,)), MACHINE, 66) == pytest.approx(0.3 * MS)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_the_wait_is_that_of_a_simulated_queue(load):
    rng = np.random.default_rng(1)
    gaps = rng.exponential(1 / load, 400_000)
    wait, waits = 0.0, np.empty(len(gaps))
    for index, gap in enumerate(gaps):
        wait = max(wait - gap, 0.0)
        waits[index] = wait
        wait += 1.0
    assert wait_p99(load, 1.0) == pytest.approx(np.quantile(waits, 0.99), rel=0.3)


@given(rate=st.floats(1.0, 3000.0), growth=st.floats(1.0, 3.0), kept=st.sampled_from([32, 64, 96, 132]))
def test_more_requests_wait_longer_and_leave_less(rate, growth, kept):
    now = predict(Share(kept), [ls(rate=rate), be()], MACHINE)
    later = predict(Share(kept), [ls(rate=rate), be()], MACHINE, rate_factor=growth)
    assert later.load >= now.load
    assert later.p99_ns["ls"] >= now.p99_ns["ls"]
    assert later.be_rate <= now.be_rate + 1e-9
    assert 0.0 <= later.be_rate <= 1.0 + 1e-9


def test_separated_memory_and_preemption_help():
    hungry = Demand("be", False, 5 * MS, works=(KernelWork(4000, solo_ns=20_000.0, footprint_bytes=60_000_000),))
    shared = predict(Share(64), [ls(), hungry], MACHINE)
    apart = predict(Share(64, separated=True), [ls(), hungry], MACHINE)
    leaving = predict(Share(64), [ls(), replace(hungry, preemptible=True)], MACHINE)
    staying = predict(Share(64, preempts=False), [ls(), replace(hungry, preemptible=True)], MACHINE)
    assert staying == replace(shared, share=staying.share)
    assert apart.p99_ns["ls"] < shared.p99_ns["ls"]
    assert apart.be_rate > shared.be_rate
    assert leaving.p99_ns["ls"] < shared.p99_ns["ls"]


# --- choice
@given(be_min=st.floats(0.0, 0.99), sms=st.integers(16, 160), unit=st.sampled_from([2, 8]))
def test_candidates_keep_what_was_promised_and_can_be_carried_out(be_min, sms, unit):
    machine = Machine(sms, unit, 8)
    for share in candidates(machine, be_min):
        assert 0 < share.ls_sms <= sms
        if share.ls_sms < sms:
            assert sms - share.ls_sms >= max(8, math.floor(be_min * sms))
        else:
            assert be_min == 0
    if not be_min:
        assert Share(sms) in candidates(machine)


def trial_of(results: Mapping[str, tuple[float, float]], default: tuple[float, float]):
    """A trial that gives attainment and BE rate by policy; and what it was asked for."""
    asked = []

    def trial(policy: str) -> Measured:
        asked.append(policy)
        met, rate = results.get(policy.partition(",pause_above")[0], default)
        return Measured({"ls": met}, {"ls": 0.7 * MS}, rate)

    return trial, asked


def test_the_plan_is_what_measured_best_among_those_that_held():
    trial, asked = trial_of({"missile": (1.0, 0.85), "missile:pause=off,ls_share=0.727": (0.98, 0.95)}, (0.995, 0.9))
    plan = make_plan([ls(), be()], MACHINE, trial=trial, tried=4)
    assert len(asked) == len(set(asked)) == 4
    assert plan.accepted
    assert plan.chosen.measured == Measured({"ls": 0.995}, {"ls": 0.7 * MS}, 0.9)
    assert all(create_policy(candidate.policy).name == "missile" for candidate in plan.considered)
    assert plan.remedies == ()


def test_be_that_pauses_is_always_tried_also_without_stopping_it():
    trial, asked = trial_of({"missile:preempt=off": (1.0, 0.93)}, (1.0, 0.9))
    plan = make_plan([ls(slo_ms=20.0), be(preemptible=True)], MACHINE, trial=trial, tried=2)
    assert set(asked) == {"missile", "missile:preempt=off"}
    assert plan.chosen.policy == "missile:preempt=off"
    assert create_policy(plan.chosen.policy).preempt is False
    assert "when its work has ended" in explain(plan)
    assert Share(132, preempts=False) not in candidates(MACHINE, 0.2, preempts=True)


def test_each_coming_and_going_of_ls_requests_costs_be():
    few = ls(rate=100.0, service_ms=3.0)
    many = ls(rate=1000.0, service_ms=0.3)
    leaves, stays = be(preemptible=True), be()
    lost = [1.0 - predict(Share(132), [demand, leaves], MACHINE, turn_ns=60_000.0).be_rate for demand in (few, many)]
    assert lost == [pytest.approx(0.3 + 0.7 * rate * 60e-6) for rate in (100, 1000)]
    # What is not stopped runs on beside the LS request, at three quarters of its speed for two segments.
    kept = predict(Share(132), [many, stays], MACHINE, turn_ns=60_000.0, segment_ns=80_000.0)
    assert kept.be_rate == pytest.approx(1.0 - lost[1] + 0.7 * 1000 * 120e-6)
    assert kept.p99_ns["ls"] > predict(Share(132), [many, leaves], MACHINE).p99_ns["ls"]


def test_be_has_no_sms_that_ls_kernels_hold():
    small, full = KernelWork(16, solo_ns=10_000.0), KernelWork(1320, solo_ns=10_000.0)
    rates = [predict(Share(64), [ls(rate=2000, works=(work,)), be()], MACHINE).be_rate for work in (small, full)]
    assert rates[0] > rates[1]


def test_a_trial_whose_tail_is_close_to_the_objective_counts_only_where_no_other_holds():
    def plan(slo_ms: float):
        def trial(policy: str) -> Measured:
            return Measured(
                {"ls": 1.0}, {"ls": (0.6 if policy == "missile" else 0.8) * MS}, 0.8 + 0.1 * (policy != "missile")
            )

        return make_plan([ls(slo_ms=slo_ms), be()], MACHINE, trial=trial, tried=4)

    assert plan(1.0).chosen.measured.be_rate == pytest.approx(0.9)
    assert plan(0.9).chosen.policy == "missile"
    close = plan(0.65)
    assert close.accepted
    assert close.chosen.policy == "missile"
    assert "just" in explain(close)


def plan_of(results: Mapping[str, tuple[float, float]], **options: object):
    """A plan for one preemptible BE tenant, of trials that gave (p99 over that alone, BE rate), by policy."""

    def trial(policy: str) -> Measured:
        over, rate = results.get(policy, (3.0, 0.9))
        return Measured({"ls": 1.0}, {"ls": 0.4 * over * MS}, rate, {"ls": over})

    demands = [ls(slo_ms=1.5, tail_ns=0.4 * MS), be(preemptible=True)]
    return make_plan(demands, MACHINE, trial=trial, tried=4, **options)


STOP, LET = "missile", "missile:preempt=off"
WAIT = next(
    candidate.policy
    for candidate in make_plan([ls(slo_ms=1.5, tail_ns=0.4 * MS), be(preemptible=True)], MACHINE).considered
    if "lend=" in candidate.policy
)


def test_a_short_tail_comes_before_be_work_and_then_be_work_counts():
    results = {STOP: (1.02, 0.6), WAIT: (1.06, 0.65), LET: (1.18, 0.7)}
    plan = plan_of(results)
    assert plan.accepted
    assert plan.chosen.policy == WAIT
    assert "1.10 times those alone" in explain(plan)
    assert plan_of(results | {LET: (1.09, 0.7)}).chosen.policy == LET
    # With no such aim the objectives alone bound it.
    assert plan_of(results, tail=None).chosen.measured.be_rate == pytest.approx(0.9)
    assert plan_of(results, tail=1.5).chosen.policy == LET


def test_where_no_tail_is_short_the_shortest_are_taken_as_alike():
    results = {STOP: (1.20, 0.6), WAIT: (1.24, 0.65), LET: (1.3, 0.7)}
    plan = plan_of(results)
    assert plan.accepted
    assert plan.chosen.policy == WAIT
    assert "none has p99s of at most 1.10 times those alone" in explain(plan)


@given(
    found=st.lists(st.tuples(st.floats(0.9, 3.0), st.floats(0.1, 1.0)), min_size=3, max_size=3),
    tail=st.floats(1.0, 2.0),
)
def test_nothing_better_is_passed_over(found, tail):
    plan = plan_of(dict(zip((STOP, WAIT, LET), found, strict=True)), tail=tail)
    mine = plan.chosen.measured
    for candidate in plan.considered:
        other = candidate.measured
        if other is not None and other.tail <= min(tail, 3.1875):  # 0.85 of 1.5 ms
            assert mine.tail <= tail
            assert mine.be_rate >= 0.97 * other.be_rate


def test_be_is_lent_sms_only_where_every_ls_tenant_has_an_objective():
    with_one, without = ls("a", slo_ms=3.0), ls("b", slo_ms=None)

    def lends(*demands: Demand, **options: float) -> list[Candidate]:
        return [c for c in make_plan([*demands, be()], MACHINE, **options).considered if "lend=" in c.policy]

    assert not lends(with_one, without)
    assert not lends(with_one, be_min=0.2)
    found = lends(with_one)
    assert found
    for candidate in found:
        policy = create_policy(candidate.policy)
        assert policy._pauses
        assert policy._lend == candidate.predicted.share.lend
        assert f"within {policy._lend:.0%} of its objective" in explain(
            make_plan([with_one, be()], MACHINE, trial=only(candidate), tried=20)
        )


def only(wanted: Candidate):
    """A trial in which nothing but `wanted` holds."""

    def trial(policy: str) -> Measured:
        return Measured({"a": float(policy == wanted.policy)}, {"a": MS}, 0.9)

    return trial


def test_what_is_lent_makes_tails_longer_and_gives_be_more():
    def found(share: Share):
        works = (KernelWork(60, solo_ns=30_000.0), KernelWork(100, solo_ns=10_000.0))
        return predict(share, [ls(rate=2000.0, slo_ms=3.0, works=works), be(preemptible=True)], MACHINE)

    order = [found(Share(132)), *(found(Share(64, lend=lend)) for lend in (0.15, 0.3, 0.45)), found(Share(64))]
    assert [one.be_rate for one in order[:4]] == sorted(one.be_rate for one in order[:4])
    assert order[4].be_rate > 0.98 * order[3].be_rate
    assert [one.p99_ns["ls"] for one in order] == sorted(one.p99_ns["ls"] for one in order)


def test_a_variant_is_tried_with_the_chosen_candidate_and_taken_where_it_is_better():
    for tail, taken in ((1.0, True), (1.06, False)):
        results = {STOP: (1.04, 0.6), f"{STOP}:copies=off": (tail, 0.6), LET: (1.3, 0.7)}
        plan = plan_of(results, variants=["copies=off"])
        assert plan.chosen.policy == (f"{STOP}:copies=off" if taken else STOP)
        assert plan.considered[-1].policy == f"{STOP}:copies=off"
    assert (
        plan_of({STOP: (2.0, 0.1), LET: (1.0, 0.7)}, variants=["copies=off"]).considered[-1].policy
        == f"{LET},copies=off"
    )
    # Each on top of the one before, where that was taken; nothing is tried twice.
    both = {WAIT: (1.0, 0.7), f"{WAIT},copies=off": (0.98, 0.7), f"{WAIT},copies=off,preempt=off": (1.0, 0.8)}
    assert plan_of(both, variants=["copies=off", "preempt=off"]).chosen.policy == f"{WAIT},copies=off,preempt=off"
    tried = [c.policy for c in plan_of({STOP: (1.0, 0.95)}, variants=["preempt=off"]).considered]
    assert tried.count(LET) == 1


@given(
    load=st.floats(0.0, 0.99), slower=st.floats(1.2, 2.0), bounds=st.lists(st.floats(0.0, 20.0), min_size=2, max_size=2)
)
@example(load=0.4375, slower=1.203125, bounds=[0.0, 7.0])
def test_a_queue_that_lends_more_is_idle_less(load, slower, bounds):
    less, more = (lending(round(load, 3), round(slower, 2), round(bound, 2)) for bound in sorted(bounds))
    for found in (less, more):
        assert found.lent + found.idle <= 1.02
        assert found.stretch >= 0.95
        assert found.idle == pytest.approx(1.0 - load - found.lent * (1 - 1 / slower), abs=0.06)
    assert less.lent <= more.lent + 0.02
    assert less.stretch <= more.stretch * 1.02


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_a_queue_that_always_lends_is_one_whose_requests_take_longer(load):
    slower = 1.08
    found = lending(load, slower, 1e9)
    assert found.lent == pytest.approx(load * slower, rel=0.05)
    alone, beside = wait_p99(load, 1.0) + 1.0, wait_p99(load * slower, slower) + slower
    assert found.stretch == pytest.approx(beside / alone, rel=0.15 if load < 0.9 else 0.5)
    assert lending(load, slower, 0.0).lent == 0.0


def test_ls_tenants_that_need_few_sms_leave_the_others_to_be():
    small = ls(works=(KernelWork(30, solo_ns=10_000.0),))
    assert fitting_sms([small, be()], MACHINE) == 32
    assert fitting_sms([small, ls("full", works=(KernelWork(1320, solo_ns=10_000.0),))], MACHINE) is None
    assert Share(40) in candidates(MACHINE, fitting=40)
    assert Share(40) not in candidates(MACHINE)
    assert candidates(MACHINE, fitting=96) == candidates(MACHINE)  # three quarters
    assert Share(120) not in candidates(MACHINE, 0.2, fitting=120)


def test_be_beside_ls_requests_pauses_at_rates_at_which_an_objective_would_break():
    easy = ls(slo_ms=3.0, works=(KernelWork(16, solo_ns=10_000.0),))
    plan = make_plan([easy, be()], MACHINE)
    beside = [candidate for candidate in plan.considered if "pause=off" in candidate.policy]
    assert beside
    for candidate in beside:
        limit = dict(part.split("=") for part in candidate.policy.partition(":")[2].split(","))["pause_above"]
        factor = float(limit) / 300.0
        assert factor >= 1.3
        share = candidate.predicted.share
        assert predict(share, plan.demands, MACHINE, rate_factor=0.98 * factor).slack >= 1.0
        assert predict(share, plan.demands, MACHINE, rate_factor=1.02 * factor).slack < 1.0
    promised = make_plan([easy, be()], MACHINE, be_min=0.2)
    assert not any("pause_above" in candidate.policy for candidate in promised.considered)


def test_when_nothing_holds_it_says_so_and_what_would():
    trial, _ = trial_of({"missile": (0.97, 0.85)}, (0.5, 0.9))
    plan = make_plan([ls(slo_ms=0.5), be()], MACHINE, trial=trial, tried=4)
    assert not plan.accepted
    assert plan.chosen.policy == "missile"
    assert any("an objective of 0.7 ms for 'ls'" in remedy for remedy in plan.remedies)
    assert any("preemptible kernels for 'be'" in remedy for remedy in plan.remedies)
    assert "does not meet" in explain(plan)


def test_without_a_trial_the_prediction_decides():
    easy = make_plan([ls(slo_ms=50.0), be()], MACHINE)
    assert easy.accepted
    assert easy.chosen == easy.considered[0]
    predicted = {candidate.policy: candidate.predicted for candidate in easy.considered}
    short = [found for found in predicted.values() if found.p99_ns["ls"] <= 1.2 * predicted["missile"].p99_ns["ls"]]
    assert easy.chosen.predicted.be_rate == max(found.be_rate for found in short)
    hard = make_plan([ls(rate=5000.0), be()], MACHINE)
    assert not hard.accepted
    assert any("arrival rates of at most" in remedy for remedy in hard.remedies)


def test_a_promise_to_be_keeps_it_running_beside_ls():
    plan = make_plan([ls(), be()], MACHINE, be_min=0.4)
    assert all("be_min=0.4" in candidate.policy for candidate in plan.considered)
    assert all(candidate.predicted.share.ls_sms <= 0.6 * 132 for candidate in plan.considered)
    with pytest.raises(MisuseError, match="promised"):
        make_plan([ls(), be()], MACHINE, be_min=0.95)
    with pytest.raises(MisuseError, match="below 1"):
        make_plan([ls(), be()], MACHINE, be_min=1.0)


def test_an_objective_below_the_time_alone_is_refused():
    with pytest.raises(MisuseError, match=r"'ls' has an objective of 0\.2 ms and takes 0\.3 ms"):
        make_plan([ls(slo_ms=0.2), be()], MACHINE)


@settings(deadline=None)
@given(rate=st.floats(10.0, 2000.0), slo=st.floats(0.6, 20.0))
def test_what_breaks_first_breaks_there(rate, slo):
    demands = [ls("a", rate, slo), ls("b", rate / 10, slo * 3), be()]
    plan = make_plan(demands, MACHINE)
    assert plan.breaks_first in ("a", "b")

    share = plan.chosen.predicted.share

    def slack(factor: float) -> float:
        # BE that is lent SMs pauses by then.
        return predict(Share(132) if share.lend else share, demands, MACHINE, rate_factor=factor).slack

    assert plan.breaks_at > 63.9 or slack(plan.breaks_at * 1.01) < 1.0  # it looks no further than 64
    assert plan.breaks_at < 1e-6 or slack(plan.breaks_at * 0.99) >= 1.0
    assert (plan.breaks_at >= 1.0) is plan.accepted


def test_colors_are_considered_when_their_cost_is_known_and_chosen_when_they_pay():
    hungry = Demand("be", False, 5 * MS, works=(KernelWork(4000, solo_ns=20_000.0, footprint_bytes=60_000_000),))
    small = KernelWork(16, solo_ns=10_000.0)
    busy = ls(rate=2000.0, slo_ms=3.0, works=(small,))

    def plan(cost: float):
        demands = [replace(demand, colored_ns=cost * demand.service_ns) for demand in (busy, hungry)]
        return make_plan(demands, MACHINE)

    assert not any("colors" in candidate.policy for candidate in make_plan([busy, hungry], MACHINE).considered)
    assert "colors=on" in plan(1.05).chosen.policy
    assert "different colors" in explain(plan(1.05))
    assert "colors" not in plan(2.0).chosen.policy
    assert create_policy(plan(1.05).chosen.policy).colors


def test_a_plan_lapses_when_rates_or_tenants_change():
    plan = make_plan([ls("a", 100.0), ls("b", 10.0), be()], MACHINE)
    assert rates_changed(plan, {"a": 110.0, "b": 9.0}) == ()
    assert rates_changed(plan, {"a": 140.0, "b": 10.0}) == ("a",)
    assert rates_changed(plan, {"a": 70.0, "c": 1.0}) == ("a", "b", "c")


def test_explanations_are_complete_and_finite():
    plan = make_plan([ls(rate=5000.0, colored_ns=0.4 * MS), be(colored_ns=6 * MS)], MACHINE)
    assert len(plan.considered) == 13
    text = explain(plan)
    assert all(candidate.policy in text for candidate in plan.considered)
    assert "unbounded" in text
    json.dumps(plan_data(plan), allow_nan=False)
    quiet = make_plan([ls(slo_ms=None), be()], MACHINE)
    assert quiet.breaks_first == ""
    json.dumps(plan_data(quiet), allow_nan=False)


# --- on the simulated GPU
def test_a_plan_for_loaded_tenants_is_measured_and_holds(gpu, tenant):
    tenants = [tenant("ls", "LS", rate=500, slo_factor=1.5), tenant("be", "BE", "synthetic-spin")]
    said = []
    with load_tenants(gpu, tenants) as roster:
        plan = plan_tenants(gpu, roster, seed=1, trial_ns=60_000_000, progress=said.append)
    assert said[:2] == ["ls alone", "be alone"]
    assert said[2:] == [c.policy for c in plan.considered if c.measured is not None]
    assert plan.accepted == plan.chosen.measured.accepted
    assert 0.1 < plan.chosen.measured.be_rate <= 1.05
    assert plan.demands[0].slo_ns > plan.demands[0].service_ns
    assert len(plan.demands[1].works) == 8


def test_two_be_tenants_that_have_the_gpu_together_have_all_of_it(gpu, tenant):
    tenants = [tenant("ls", "LS", rate=100, slo_factor=1.5), *(tenant(n, "BE", "synthetic-spin") for n in ("a", "b"))]
    with load_tenants(gpu, tenants) as roster:
        plan = plan_tenants(gpu, roster, seed=1, trial_ns=60_000_000)
    assert 0.7 < plan.chosen.measured.be_rate <= 1.05


def test_tails_are_told_on_the_same_arrivals_and_what_stops_nothing_runs_plain_code(gpu, tenant, monkeypatch):
    tenants = [tenant("ls", "LS", rate=500, slo_factor=1.5), tenant("be", "BE", "synthetic-spin")]
    said, stoppable = [], {}

    with load_tenants(gpu, tenants) as plain, make_preemptible(load_tenants(gpu, tenants)).roster as roster:
        solos = {name: solo(gpu, roster, name, seed=1, duration_ns=80_000_000) for name in ("ls", "be")}

        def run_it(gpu, tenants, policy, **more):
            (be,) = (loaded for loaded in tenants.tenants if loaded.tenant.name == "be")
            stoppable[policy] = any(operation.preempt is not None for operation in be.model.operations)
            return run(gpu, tenants, policy, **more)

        monkeypatch.setattr(planning, "run", run_it)
        plan = plan_tenants(gpu, roster, seed=2, solos=solos, trial_ns=60_000_000, plain=plain, progress=said.append)
    assert said[0] == "ls alone, on the arrivals of the trials"
    assert stoppable["missile"]
    assert not stoppable["missile:preempt=off"]
    demand = plan.demands[0]
    assert plan.chosen.measured.tails["ls"] == plan.chosen.measured.p99_ns["ls"] / demand.tail_ns


@pytest.mark.parametrize("name", ["solo", "run"])
def test_ctrl_c_ends_the_trials_and_is_not_taken_for_a_measurement(gpu, tenant, monkeypatch, name):
    tenants = [tenant("ls", "LS", rate=500, slo_factor=3.0), tenant("be")]
    whole = getattr(planning, name)
    asked = []

    def interrupted(*args, **options):
        asked.append(args)
        return replace(whole(*args, **options), interrupted=True)

    monkeypatch.setattr(planning, name, interrupted)
    with load_tenants(gpu, tenants) as roster, pytest.raises(KeyboardInterrupt):
        plan_tenants(gpu, roster, seed=1, trial_ns=20_000_000)
    assert len(asked) == 1


def test_a_colored_roster_is_tried_too(gpu, tenant):
    tenants = [tenant("ls", "LS", rate=500, slo_factor=3.0), tenant("be", "BE", "synthetic-spin")]
    said = []
    with load_tenants(gpu, tenants) as roster, load_tenants(gpu, tenants) as other:
        plan = plan_tenants(
            gpu, roster, seed=1, trial_ns=30_000_000, be_min=0.2, colored=lambda: other, progress=said.append
        )
    assert "ls alone, colored" in said
    assert all(demand.colored_ns == pytest.approx(demand.service_ns, rel=0.05) for demand in plan.demands)
    assert any("colors=on" in policy for policy in said)


def test_a_lucky_trial_of_much_lending_is_not_believed_altogether():
    works = (KernelWork(60, solo_ns=30_000.0), KernelWork(100, solo_ns=10_000.0))
    demands = [ls(rate=2000.0, slo_ms=3.0, tail_ns=2 * MS, works=works), be(preemptible=True)]

    def chosen(tail: float) -> Candidate:
        def trial(policy: str) -> Measured:
            lent = float(policy.partition("lend=")[2].partition(",")[0] or 0.0)
            return Measured({"ls": 1.0}, {"ls": 2 * tail * MS}, 0.5 + lent, {"ls": tail})

        return make_plan(demands, MACHINE, trial=trial, tried=8).chosen

    easy, hard = chosen(1.0), chosen(1.09)
    assert easy.predicted.share.lend > hard.predicted.share.lend
    assert easy.predicted.stretch <= 1.3  # 1.0 was seen: two thirds of that and a third of this are within 1.10
    assert hard.predicted.stretch <= 1.12


def test_trials_on_hard_arrivals_are_held_against_what_is_usual():
    """Alone the tenant has a p99 of 1 ms, on the trials' arrivals one of 1.4 ms; its objective is 1.5 ms."""

    def plan(alone_ms: float | None):
        demand = ls(rate=1000.0, slo_ms=1.5, tail_ns=1.4 * MS, alone_ns=None if alone_ms is None else alone_ms * MS)

        def trial(policy: str) -> Measured:
            lent = "lend" in policy
            return Measured(
                {"ls": 0.992}, {"ls": (1.42 if lent else 1.4) * MS}, 0.7 + 0.1 * lent, {"ls": 1.01 if lent else 1.0}
            )

        return make_plan([demand, be(preemptible=True)], MACHINE, trial=trial)

    assert plan(1.0).chosen.predicted.share.lend
    assert not plan(1.4).chosen.predicted.share.lend
    assert not plan(None).chosen.predicted.share.lend
    assert "something to spare" in explain(plan(1.0))
