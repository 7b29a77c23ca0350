"""Whole probes of simulated GPUs with known answers."""

from __future__ import annotations

import tomllib
from importlib import resources

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from random_specs import gpu_with, masks_in_page, memories, truth_of, wrong_granules

import missile
from missile.errors import MissileError, MisuseError, NoisyGpuError, OutOfMemoryError, UnsupportedError
from missile.gpu import open_gpu
from missile.gpu.sim import SimulatedGpu
from missile.probe import ChannelMap, Verdict, probe_gpu
from missile.probe.gf2 import echelon


def memory_of(name: str) -> dict:
    text = resources.files("missile.gpu.sim").joinpath("specs", f"{name}.toml").read_text()
    return tomllib.loads(text)["memory"]


def quick(gpu: SimulatedGpu, pages: int = 48, seed: int = 0) -> ChannelMap:
    return probe_gpu(gpu, pages=pages, interference=False, seed=seed)


@pytest.mark.parametrize(("name", "slices"), [("v100", 32), ("gtx1080", 8)])
def test_published_masks_are_recovered_exactly(name: str, slices: int) -> None:
    with open_gpu(f"sim:{name}") as gpu:
        found = quick(gpu)
        assert found.linear_masks == masks_in_page(memory_of(name)["hash"]["masks"], found.page_bytes)
        assert found.slices == slices
        assert found.granule_bytes == 1024
        assert found.digits == ()
        assert wrong_granules(gpu, found) == 0


@pytest.mark.parametrize(
    ("name", "slices", "base", "granule"),
    [("p40", 12, 3, 1024), ("a2000", 6, 3, 1024), ("a5500", 12, 12, 1024), ("h200", 96, 48, 512)],
)
def test_nonlinear_hashes_are_recovered_exactly(name: str, slices: int, base: int, granule: int) -> None:
    with open_gpu(f"sim:{name}") as gpu:
        found = quick(gpu)
        assert found.linear_masks == masks_in_page(memory_of(name)["hash"]["masks"], found.page_bytes)
        assert (found.slices, [digit.base for digit in found.digits]) == (slices, [base])
        assert found.granule_bytes == granule
        assert wrong_granules(gpu, found) == 0


def test_h100_has_the_measured_masks_a_digit_of_base_5_and_eight_colors_of_4_kib_frames() -> None:
    with open_gpu("sim:h100") as gpu:
        found = quick(gpu)
        assert echelon(found.linear_masks) == echelon([0xB3000, 0x18A000, 0xC4000, 0x22800])
        assert (found.slices, found.digits[0].base, found.granule_bytes) == (80, 5, 512)
        assert found.layout.pieces().tolist() == [0, 512]
        assert (len(found.colors), found.frame_bytes) == (8, 4096)
        colors = found.color_of(np.arange(0, found.page_bytes, 256)).reshape(-1, 16)
        assert (colors == colors[:, :1]).all()
        assert found.topology.step == pytest.approx(30, abs=4)
        assert wrong_granules(gpu, found) == 0


def test_the_hash_that_an_h200_showed_is_recovered() -> None:
    # 94 slices: a parity, and a weighted sum of parities modulo 47 (docs/design/channel-map.md), page bits made up.
    folds = [0x80000, 0x100000, 0xF2400, 0x64800, 0x192800, 0x1DA400, 0x20000, 0xF4000, 0x151100, 0x40000]
    high = [0x5A200000, 0x93400000, 0x2C800000, 0x71200000, 0x0D600000, 0x66400000, 0x9B800000, 0x48200000, 0, 0]
    memory = {
        "hash": {
            "masks": [0xE30AB000],
            "digits": [
                {
                    "base": 47,
                    "folds": [fold | more for fold, more in zip(folds, high, strict=True)] + [1 << 24, 1 << 26],
                    "weights": [1, 2, -3, -6, -9, -11, 12, -18, -22, -23, 5, 14],
                }
            ],
        },
        "latency": {"groups": 22, "half": 30.0},
    }
    gpu = gpu_with(memory, sms=66)
    found = quick(gpu)
    assert (found.slices, found.linear_masks, found.granule_bytes) == (94, (0xAB000,), 512)
    assert [digit.base for digit in found.digits] == [47]
    assert wrong_granules(gpu, found) == 0


def test_the_slice_number_is_made_of_parities_and_the_digit() -> None:
    with open_gpu("sim:p40") as gpu:
        found = quick(gpu)
    index_masks = [
        sum(1 << i for i, bit in enumerate(found.layout.index_bits) if mask >> bit & 1) for mask in found.linear_masks
    ]
    index = np.arange(found.granules)
    parities = sum((np.bitwise_count(index & mask) & 1).astype(int) << i for i, mask in enumerate(index_masks))
    assert (found.page_slices() == parities + (found.digits[0].table << len(index_masks))).all()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(memories())
