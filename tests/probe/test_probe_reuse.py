"""Maps used again: on the chip they are of, on another chip with the same hash, on one that only claims to be."""

from __future__ import annotations

import copy
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from random_specs import gpu_with, kept_share, memories, wrong_granules

from missile.errors import MisuseError, NoisyGpuError, UnsupportedError
from missile.gpu.sim import SimulatedGpu
from missile.probe import ChannelMap, Verdict, map_for, probe_gpu, read_map, verify, write_map
from missile.probe.reuse import map_path
from missile.probe.takeover import fitting_shift

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "probe-h200" / "map1.json"
MEMORY = tomllib.loads(resources.files("missile.gpu.sim").joinpath("specs", "p40.toml").read_text())["memory"]


def another_chip(memory: dict) -> dict:
    """The same hash, everything standing elsewhere."""
    other = copy.deepcopy(memory)
    other["latency"]["groups"] = other["latency"].get("groups", 8) + 1
    return other


def verdicts(found: ChannelMap) -> dict[str, Verdict]:
    return {witness.name: witness.verdict for witness in found.witnesses}


def quick(gpu: SimulatedGpu, **options: object) -> ChannelMap:
    return probe_gpu(gpu, pages=48, interference=False, **options)


def test_a_chip_is_probed_once_and_verified_from_then_on(tmp_path: Path) -> None:
    said: list[str] = []
    first = map_for(gpu_with(MEMORY), cache=tmp_path, pages=48, interference=False, progress=said.append)
    assert any("reference page" in line for line in said)
    said.clear()
    # Another process: other pages, other noise.
    gpu = gpu_with(MEMORY, seed=5)
    again = map_for(gpu, cache=tmp_path, seed=5, progress=said.append)
    assert said == ["verifying a known map"]
    assert (again.model.patterns[0] == first.model.patterns[0]).all()
    assert verdicts(again)["held-out granules"] == verdicts(again)["contention"] == Verdict.AGREES
    assert again.statistics["seconds: verification"] == again.seconds
    assert wrong_granules(gpu, again) == 0


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(memories(), memories())
def test_a_map_of_another_hash_never_passes(one: dict, other: dict) -> None:
    assume(one["hash"] != other["hash"])
    try:
        found = quick(gpu_with(one))
    except (NoisyGpuError, UnsupportedError):
        event("refused")
        return
    gpu = gpu_with(other)
    if gpu.info.page_bytes == found.page_bytes:
        tested = verify(gpu, found)
        assert Verdict.DISAGREES in verdicts(tested).values() or verdicts(tested)["held-out granules"] != Verdict.AGREES


# A probe takes a second, so making a failing example smaller would take minutes.
@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
@given(memories())
def test_the_hash_of_one_chip_serves_another(memory: dict) -> None:
    try:
        known = quick(gpu_with(memory))
        found = quick(gpu_with(another_chip(memory)), known=known)
    except (NoisyGpuError, UnsupportedError):
        event("refused")
        return
    event("served")
    # Few pages teach few of the ways in which pages relate, whoever looks at them: some fresh pages may be left out.
    share = kept_share(gpu_with(another_chip(memory), seed=1), found)
    try:
        afresh = quick(gpu_with(another_chip(memory)))
        assert share > kept_share(gpu_with(another_chip(memory), seed=1), afresh) - 0.1
    except NoisyGpuError:
        event("served where a probe of its own is refused")
    if share > 0.0:
        assert wrong_granules(gpu_with(another_chip(memory), seed=1), found, least_kept=0.0) == 0
    assert found.linear_masks == known.linear_masks


def test_another_chips_map_in_the_cache_is_not_believed(tmp_path: Path) -> None:
    other = gpu_with(another_chip(MEMORY))
    write_map(quick(other), map_path(other.info, tmp_path))
    gpu = gpu_with(MEMORY)
    said: list[str] = []
    found = map_for(gpu, cache=tmp_path, pages=48, interference=False, progress=said.append)
    assert any("fit no constants" in line or "like another slice" in line for line in said)
    assert wrong_granules(gpu, found) == 0
    assert read_map(map_path(gpu.info, tmp_path)).metric.centres == pytest.approx(found.metric.centres, abs=1e-3)


def test_a_known_hash_that_does_not_fit_is_measured_anew() -> None:
    changed = copy.deepcopy(MEMORY)
    changed["hash"]["masks"] = changed["hash"]["masks"][:1]
    known = quick(gpu_with(changed))
    gpu = gpu_with(MEMORY)
    assert wrong_granules(gpu, quick(gpu, known=known)) == 0


def test_maps_of_other_kinds_and_broken_files_in_the_cache_are_passed_over(tmp_path: Path) -> None:
    gpu = gpu_with(MEMORY)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_bytes(RECORDED.read_bytes())
    assert map_for(gpu, cache=tmp_path, pages=48, interference=False).gpu == gpu.info.name
    with pytest.raises(MisuseError, match="H200"):
        map_for(gpu, cache=tmp_path, known=RECORDED)


def test_a_cache_that_can_not_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    map_for(gpu_with(MEMORY), cache=tmp_path / "file", pages=48, interference=False, progress=said.append)
    assert any("is not kept" in line for line in said)


def test_nothing_is_left_behind_by_a_test() -> None:
    gpu = gpu_with(MEMORY)
    found = quick(gpu)
    free = gpu.memory_free()
    verify(gpu, found)
    assert gpu.memory_free() == free


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4095))
def test_the_shift_of_a_recorded_page_is_found_through_twins_and_strays(seed: int, shift: int) -> None:
    pattern = read_map(RECORDED).model.patterns[0]
    rng = np.random.default_rng(seed)
    names = np.minimum(rng.permutation(94), 89)  # five slices answer alike, and all have new names
    labels = names[pattern[np.arange(4096) ^ shift]]
    labels[rng.choice(4096, 10, replace=False)] = -1
    found = fitting_shift(pattern, labels)
    assert found is not None
    known = labels >= 0
    under = pattern[np.arange(4096) ^ found]
    assert all(len(set(labels[known & (under == slice_)])) == 1 for slice_ in range(94))
    scrambled = labels.copy()
    scrambled[rng.choice(4096, 400, replace=False)] = rng.integers(0, 80, 400)
    assert fitting_shift(pattern, scrambled) is None
