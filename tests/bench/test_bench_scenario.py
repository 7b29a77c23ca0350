"""Scenarios: what is read is what was written, and a wrong field is named."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.bench.scenario import (
    Scenario,
    default_scenario,
    describe_arrivals,
    format_scenario,
    parse_scenario,
    read_scenario,
)
from missile.errors import MisuseError

NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
RATES = st.floats(0.01, 1e5)
ARRIVALS = st.one_of(
    st.builds(lambda rate: {"kind": "poisson", "rate_per_s": rate}, RATES),
    st.builds(lambda rate, jitter: {"kind": "periodic", "rate_per_s": rate, "jitter": jitter}, RATES, st.floats(0, 1)),
    st.builds(
        lambda depth, think: {"kind": "closed", "depth": depth, "think_ms": think}, st.integers(1, 8), st.floats(0, 9)
    ),
    st.builds(lambda rate: {"kind": "trace", "name": "azure-llm-2023/code", "rate_per_s": rate}, RATES),
    st.just({"kind": "disb", "workload": "A", "task": "vgg19_rt"}),
)


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    tenants = []
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        tenant: dict[str, Any] = {"name": name, "model": draw(st.text(min_size=1, max_size=12))}
        tenant["class"] = draw(st.sampled_from(["LS", "BE"]))
        if tenant["class"] == "LS":
            tenant[draw(st.sampled_from(["slo_ms", "slo_factor"]))] = draw(st.floats(1, 1e4))
        if draw(st.booleans()):
            tenant["batch"] = draw(st.integers(1, 4096))
        if draw(st.booleans()):
            tenant["residency"] = draw(st.sampled_from(["device", "host"]))
        tenants.append(tenant | {"arrivals": draw(ARRIVALS), "weight": draw(st.floats(0.001, 1000))})
    duration = draw(st.floats(0.01, 3600))
    return {
        "name": draw(NAMES),
        "description": draw(st.text(max_size=40)),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "duration_s": duration,
        "warmup_s": duration * draw(st.floats(0, 0.9)),
        "repeats": draw(st.integers(1, 100)),
        "swap_mb": draw(st.integers(1, 100_000)),
        "policies": draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)),
        "tenant": tenants,
    }


@given(scenarios())
def test_scenario_survives_toml(raw: dict[str, Any]) -> None:
    scenario = Scenario.model_validate(raw)
    assert parse_scenario(format_scenario(scenario)) == scenario


def test_default_scenario_is_the_main_job() -> None:
    scenario = default_scenario()
    classes = [tenant.tenant_class.value for tenant in scenario.tenants]
    kinds = [tenant.arrivals.kind for tenant in scenario.tenants if tenant.latency_sensitive]
    assert classes == ["LS", "LS", "LS", "BE", "BE"]
    assert kinds == ["trace", "poisson", "poisson"]
    assert scenario.policies == ("temporal", "streams", "priority", "partition", "missile")
    assert all(describe_arrivals(tenant.arrivals) for tenant in scenario.tenants)


TENANT = "[[tenant]]\nname = 'web'\nclass = 'LS'\nmodel = 'resnet34'\nslo_ms = 5\n"
GOOD = f"duration_s = 1\npolicies = ['streams']\n{TENANT}arrivals = {{ kind = 'poisson', rate_per_s = 10 }}\n"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("duration_s = 1\n", "", "duration_s is missing"),
        ("duration_s = 1\n", "duration_s = -1\n", "duration_s: should be greater than 0, not -1"),
        ("duration_s = 1\n", "duration_s = 1\nwarmup_s = 2\n", "warmup_s (2) must be shorter than duration_s (1)"),
        ("duration_s = 1\n", "duration_s = 1\nrepeat = 2\n", "repeat is not a field of a scenario"),
        ("['streams']", "['streams', 'streams']", "policies: policy 'streams' is given twice"),
        ("['streams']", "[]", "policies"),
        ("class = 'LS'", "class = 'MS'", "tenant 'web'.class: should be 'LS' or 'BE', not 'MS'"),
        ("class = 'LS'", "class = 'BE'", "tenant 'web': a BE tenant has no objective, so no slo_ms"),
        ("slo_ms = 5", "slo_ms = 5\nslo_factor = 2", "tenant 'web'"),
        ("name = 'web'\n", "", "tenant 1.name is missing"),
        ("slo_ms = 5", "slo_ms = 5\nresidency = 'host'", "tenant 'web' has residency \"host\", so swap_mb must say"),
        (
            "slo_ms = 5",
            "slo_ms = 5\nresidency = 'disk'",
            "tenant 'web'.residency: should be 'device' or 'host', not 'disk'",
        ),
        ("duration_s = 1\n", "duration_s = 1\nswap_mb = 0\n", "swap_mb: should be greater than or equal to 1, not 0"),
        ("rate_per_s = 10", "rate_per_s = 0", "tenant 'web'.arrivals.rate_per_s: should be greater than 0, not 0"),
        ("rate_per_s = 10", "rate_per_s = nan", "tenant 'web'.arrivals.rate_per_s"),
        ("kind = 'poisson', rate_per_s", "kind = 'trace', name = 'none', rate_per_s", "Unknown trace 'none'"),
        ("kind = 'poisson'", "kind = 'poison'", "tenant 'web'.arrivals"),
        (GOOD, GOOD + TENANT + "arrivals = { kind = 'closed' }\n", "tenant name 'web' is given twice"),
        (GOOD, "= 1", "is not valid TOML"),
    ],
)
def test_a_wrong_field_is_named_in_one_sentence(old: str, new: str, named: str) -> None:
    assert parse_scenario(GOOD)
    with pytest.raises(MisuseError) as caught:
        parse_scenario(GOOD.replace(old, new, 1), "file.toml")
    message = str(caught.value)
    assert message.startswith("file.toml")
    assert named in message
    assert "\n" not in message
    assert message.endswith(".")
    assert not message.endswith("..")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="no scenario file"):
        read_scenario(tmp_path / "absent.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(MisuseError, match="can't be read"):
        read_scenario(tmp_path / "bytes.toml")
    with pytest.raises(MisuseError, match="can't be read"):
        read_scenario(tmp_path)


def test_changes_from_the_command_line_are_checked_too() -> None:
    scenario = parse_scenario(GOOD)
    assert scenario.changed(repeats=3, device=None).repeats == 3
    with pytest.raises(MisuseError, match="repeats"):
        scenario.changed(repeats=0)
