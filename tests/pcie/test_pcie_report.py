"""What `missile pcie` says: arithmetic of the summaries, chunk sizes from a link, and the command end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.cli import main
from missile.errors import MisuseError
from missile.gpu import open_gpu
from missile.pcie.direct import Direct, DirectCopier
from missile.pcie.engine import CopyEngine
from missile.pcie.link import LinkProfile, choose_options, measure_link
from missile.pcie.load import Bulk, LoadResult, Requests, run_load
from missile.pcie.summary import jain, latency_summary, share_deviation, windows
from missile.pcie.ticket import Direction
from missile.pcie.weights import MIB


@given(st.lists(st.floats(0.001, 1e12), min_size=1, max_size=20), st.floats(0.001, 1e6))
def test_jains_index_is_between_one_nth_and_one_and_ignores_scale(amounts: list[float], scale: float) -> None:
    index = jain(amounts)
    assert 1 / len(amounts) - 1e-9 <= index <= 1 + 1e-9
    assert jain([amount * scale for amount in amounts]) == pytest.approx(index)
    assert jain([amounts[0]] * 7) == pytest.approx(1)


def test_percentiles_are_only_given_when_there_are_enough_copies() -> None:
    few = latency_summary(np.arange(99, dtype=np.int64) * 1000)
    assert (few["p50_us"], few["p99_us"]) == (49.0, None)
    many = latency_summary(np.arange(1000, dtype=np.int64) * 1000)
    assert (many["p50_us"], many["p99_us"], many["p999_us"]) == (499.0, 989.0, 998.0)  # each a time that a copy had
    assert latency_summary(np.empty(0, np.int64))["max_us"] is None


def test_windows_count_each_arrival_where_it_belongs() -> None:
    chunks = {
        "a h2d": np.array([[5, 10], [15, 20], [25, 40]]),
        "b h2d": np.array([[10, 1], [19, 2]]),
        "a d2h": np.array([[5, 999]]),
    }
    result = LoadResult(30, {}, {}, {}, chunks, 0.0, 0.0, 0)
    names, table = windows(result, Direction.H2D, 10, step_ns=5, skip_ns=0)
    assert names == ["a", "b"]
    assert table.tolist() == [[10, 0], [10, 1], [20, 3], [20, 2], [40, 0]]
    assert result.rate(Direction.D2H) == 999 * 1e9 / 30


def test_share_deviation_sees_a_wrong_share() -> None:
    times = np.arange(1, 200) * 1_000_000
    even = np.stack([times, np.full(199, 100)], axis=1)
    result = LoadResult(200_000_000, {}, {}, {}, {"a h2d": even, "b h2d": even}, 0.0, 0.0, 0)
    assert share_deviation(result, {"a": 1, "b": 1})["worst"] == 0
    wrong = share_deviation(result, {"a": 1, "b": 3})
    assert wrong["worst"] == pytest.approx(1.0)
    assert wrong["jain"] < 0.9


def _profile(rates: dict[int, float]) -> LinkProfile:
    both = dict.fromkeys(Direction, max(rates.values()))
    latency = {direction: {4096: (10e3, 20e3)} for direction in Direction}
    return LinkProfile("x", "sim:x", True, dict.fromkeys(Direction, rates), both, latency, dict.fromkeys(Direction, 0))


@given(raw=st.floats(1e9, 100e9), overhead_us=st.floats(0.1, 20))
def test_chosen_chunks_reach_the_rate_and_keep_the_latency(raw: float, overhead_us: float) -> None:
    rates = {1 << p: (1 << p) / ((1 << p) / raw + overhead_us * 1e-6) for p in range(16, 27)}
    options = choose_options(_profile(rates))
    g = options.granularity
    best = max(rates.values())
    assert g.short <= g.shared <= g.solo
    assert rates[g.solo] >= 0.985 * best or g.solo == max(rates)
    beside = options.depth * (g.short / raw + overhead_us * 1e-6) + MIB / best + 35e-6
    assert beside <= 110e-6 + 1e-9 or g.short in (min(rates), 256 << 10)


def test_a_link_that_is_slower_with_long_copies_does_not_get_longer_chunks() -> None:
    """As one H200 was in one run: 54.0 GB/s with 8 MiB, 52.9 from 16 MiB on."""
    rates = {MIB: 47.9e9, 4 * MIB: 53.3e9, 8 * MIB: 54.0e9, 16 * MIB: 52.9e9, 32 * MIB: 52.9e9, 64 * MIB: 52.9e9}
    assert choose_options(_profile(rates)).granularity.solo == 16 * MIB


def test_small_copies_overtake_only_where_they_can_and_when_asked_to() -> None:
    profile = replace(_profile({MIB: 48e9, 16 * MIB: 54e9}), bypass={Direction.H2D: 16 << 10, Direction.D2H: 0})
    waiting, overtaking = choose_options(profile), choose_options(profile, overtake=True)
    assert (waiting.h2d_bypass, waiting.d2h_bypass) == (0, 0)
    assert overtaking == replace(waiting, h2d_bypass=16 << 10)


def test_the_link_of_the_simulated_gpu_is_measured_as_specified() -> None:
    with open_gpu("sim:h100") as gpu:
        profile = measure_link(gpu, chunks=(MIB, 16 * MIB), repeats=2)
        assert profile.simulated
        for direction in Direction:
            rates = profile.chunk_rates[direction]
            assert 45e9 < rates[MIB] < rates[16 * MIB] < 60e9
            assert profile.bypass[direction] == 0  # its copy engines never let a copy overtake
        with pytest.raises(MisuseError, match="positive chunk size"):
            measure_link(gpu, chunks=())


def test_the_scheduler_closes_the_gap_that_every_other_way_leaves() -> None:
    with open_gpu("sim:h100") as gpu:
        options = choose_options(measure_link(gpu, chunks=(MIB, 2 * MIB, 4 * MIB, 16 * MIB), repeats=2))
        bulk = [Bulk(name=f"bulk {index}", nbytes=64 * MIB) for index in range(3)]
        requests = [Requests(name="ls", rate=500.0)]
        median = {}
        for how in [*Direct, None]:
            copier = CopyEngine(gpu, options) if how is None else DirectCopier(gpu, how)
            result = run_load(gpu, copier, bulk, requests, duration_s=0.06)
            assert result.rate(Direction.H2D) > 0.85 * options.h2d_rate
            median[how] = float(np.median(result.latency_ns["ls"])) / 1e3
        assert median.pop(None) < 120
        assert min(median.values()) > 1000
        with pytest.raises(MisuseError, match="at least one tenant"):
            run_load(gpu, DirectCopier(gpu, Direct.FIFO), [], [], duration_s=1)


def test_the_command_prints_tables_and_writes_whole_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["pcie", "--device", "sim:h100", "--seconds", "0.05", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert "simulated" in text
    assert "priority" in text
    values = json.loads((out / "pcie.json").read_text())
    assert values["simulated"] is True
    assert values["chosen"]["native"] is False  # there is no driver below a simulated GPU
    assert values["to_host"]["latency"]["ls 1 MiB"]["p50_us"] < 150
    assert set(values["compared"]) == {"streams", "priority", "fifo", "missile"}
    assert values["shares"]["1:2:4"]["worst"] <= 0.02
    assert (out / "pcie.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["pcie.json", "pcie.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seconds", "0"], "--seconds must be between"),
        (["--rate", "-1"], "--rate must be above 0"),
        (["--device", "sim:nothing"], "Unknown device"),
        (["-o", __file__], "is not a directory"),
    ],
)
def test_bad_arguments_exit_with_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pcie", "--device", "sim:h100", *arguments]) == 2
    assert says in capsys.readouterr().err
