"""results.json: read back as written, or refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from missile.bench.results import Results, Run, TenantRun, read_results, write_results
from missile.errors import MisuseError


def test_results_survive_the_file(toy_results: Results, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    write_results(toy_results, path)
    assert read_results(path) == toy_results
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_a_record_survives_its_raw_form(toy_results: Results) -> None:
    run = toy_results.runs[0].tenants[0]
    record = run.record()
    assert TenantRun.from_record(record) == run
    assert record.latency.dtype == np.int64
    assert (record.latency > 0).all()
    assert (record.queueing + record.service == record.latency).all()


def test_of_many_long_passes_their_distribution_is_kept(toy_results: Results) -> None:
    record = toy_results.runs[0].record()
    many = np.random.default_rng(1).permutation(np.arange(20_000, 24_096))
    kept = Run.from_record(replace(record, jitter_ns=many), kind="solo", policy="solo", repeat=0).jitter_ns
    assert len(kept) == 256
    assert (kept[0], kept[-1]) == (20_000, 24_095)
    assert np.percentile(kept, 99) == pytest.approx(np.percentile(many, 99), rel=1e-3)
    few = Run.from_record(replace(record, jitter_ns=many[:9]), kind="solo", policy="solo", repeat=0).jitter_ns
    assert few == sorted(many[:9])


def test_damaged_files_are_refused(toy_results: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(MisuseError, match="no results file"):
        read_results(path)
    write_results(toy_results, path)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(MisuseError, match="can't be read"):
        read_results(path)
    raw = json.loads(whole)
    path.write_text(json.dumps(raw | {"schema": "missile-bench/9"}))
    with pytest.raises(MisuseError, match="missile-bench/9"):
        read_results(path)
    path.write_text("[]")
    with pytest.raises(MisuseError, match="schema None"):
        read_results(path)
    raw["runs"][0]["tenants"][0]["lane"].pop()
    path.write_text(json.dumps(raw))
    with pytest.raises(MisuseError, match="different lengths"):
        read_results(path)


def test_results_from_before_launches_overlapped_say_so(toy_results: Results, tmp_path: Path) -> None:
    """They were not measured as the default is now, and a suite must not take them for it."""
    path = tmp_path / "results.json"
    write_results(toy_results, path)
    raw = json.loads(path.read_text())
    del raw["scenario"]["overlap"]
    path.write_text(json.dumps(raw))
    assert toy_results.scenario.overlap == "alone"
    assert read_results(path).scenario.overlap == "off"
