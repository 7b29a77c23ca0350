"""The `mps` policy: real processes, each with a simulated GPU of its own; the daemon's life, with a stand-in for it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from missile.errors import MissileError, MisuseError, OutOfMemoryError, UnsupportedError
from missile.gpu import open_gpu
from missile.runtime.loading import load_tenants
from missile.runtime.mps import MpsPool, MpsSettings
from missile.runtime.mps.daemon import MpsDaemon
from missile.runtime.run import run
from missile.runtime.tenant import Tenant

SPAN = {"seed": 3, "duration_ns": 300_000_000, "warmup_ns": 50_000_000}


def tenant(name: str, kind: str, model: str, **more: object) -> Tenant:
    arrivals = {"kind": "poisson", "rate_per_s": 300} if kind == "LS" else {"kind": "closed"}
    return Tenant.model_validate({"name": name, "class": kind, "model": model, "arrivals": arrivals, **more})


TINY, COPY = tenant("tiny", "LS", "synthetic-tiny"), tenant("copy", "BE", "synthetic-copy")


@pytest.fixture(scope="module")
def pool() -> Iterator[MpsPool]:
    with MpsPool("sim:h100", daemon=False) as made:
        yield made


def workers(pool: MpsPool) -> list[int]:
    return [worker.process.pid for worker in pool._workers.values()]


def test_each_process_serves_its_tenant_s_own_arrivals(pool: MpsPool) -> None:
    record = pool.run([TINY, COPY], "mps:ls_share=0.25,be_share=0.75", **SPAN)
    assert [row.name for row in record.tenants] == ["tiny", "copy"]
    assert (record.duration_ns, record.warmup_ns, record.fault, record.interrupted) == (
        300_000_000,
        50_000_000,
        "",
        False,
    )
    assert record.lanes == ("process of tiny on 132 SMs", "process of copy on 132 SMs")
    assert [set(row.lane.tolist()) for row in record.tenants] == [{0}, {1}]
    with open_gpu("sim:h100") as gpu, load_tenants(gpu, [TINY]) as roster:
        here = run(gpu, roster, "streams", **SPAN)
    np.testing.assert_array_equal(record.tenants[0].arrival, here.tenants[0].arrival)
    assert len(record.tenants[1].done) > 0


def test_settings_have_processes_of_their_own_which_stay(pool: MpsPool) -> None:
    pool.run([TINY], "mps:ls_share=0.25", **SPAN)
    before = workers(pool)
    faster = TINY.model_copy(update={"arrivals": TINY.arrivals.model_copy(update={"rate_per_s": 900.0})})
    again = pool.run([faster], "mps:ls_share=0.25", **SPAN)
    assert workers(pool) == before
    assert len(again.tenants[0].done) > 150  # 225 expected of the new rate, 75 of the old one
    pool.run([TINY], "mps:ls_share=0.5", **SPAN)
    assert len(workers(pool)) == len(before) + 1


def test_workers_of_several_runs_start_at_once_and_are_found_ready(pool: MpsPool) -> None:
    pool._dismiss()
    settings = ["mps", "mps:priority=on", "mps:ls_share=0.5"]
    pool.prepare([TINY, COPY], settings)
    before = workers(pool)
    assert len(before) == 4  # TINY whole and half, COPY at either priority
    for policy in settings:
        pool.run([TINY, COPY], policy, **{**SPAN, "duration_ns": 100_000_000})
    assert sorted(workers(pool)) == sorted(before)


def test_what_fails_in_preparation_is_told_by_the_run(pool: MpsPool) -> None:
    wrong = tenant("x", "LS", "resnet33")
    pool.prepare([wrong, TINY], ["mps"])
    assert "x" not in {worker.tenant for worker in pool._workers.values()}
    with pytest.raises(MisuseError, match="resnet33"):
        pool.run([wrong, TINY], "mps", **SPAN)


def test_there_are_never_too_many_processes(pool: MpsPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("missile.runtime.mps.pool._MOST_WORKERS", 3)
    short = {**SPAN, "duration_ns": 100_000_000}
    pool.run([TINY, COPY], "mps:ls_share=0.25", **short)
    kept = workers(pool)[-1]  # the one whose settings are the same in the next run
    pool.run([TINY, COPY], "mps:ls_share=0.5", **short)
    assert len(workers(pool)) == 3
    assert kept in workers(pool)
    pool.run([TINY, COPY], "mps:ls_share=0.75", **short)
    assert len(workers(pool)) == 3


def test_a_worker_that_dies_leaves_the_others_running(pool: MpsPool) -> None:
    pool.run([TINY, COPY], "mps", **SPAN)
    victim = [worker for worker in pool._workers.values() if worker.tenant == "copy"][-1]  # that of the latest settings
    long = {**SPAN, "duration_ns": 5_000_000_000}
    threading.Timer(0.2, victim.process.kill).start()
    record = pool.run([TINY, COPY], "mps", **long)
    tiny, copy = record.tenants
    assert len(tiny.done) > 1000
    assert not tiny.error
    assert "SIGKILL" in copy.error
    assert "copy" in copy.error
    assert record.notes == (copy.error,)
    assert not pool._workers  # and the next run starts anew
    assert not pool.run([TINY, COPY], "mps", **SPAN).tenants[1].error


def test_what_does_not_fit_is_left_out_and_says_why(pool: MpsPool) -> None:
    small = tenant("small", "BE", "synthetic-copy", memory_limit_mb=10)
    record = pool.run([TINY, small], "mps", **SPAN)
    assert "10 MiB" in record.tenants[1].error
    assert len(record.tenants[0].done) > 0
    with pytest.raises(OutOfMemoryError, match="10 MiB"):
        pool.run([small], "mps", **SPAN)


def test_an_unknown_model_is_the_worker_s_misuse_and_ours(pool: MpsPool) -> None:
    with pytest.raises(MisuseError, match="resnet33"):
        pool.run([tenant("x", "LS", "resnet33")], "mps", **SPAN)
    assert not pool._workers


def test_ctrl_c_ends_the_run_and_keeps_what_was_measured(pool: MpsPool) -> None:
    pool.run([TINY, COPY], "mps", **SPAN)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    record = pool.run([TINY, COPY], "mps", seed=1, duration_ns=60_000_000_000, warmup_ns=0)
    assert time.monotonic() - began < 20
    assert record.interrupted
    assert record.duration_ns < 60_000_000_000
    assert all(len(row.done) for row in record.tenants)


def test_no_process_outlives_the_pool() -> None:
    with MpsPool("sim:h100", daemon=False) as pool:
        pool.run([TINY], "mps", **SPAN)
        (pid,) = workers(pool)
        folder = pool._folder
    assert not Path(f"/proc/{pid}").exists()
    assert not folder.exists()
    pool.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mps:ls_share=0", "ls_share must be above 0"),
        ("mps:be_share=1.5", "be_share must be above 0 and at most 1"),
        ("mps:priority=2", "priority must be 0 or 1"),
        ("mps:share=0.5", "ls_share, be_share, priority"),
        ("mps:ls_share=half", "ls_share=half"),
    ],
)
def test_bad_settings(text: str, says: str) -> None:
    with pytest.raises(MisuseError, match=says):
        MpsSettings.parse(text)


def test_settings_become_what_mps_reads() -> None:
    settings = MpsSettings.parse("mps:ls_share=0.25,priority=on")
    assert settings.environment(TINY) == {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25", "CUDA_MPS_CLIENT_PRIORITY": "0"}
    assert settings.environment(COPY) == {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100", "CUDA_MPS_CLIENT_PRIORITY": "1"}


def test_a_simulated_gpu_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="simulated"):
        MpsPool("sim:h100")


_CONTROL = """#!/bin/sh
dir="$CUDA_MPS_PIPE_DIRECTORY"
if [ "$1" = -d ]; then
  [ -n "$FAIL" ] && echo "An instance of this daemon is already running" && exit 1
  echo started > "$dir/life"
