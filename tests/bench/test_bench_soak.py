"""A soak's checks see what they are there for, and say nothing where nothing is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.bench.soak import Held, Soak, Tails, held_now, piece_of, problems_of
from missile.errors import MisuseError
from missile.gpu import open_gpu
from missile.runtime.loading import Roster, load_tenants
from missile.runtime.records import RunRecord, TenantRecord
from missile.runtime.run import run
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import TraceArrivals, arrival_times

MS = 1_000_000


def tenant(called: str, class_: str = "BE", model: str = "synthetic-tiny", **arrivals: Any) -> Tenant:
    return Tenant.model_validate(
        {"name": called, "class": class_, "model": model, "arrivals": arrivals or {"kind": "closed"}}
    )


TRACED = tenant("ls", "LS", kind="trace", name="azure-llm-2023/conv", rate_per_s=2000.0)
BULK = tenant("be", model="synthetic-gemv")


@pytest.fixture
def served() -> RunRecord:
    with open_gpu("sim:h100", seed=1) as gpu, load_tenants(gpu, [TRACED, BULK]) as roster:
        return run(gpu, roster, "missile", seed=3, duration_ns=50 * MS)


def test_a_run_is_in_order_and_what_is_not_is_named(served: RunRecord) -> None:
    ls, be = served.tenants

    def problems(row: TenantRecord, other: TenantRecord = be) -> str:
        return " ".join(problems_of(replace(served, tenants=(row, other)), [TRACED, BULK], 3))

    assert len(ls.done) > 20
    assert problems(ls) == ""
    columns = ("arrival", "dispatch", "start", "end", "done", "lane")
    fewer = replace(ls, **{name: getattr(ls, name)[1:] for name in columns})
    assert "accounted for" in problems(fewer)
    assert problems(replace(fewer, rejected=ls.rejected + 1)) == ""
    assert "never finished" in problems(replace(fewer, unfinished=1))
    twice = replace(fewer, arrival=np.r_[fewer.arrival, fewer.arrival[-1]])
    assert "one twice" in problems(twice)
    assert "never arrived" in problems(replace(ls, arrival=ls.arrival + 1))
    assert "before it began" in problems(replace(ls, end=ls.start - 1))
    assert "be: two requests of it ran at once" in problems(ls, replace(be, start=be.start - 50 * MS))
    assert "a fault: gone" in " ".join(problems_of(replace(served, fault="gone"), [TRACED, BULK], 3))


def test_pieces_of_a_trace_are_its_windows_at_the_mean_rate() -> None:
    windows = [piece_of(TRACED, leg, 4).arrivals for leg in range(8)]
    assert windows[:4] == windows[4:]
    assert all(isinstance(window, TraceArrivals) for window in windows)
    assert [window.start_s for window in windows[:4]] == [pytest.approx(i * windows[0].length_s) for i in range(4)]
    times = [arrival_times(window, seed=1, tenant="ls", horizon_ns=10**9) for window in windows[:4]]
    assert len({len(some) for some in times}) > 1  # they differ, as the trace does
    assert piece_of(BULK, 3, 4) is BULK
    free = tenant("ls", "LS", kind="trace", name="azure-llm-2023/conv")
    with pytest.raises(MisuseError, match="rate_per_s"):
        piece_of(free, 0, 4)


@given(st.integers(0, 2**32), st.floats(0.01, 3.0), st.sampled_from([0.5, 0.9, 0.99]))
def test_tails_are_those_of_the_samples(seed: int, spread: float, share: float) -> None:
    tails = Tails()
    values = np.random.default_rng(seed).lognormal(14.0, spread, 1200).astype(np.int64)
    for part in np.array_split(values, 7):
        tails.add(part)
    exact = np.sort(values)[int(np.ceil(share * len(values))) - 1]
    assert tails.quantile(share) == pytest.approx(exact, rel=0.006)
    assert Tails().quantile(share) is None


def soak(served: RunRecord, legs: int, held: Sequence[Held] = (), slower: float = 1.0) -> Soak:
    """A soak whose legs all are `served`, later ones slower by a factor in all."""
    samples = iter(held or [Held(100 << 20, 1 << 30, 20)] * legs)

    def serve(some: Sequence[Tenant], seed: int) -> RunRecord:
        ls, be = served.tenants
        at = arrival_times(some[0].arrivals, seed=seed, tenant="ls", horizon_ns=served.duration_ns)
        latency = np.linspace(1e6, 2e6, len(at)) * slower ** (soaking.played / legs)
        times = {"arrival": at, "dispatch": at, "start": at + np.arange(len(at)), "lane": at * 0}
        row = replace(ls, **times, end=times["start"], done=at + latency.astype(np.int64), rejected=0, unfinished=0)
        return replace(served, tenants=(row, be))

    soaking = Soak([TRACED, BULK], serve, lambda: next(samples), legs, seed=3)
    for _ in range(legs):
        soaking.play()
    return soaking


def verdicts(soaking: Soak) -> dict[str, bool | None]:
    return {check.what: check.holds for check in soaking.checks()}


def test_what_stays_as_it_is_holds(served: RunRecord) -> None:
    found = verdicts(soak(served, 60))
    assert list(found.values()) == [True] * 5
    assert "p99 of ls does not drift" in found


def test_what_grows_or_drifts_does_not(served: RunRecord) -> None:
    leaking = [Held((100 + leg) << 20, (1000 + leg) << 20, 20 + leg // 10) for leg in range(60)]
    found = verdicts(soak(served, 60, leaking, slower=1.4))
    assert found == {
        "No request lost or twice there": True,
        "No growth: host memory": False,
        "No growth: GPU memory": False,
        "No growth: open files": False,
        "p99 of ls does not drift": False,
    }
    # What is taken once, at the beginning, is none.
    settled = [Held((100 + 50 * (leg > 5)) << 20, 1 << 30, 20 + (leg > 5)) for leg in range(60)]
    assert all(verdicts(soak(served, 60, settled)).values())


def test_too_short_a_soak_says_so(served: RunRecord) -> None:
    short = soak(served, 3)
    assert verdicts(short)["p99 of ls does not drift"] is None
    with pytest.raises(MisuseError, match="three legs"):
        soak(served, 2)


def test_a_simulated_soak_of_missile_holds() -> None:
    with open_gpu("sim:h100", seed=1) as gpu, load_tenants(gpu, [TRACED, BULK]) as roster:

        def serve(some: Sequence[Tenant], seed: int) -> RunRecord:
            view = [replace(loaded, tenant=one) for loaded, one in zip(roster.tenants, some, strict=True)]
            playing = Roster(gpu, view, ExitStack())
            return run(gpu, playing, "missile:arm_us=100", seed=seed, duration_ns=30 * MS)

        soaking = Soak([TRACED, BULK], serve, lambda: held_now(gpu), 9)
        for _ in range(9):
            soaking.play()
        assert soaking.problems == []
        assert {held.device_bytes for held in soaking.held[1:]} == {soaking.held[1].device_bytes}
        assert soaking.requests > 100
