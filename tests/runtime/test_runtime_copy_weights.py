"""Weights on the link from copies and objectives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.gpu import open_gpu
from missile.runtime import planning
from missile.runtime.copy_weights import copy_weights
from missile.runtime.copying import share_of
from missile.runtime.explanation import explain, plan_data
from missile.runtime.loading import load_tenants
from missile.runtime.planning import plan_tenants
from missile.runtime.prediction import Demand
from missile.runtime.run import run

RATE = 50e9
MIB = 1 << 20


def ls(name: str, copied: int, slo_ms: float | None = 1.0) -> Demand:
    return Demand(name, True, 0.3e6, 300.0, None if slo_ms is None else slo_ms * 1e6, copy_bytes=copied)


def be(name: str, copied: int = 8 * MIB) -> Demand:
    return Demand(name, False, 5e6, copy_bytes=copied)


demands = st.lists(
    st.tuples(st.booleans(), st.integers(0, 64 * MIB), st.none() | st.floats(0.35, 100.0), st.floats(0.001, 1000.0)),
    min_size=1,
    max_size=6,
)


@given(demands)
def test_ls_tenants_have_what_their_copies_need_and_be_tenants_keep_theirs(found):
    tenants = [ls(f"t{i}", size, slo) if kind else be(f"t{i}", size) for i, (kind, size, slo, _) in enumerate(found)]
    own = {f"t{i}": weight for i, (*_, weight) in enumerate(found)}
    weights = copy_weights(tenants, own, RATE)
    total = sum(weights.values())
    wanted = {}
    for tenant in tenants:
        assert weights[tenant.name] >= own[tenant.name]
        if not tenant.latency_sensitive or tenant.slo_ns is None or not tenant.copy_bytes:
            assert weights[tenant.name] == own[tenant.name]
            continue
        ideal = tenant.copy_bytes / RATE * 1e9
        wanted[tenant.name] = ideal / (ideal + 0.1 * (tenant.slo_ns - tenant.service_ns))
    scale = min(0.9 / sum(wanted.values()), 1.0) if wanted else 1.0
    for name, share in wanted.items():
        assert weights[name] / total >= share * scale * (1 - 1e-6)


def test_longer_copies_and_tighter_objectives_get_more():
    own = dict.fromkeys(("a", "b", "be"), 1.0)

    def of(a: Demand, b: Demand) -> dict[str, float]:
        return copy_weights([a, b, be("be")], own, RATE)

    longer = of(ls("a", 16 * MIB), ls("b", 4 * MIB))
    assert longer["a"] > longer["b"] > 1.0 == longer["be"]
    tighter = of(ls("a", 8 * MIB, 0.4), ls("b", 8 * MIB, 4.0))
    assert tighter["a"] > tighter["b"]
    assert of(ls("a", 1000), ls("b", 1000)) == own


def test_a_plan_has_weights_where_copies_are_scheduled_and_its_trials_run_with_them(tenant, monkeypatch):
    seen = []

    def run_it(gpu, tenants, policy, **more):
        seen.append({loaded.tenant.name: share_of(loaded.tenant).weight for loaded in tenants.tenants})
        return run(gpu, tenants, policy, **more)

    monkeypatch.setattr(planning, "run", run_it)
    tenants = [tenant("ls", "LS", "mobilenet_v3_large", rate=300, slo_factor=1.5), tenant("be", "BE", "densenet161")]
    with open_gpu("sim:h200", seed=1) as gpu, load_tenants(gpu, tenants) as roster:
        plan = plan_tenants(gpu, roster, seed=1, trial_ns=60_000_000)
        assert plan.copy_weights["be"] == 1.0
        assert plan.copy_weights["ls"] >= 1.0
        assert seen
        assert all(weights == plan.copy_weights for weights in seen)
        assert "Weights on the link" in explain(plan)
        assert plan_data(plan)["copy_weights"] == plan.copy_weights
        given_one = [one.model_copy(update={"copy_weight": 2.0}) for one in tenants]
    with open_gpu("sim:h200", seed=1) as gpu, load_tenants(gpu, given_one) as roster:
        assert plan_tenants(gpu, roster, seed=1, trial_ns=60_000_000).copy_weights == {}
    assert share_of(given_one[0]).weight == 2.0


def test_short_copies_need_no_weights(gpu, tenant):
    tenants = [tenant("ls", "LS", rate=500, slo_factor=1.5), tenant("be", "BE", "synthetic-spin")]
    with load_tenants(gpu, tenants) as roster:
        plan = plan_tenants(gpu, roster, seed=1, trial_ns=30_000_000)
    assert plan.copy_weights == {}
    assert "Weights on the link" not in explain(plan)
    with pytest.raises(ValueError, match="copy_weight"):
        tenant("ls", "LS", rate=1, copy_weight=-1.0)