else
  cat >> "$dir/../../said"
fi
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvidia-cuda-mps-control that notes what it is told."""
    script = tmp_path / "bin" / "nvidia-cuda-mps-control"
    script.parent.mkdir()
    script.write_text(_CONTROL)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    folder = tmp_path / "pool"
    folder.mkdir()
    return folder


def test_the_daemon_is_private_and_told_to_quit(control: Path) -> None:
    daemon = MpsDaemon(control)
    assert daemon.environment["CUDA_MPS_PIPE_DIRECTORY"] == str(control / "pipe")
    assert (control / "pipe" / "life").is_file()
    assert not (control.parent / "said").exists()
    daemon.close()
    assert (control.parent / "said").read_text() == "quit\n"
    daemon.close()


def test_the_daemon_ends_also_when_its_owner_is_killed(control: Path) -> None:
    code = (
        "import pathlib, sys, time; from missile.runtime.mps.daemon import MpsDaemon\n"
        "daemon = MpsDaemon(pathlib.Path(sys.argv[1])); print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(control)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        owner.kill()
    said, give_up = control.parent / "said", time.monotonic() + 10
    while not (said.exists() and said.read_text()) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert said.read_text() == "quit\n"


def test_a_daemon_that_refuses_is_quoted(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(MissileError, match="already running"):
        MpsDaemon(control)


def test_without_the_tools_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="nvidia-cuda-mps-control"):
        MpsDaemon(tmp_path)