def test_random_hashes_are_recovered_without_a_wrong_granule_or_refused(memory: dict) -> None:
    gpu = gpu_with(memory)
    try:
        found = quick(gpu)
    except (NoisyGpuError, UnsupportedError):
        event("refused")
        return
    event("recovered")
    assert wrong_granules(gpu, found, pages=12) == 0
    wanted = masks_in_page(memory["hash"]["masks"], found.page_bytes)
    assert echelon([*wanted, *found.linear_masks]) == found.linear_masks


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(memories())
def test_many_random_hashes(memory: dict) -> None:
    gpu = gpu_with(memory)
    try:
        found = quick(gpu)
    except (NoisyGpuError, UnsupportedError):
        return
    assert wrong_granules(gpu, found) == 0


@pytest.mark.parametrize("name", ["gtx1080", "p40", "v100"])
def test_slices_that_answer_alike_are_refused_not_merged(name: str) -> None:
    memory = memory_of(name)
    memory["latency"]["coincide"] = 2
    for seed in range(3):
        with pytest.raises(NoisyGpuError):
            quick(gpu_with(memory), seed=seed)


@pytest.mark.parametrize("disturbance", [0.1, 0.3, 0.7])
def test_a_gpu_in_use_is_refused_with_the_reason(disturbance: float) -> None:
    memory = memory_of("gtx1080")
    memory["latency"]["disturbance"] = disturbance
    with pytest.raises(NoisyGpuError, match="probe again while"):
        quick(gpu_with(memory))


@pytest.mark.parametrize(("field", "value"), [("spread", 0.0), ("noise", 12.0)])
def test_what_latency_cannot_show_is_refused(field: str, value: float) -> None:
    memory = memory_of("p40")
    memory["latency"][field] = value
    with pytest.raises(NoisyGpuError):
        quick(gpu_with(memory))


def test_small_pages_few_slices_and_few_sms_work() -> None:
    small = memory_of("gtx1080") | {"page_bytes": 65536}
    gpu = gpu_with(small)
    assert quick(gpu).page_bytes == 65536
    two = memory_of("gtx1080")
    two["hash"] = {"masks": two["hash"]["masks"][:1]}
    gpu = gpu_with(two, sms=4)
    found = quick(gpu)
    assert found.slices == 2
    assert wrong_granules(gpu, found) == 0


def test_memory_is_given_back_and_lack_of_it_is_said() -> None:
    gpu = gpu_with(memory_of("gtx1080"))
    free = gpu.memory_free()
    quick(gpu)
    assert gpu.memory_free() == free
    with pytest.raises(OutOfMemoryError, match="another process holds the rest"):
        probe_gpu(gpu, pages=10**6)
    assert gpu.memory_free() == free


def test_an_interrupted_probe_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_with(memory_of("gtx1080"))
    free = gpu.memory_free()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("missile.probe.session.classify", stop)
    with pytest.raises(KeyboardInterrupt):
        quick(gpu)
    assert gpu.memory_free() == free


def test_probes_of_different_allocations_agree() -> None:
    with open_gpu("sim:a2000") as gpu:
        first, second = quick(gpu, seed=1), quick(gpu, seed=2)
        range_ = gpu.reserve(8 * gpu.info.page_bytes)
        range_.map(0, [gpu.create_page() for _ in range(8)])
        pages = range_.address + np.arange(8) * gpu.info.page_bytes
        slices = [found.page_slices(found.classify(gpu, pages)).reshape(-1) for found in (first, second)]
        # Names are each map's own; the partition of the granules of all pages is the GPU's.
        assert len(np.unique(np.stack(slices), axis=1).T) == first.slices == second.slices
        assert len(np.unique(truth_of(gpu, pages[:, None] + first.layout.offsets()))) == first.slices


def test_witnesses_are_recorded() -> None:
    with open_gpu("sim:a2000") as gpu:
        found = quick(gpu)
    verdicts = {witness.name: witness.verdict for witness in found.witnesses}
    assert verdicts == {
        "held-out granules": Verdict.AGREES,
        "spectrum": Verdict.AGREES,
        "contention": Verdict.AGREES,
        "channels": Verdict.AGREES,
        "counters": Verdict.NOT_RUN,
    }
    assert found.confidence > 0.999


def test_interference_is_on_the_diagonal_of_separate_channels() -> None:
    with open_gpu("sim:a2000") as gpu:
        found = probe_gpu(gpu, pages=48)
    assert found.interference is not None
    for matrix in found.interference.slowdown.values():
        assert matrix.shape == (len(found.colors), len(found.colors))
        assert np.diag(matrix).min() > 1.5
        assert matrix[~np.eye(len(matrix), dtype=bool)].max() < 1.1


def test_the_package_is_the_call() -> None:
    found = missile.probe("sim:a2000", pages=32, interference=False)
    assert isinstance(found, missile.probe.ChannelMap)


def test_a_map_knows_whose_it_is() -> None:
    with open_gpu("sim:a2000") as gpu, open_gpu("sim:p40") as other:
        found = quick(gpu)
        with pytest.raises(MisuseError, match="This channel map is of"):
            found.classify(other, [0])
        with pytest.raises(MisuseError, match="could not be classified"):
            found.slice_of([0], (-1, -1, -1))
        with pytest.raises(MisuseError, match="not of this map"):
            found.slice_of([0], (0, 0, 10**6))
    with pytest.raises(MissileError):
        missile.probe("sim:nope")
