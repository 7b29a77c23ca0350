"""The testbed on a simulated GPU: which models each policy runs on, and what is given back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from missile.bench.scenario import parse_scenario
from missile.bench.testbed import GpuTestbed, describe_policy, open_testbed, trial_length
from missile.errors import MisuseError, UnsupportedError
from missile.runtime.tenant import Tenant

SCENARIO = """
device = "sim:h200"
duration_s = 0.1
policies = ["streams", "mps", "missile"]
[[tenant]]
name = "ls"
class = "LS"
model = "squeezenet1_1"
arrivals = { kind = "poisson", rate_per_s = 100 }
[[tenant]]
name = "be"
class = "BE"
model = "decoder_1b"
arrivals = { kind = "closed" }
"""
SPAN = {"seed": 1, "duration_ns": 100_000_000, "warmup_ns": 0}


@pytest.fixture(scope="module")
def testbed() -> Iterator[GpuTestbed]:
    with open_testbed(parse_scenario(SCENARIO)) as opened:
        yield opened


def tenants(testbed: GpuTestbed) -> tuple[Tenant, ...]:
    return tuple(loaded.tenant for loaded in testbed.roster.tenants)


def test_a_tenant_is_run_as_it_is_asked_for_not_as_it_was_loaded(testbed: GpuTestbed) -> None:
    ls = tenants(testbed)[0]
    busier = ls.model_copy(update={"arrivals": ls.arrivals.model_copy(update={"rate_per_s": 2000.0})})
    assert len(testbed.solo(ls, **SPAN).tenants[0].done) < 30
    assert len(testbed.solo(busier, **SPAN).tenants[0].done) > 150


def test_only_missile_s_be_models_are_preemptible(testbed: GpuTestbed) -> None:
    # Loads the second copy that `missile` needs, and only when it is needed.
    free = testbed.gpu.memory_free()
    assert testbed.shared(tenants(testbed), "streams", **SPAN).notes == ()
    testbed.shared(tenants(testbed), "missile:preempt=off", **SPAN)
    assert testbed.gpu.memory_free() == free
    record = testbed.shared(tenants(testbed), "missile", **SPAN)
    assert testbed.gpu.memory_free() < free
    assert record.notes == ()
    assert all(len(row.done) for row in record.tenants)
    testbed.close()
    assert testbed.gpu.memory_free() == free


@pytest.mark.slow
def test_colors_separate_ls_from_be(testbed: GpuTestbed) -> None:
    record = testbed.shared(tenants(testbed), "missile:colors=on", **SPAN)
    assert all(len(row.done) for row in record.tenants)
    variant = testbed._variants.of("missile:colors=on")
    assert variant is not None
    ls, be = (set(loaded.colors) for loaded in variant.roster.tenants)
    assert ls
    assert be
    assert not ls & be
    testbed.close()


def test_candidates_are_tried_until_ls_requests_have_a_tail(testbed: GpuTestbed) -> None:
    ls = tenants(testbed)[0]
    for rate, length in ((2000, 400_000_000), (300, 667_000_000), (20, 1_000_000_000)):
        busier = ls.model_copy(update={"arrivals": ls.arrivals.model_copy(update={"rate_per_s": float(rate)})})
        solos = {"ls": testbed.solo(busier, seed=1, duration_ns=500_000_000, warmup_ns=100_000_000)}
        assert trial_length([busier], solos) == pytest.approx(length, rel=0.15)
    assert trial_length([ls], {}) == 400_000_000


def test_mps_says_why_it_can_t(testbed: GpuTestbed) -> None:
    with pytest.raises(UnsupportedError, match="simulated"):
        testbed.shared(tenants(testbed), "mps", **SPAN)


def test_every_policy_has_a_description() -> None:
    assert "MPS" in describe_policy("mps:ls_share=0.5")
    assert describe_policy("mps:ls_share=0.5").endswith("Here with ls_share=0.5.")
    for wrong in ("mps:share=1", "mps:ls_share=2", "fair"):
        with pytest.raises(MisuseError):
            describe_policy(wrong)
