"""`lend` in the server: BE beside LS requests that can afford it, by when these came, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from missile.cli.top import headline, tenant_table
from missile.compiler.library import recorded_packages
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.runtime.loading import load_tenants
from missile.runtime.preempting import make_preemptible
from missile.runtime.tenant import Tenant
from missile.serving.config import parse_config
from missile.serving.engine.gpu import GpuExecutor
from missile.serving.engine.live import LiveEngine

LS, BE = 0, 1
GAP_NS = 1_500_000
PAUSES = "missile:copies=off"
LENDS = "missile:copies=off,lend=0.45,ls_share=0.25"


def tenant(name: str, kind: str, **more: object) -> Tenant:
    arrivals = {"kind": "poisson", "rate_per_s": 1.0}  # as of the server's tenants, of which nobody asks
    return Tenant.model_validate({"name": name, "class": kind, "model": name, "arrivals": arrivals, **more})


@contextmanager
def live_engine(gpu: Gpu, policy: str) -> Iterator[LiveEngine]:
    tenants = [
        tenant("resnet34", "LS", slo_ms=2.0),
        tenant("densenet161", "BE"),
    ]
    with make_preemptible(load_tenants(gpu, tenants)).roster as roster:
        live = LiveEngine(gpu, policy, roster.ready, [loaded.depth for loaded in roster.ready])
        try:
            yield live
        finally:
            live.close()


def serve(gpu: Gpu, live: LiveEngine, count: int, *, waited_ns: int = 0) -> tuple[list[int], int]:
    """`count` LS requests at even gaps beside a BE tenant that always has two: how long each LS request ran, and how many BE
    requests ended until the last one had. waited_ns: how long each has been in the server when it is submitted."""
    start, sent, took, ended, outstanding = gpu.now_ns(), 0, [], 0, 0
    while len(took) < count:
        if outstanding < 2:
            live.submit(BE)
            outstanding += 1
        if sent < count and gpu.now_ns() >= start + (sent + 1) * GAP_NS:
            live.submit(LS, waited_ns)
            sent += 1
        for request in live.step(20_000):
            if request.tenant == LS:
                took.append(request.end_ns - request.start_ns)
            else:
                ended += 1
                outstanding -= 1
    while live.busy:
        live.step(20_000)
    return took, ended


def test_be_runs_beside_requests_that_can_afford_it() -> None:
    found = {}
    for policy in (PAUSES, LENDS):
        with open_gpu("sim:h100") as gpu, live_engine(gpu, policy) as live:
            took, ended = serve(gpu, live, 40)
            found[policy] = float(np.median(took)), ended, live.lent_ns[BE], live.preemptions[BE]
            assert live.lends is (policy == LENDS)
            assert live.lent_ns[LS] == 0
    alone, beside = found[PAUSES], found[LENDS]
    assert alone[2] == 0
    assert alone[3] > 20  # nearly each of them stopped BE
    assert beside[0] > 1.05 * alone[0]  # it was slower
    assert beside[1] > 1.1 * alone[1]  # and BE had more
    assert beside[3] < alone[3] / 2
    # Of the time of 40 requests, all but what the loop did not see.
    assert 0.5 * 40 * beside[0] < beside[2] < 1.5 * 40 * beside[0]


def test_requests_that_have_waited_in_the_server_can_not_afford_it() -> None:
    """0.45 of 2 ms is 0.9 ms: a request that came 0.8 ms ago would end after that."""
    with open_gpu("sim:h100") as gpu, live_engine(gpu, LENDS) as live:
        serve(gpu, live, 20, waited_ns=800_000)
        assert live.lent_ns[BE] == 0
        assert live.preemptions[BE] > 10


TENANTS = """
[[tenant]]
name = "front"
model = "resnet34"
class = "LS"
slo_ms = 20
[[tenant]]
name = "back"
model = "densenet161"
class = "BE"
batch = {{max = {batch}}}
"""


@pytest.mark.parametrize("policy", ["missile", "missile:lend=0.3", "missile:lend=0.3,pause=off", "priority"])
def test_what_is_lent_is_told_where_something_may_be(policy: str, tmp_path: Path) -> None:
    batch = dict(recorded_packages())["densenet161"]
    executor = GpuExecutor(memoryview(bytearray(1 << 20)), open_gpu("sim:h100"), policy=policy)
    for slot, one in enumerate(parse_config(TENANTS.format(batch=batch)).tenants, start=1):
        executor.install(slot, one, executor.prepare(one, tmp_path))
    lends = policy == "missile:lend=0.3"
    assert executor.tenant_facts(1).lent_seconds is None
    assert executor.tenant_facts(2).lent_seconds == (0.0 if lends else None)
    assert ("could not afford it" in executor.facts.isolation) is lends
    executor.close()


def test_top_shows_the_policy_and_what_was_lent() -> None:
    shown = {"name": "back", "class": "BE", "state": "READY", "rate": 1.0, "outstanding": 0, "queue_limit": 8}
    empty = dict.fromkeys(("slo_ms", "p50_ms", "p99_ms", "attainment_5m", "burn_5m"))
    row = shown | empty | {"objective": 0.99, "refused": {}, "history": [], "granted": {"lent_seconds": 1.25}}
    table = tenant_table({"tenants": [row]})
    assert [str(column.header) for column in table.columns][-2:] == ["lent s", "p99, last minute"]
    assert list(table.columns[-2].cells) == ["1.2"]
    server = {"version": "1", "uptime_s": 1.0, "draining": False, "engine_running": True, "ready": True}
    device = {"name": "GPU", "policy": "missile:lend=0.3"}
    assert "missile:lend=0.3" in headline({"server": server | {"engine_starts": 1}, "device": device}).plain
