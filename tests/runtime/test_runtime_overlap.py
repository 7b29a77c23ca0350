"""Whose launches overlap when tenants are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from missile.bench.scenario import parse_scenario
from missile.compiler.bind import BoundModel
from missile.compiler.objective import Objective
from missile.compiler.overlap_table import Tuned
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Launch
from missile.probe import map_for
from missile.runtime.loading import Coloring, LoadedTenant, load_tenants, overlap_of
from missile.runtime.preempting import make_preemptible
from missile.runtime.tenant import Tenant


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h100") as opened:
        yield opened


def overlapping(loaded: LoadedTenant) -> set[bool]:
    assert isinstance(loaded.model, BoundModel)
    return {operation.overlaps for operation in loaded.model.operations if isinstance(operation, Launch)}


@pytest.fixture
def pair(tenant: Callable[..., Tenant]) -> list[Tenant]:
    return [tenant("ls", "LS", "squeezenet1_1", rate=100), tenant("be", "BE", "squeezenet1_1")]


def test_those_of_ls_models_do_and_those_of_be_models_dont(gpu: Gpu, pair: list[Tenant]) -> None:
    for objective in Objective:
        with load_tenants(gpu, pair, overlap=objective) as roster:
            assert [overlapping(loaded) for loaded in roster.tenants] == [{True}, {False}]
    with load_tenants(gpu, pair) as roster:
        assert [overlapping(loaded) for loaded in roster.tenants] == [{True}, {False}]
    with load_tenants(gpu, pair, overlap=None) as roster:
        assert [overlapping(loaded) for loaded in roster.tenants] == [{False}, {False}]


def test_in_colored_memory_too(gpu: Gpu, pair: list[Tenant], tmp_path: Path) -> None:
    coloring = Coloring(map_for(gpu, cache=tmp_path, interference=False), {"ls": (0, 1), "be": (2, 3)})
    for overlap, expected in ((Objective.ALONE, [{True}, {False}]), (None, [{False}, {False}])):
        with load_tenants(gpu, pair, coloring=coloring, overlap=overlap) as roster:
            assert [overlapping(loaded) for loaded in roster.tenants] == expected


def test_weights_on_the_host_too(gpu: Gpu, tenant: Callable[..., Tenant]) -> None:
    hosted = tenant("ls", "LS", "squeezenet1_1", rate=100, residency="host")
    with load_tenants(gpu, [hosted], swap_bytes=64 << 20) as roster:
        (loaded,) = roster.tenants
        assert overlapping(loaded) == {True}


def test_not_on_what_is_preempted(gpu: Gpu, pair: list[Tenant]) -> None:
    with make_preemptible(load_tenants(gpu, pair), ["ls"]).roster as roster:
        assert [overlapping(loaded) for loaded in roster.tenants] == [{False}, {False}]


def test_not_on_a_gpu_without_dependent_launches(pair: list[Tenant]) -> None:
    with open_gpu("sim:v100") as old, open_gpu("sim:h200") as new:
        assert overlap_of(old, True) is None
        assert overlap_of(new, True) == Tuned(Objective.ALONE)
        assert overlap_of(new, True, Objective.BESIDE) == Tuned(Objective.BESIDE)
        assert overlap_of(new, True, None) is None
        assert overlap_of(new, False) is None


def test_a_scenario_says_how() -> None:
    text = """
duration_s = 1
policies = ["streams"]
{}
[[tenant]]
name = "a"
class = "BE"
model = "x"
arrivals = {{ kind = "closed" }}
"""
    assert parse_scenario(text.format("")).objective is Objective.ALONE
    assert parse_scenario(text.format('overlap = "beside"\n')).objective is Objective.BESIDE
    assert parse_scenario(text.format('overlap = "off"\n')).objective is None
