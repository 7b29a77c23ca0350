"""A testbed of arithmetic: one server per lane, service times drawn from a seed. It stands in for runtime and GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from missile.bench.results import Results
from missile.bench.run import Bench, Planned, run_all
from missile.bench.scenario import Scenario, parse_scenario
from missile.errors import MisuseError, UnsupportedError
from missile.gpu.interface import GpuInfo, Level
from missile.runtime.records import RunRecord, TenantRecord
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import ClosedLoop, arrival_times

SCENARIO = """
name = "toy"
description = "Two LS and two BE tenants for the tests."
seed = 7
duration_s = 2.0
warmup_s = 0.25
repeats = 3
policies = ["temporal", "streams", "priority", "partition"]

[[tenant]]
name = "detect"
class = "LS"
model = "resnet34"
slo_factor = 1.5
arrivals = { kind = "trace", name = "disb-real/vgg19_rt", rate_per_s = 250 }

[[tenant]]
name = "rank"
class = "LS"
model = "mobilebert"
slo_ms = 6.0
arrivals = { kind = "poisson", rate_per_s = 150 }

[[tenant]]
name = "reindex"
class = "BE"
model = "densenet161"
arrivals = { kind = "closed", depth = 1 }

[[tenant]]
name = "decode"
class = "BE"
model = "decoder_1b"
arrivals = { kind = "closed", depth = 1 }
"""

POLICIES = {
    "temporal": "One request at a time has the whole GPU; LS requests go first.",
    "streams": "Every tenant has a CUDA stream of its own.",
    "priority": "Streams, with high priority for LS tenants.",
    "partition": "A fixed set of SMs for LS tenants, the others for BE tenants.",
}
_SERVICE_MS = {"detect": 0.8, "rank": 1.6, "reindex": 18.0, "decode": 6.0}
_SLOWER = {"solo": 1.0, "temporal": 1.0, "streams": 3.0, "priority": 1.7, "partition": 1.5}
_LANES = {
    "solo": ["the whole GPU"],
    "temporal": ["the whole GPU, one request at a time"],
    "streams": ["stream of detect", "stream of rank", "stream of reindex", "stream of decode"],
    "priority": [
        "high-priority stream of detect",
        "high-priority stream of rank",
        "stream of reindex",
        "stream of decode",
    ],
    "partition": ["LS partition (32 SMs)", "LS partition (32 SMs)", "BE partition (100 SMs)", "BE partition (100 SMs)"],
}


@dataclass
class ToyTestbed:
    """Runs end where `fail_at` says: {(policy or tenant, seed): what to raise}."""

    simulated: bool = True
    fail_at: dict[tuple[str, int], BaseException] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    @property
    def info(self) -> GpuInfo:
        return GpuInfo(
            name="NVIDIA H100 80GB HBM3",
            device="sim:h100" if self.simulated else "cuda:0",
            simulated=self.simulated,
            level=Level.MEMORY_LAB,
            sms=132,
            l2_bytes=50 << 20,
            memory_bytes=80 << 30,
            page_bytes=2 << 20,
            sm_granularity=8,
            sm_minimum=8,
            copy_engines=3,
            compute_capability=(9, 0),
        )

    def describe(self, policy: str) -> str:
        if policy not in POLICIES:
            raise MisuseError(f"Unknown policy {policy!r}; known: {', '.join(POLICIES)}.")
        return POLICIES[policy]

    def solo(self, tenant: Tenant, *, seed: int, duration_ns: int, warmup_ns: int) -> RunRecord:
        return self._run((tenant,), "solo", tenant.name, seed, duration_ns, warmup_ns)

    def shared(
        self, tenants: tuple[Tenant, ...], policy: str, *, seed: int, duration_ns: int, warmup_ns: int
    ) -> RunRecord:
        return self._run(tenants, policy, policy, seed, duration_ns, warmup_ns)

    def prepare(self, tenants: tuple[Tenant, ...], policies: tuple[str, ...]) -> None:
        pass

    def plan(self, tenants: tuple[Tenant, ...], *, seed: int, solos: dict[str, RunRecord]) -> Planned | None:
        return None

    def _run(
        self, tenants: tuple[Tenant, ...], policy: str, what: str, seed: int, duration_ns: int, warmup_ns: int
    ) -> RunRecord:
        self.calls.append(what)
        if (what, seed) in self.fail_at:
            raise self.fail_at[what, seed]
        records = [
            _serve(tenant, index, policy, len(tenants), seed, duration_ns, warmup_ns)
            for index, tenant in enumerate(tenants)
        ]
        return RunRecord(
            policy=policy,
            device=self.info.device,
            simulated=self.simulated,
            duration_ns=duration_ns,
            warmup_ns=warmup_ns,
            seed=seed,
            tenants=tuple(records),
            lanes=tuple(_LANES[policy]),
        )


def _serve(
    tenant: Tenant, index: int, policy: str, sharing: int, seed: int, duration_ns: int, warmup_ns: int
) -> TenantRecord:
    rng = np.random.default_rng((seed, index, len(policy)))
    closed = isinstance(tenant.arrivals, ClosedLoop)
    service_ms = _SERVICE_MS[tenant.name] * (_SLOWER[policy] if tenant.latency_sensitive else 1)
    if closed and sharing > 1:
        service_ms *= {"temporal": 3.5, "streams": 2.2, "priority": 2.5, "partition": 2.7}[policy]
    arrivals = arrival_times(tenant.arrivals, seed=seed, tenant=tenant.name, horizon_ns=duration_ns)
    count = int(duration_ns / 1e6 / service_ms) if closed else len(arrivals)
    service = (service_ms * rng.gamma(40, 1 / 40, count) * 1e6).astype(np.int64)
    start, end = np.zeros(count, np.int64), np.zeros(count, np.int64)
    free = 0
    wait = rng.exponential(4e6, count) if policy == "temporal" and tenant.latency_sensitive else np.zeros(count)
    for i in range(count):
        start[i] = max(free, 0 if closed else arrivals[i] + 9_000 + int(wait[i]))
        free = end[i] = start[i] + service[i]
    arrival = np.maximum(start - 5_000, 0) if closed else arrivals
    done = end + 12_000
    keep = (arrival >= warmup_ns) & (done < duration_ns)
    lane = np.full(count, min(index, len(_LANES[policy]) - 1))
    return TenantRecord(
        name=tenant.name,
        arrival=arrival[keep],
        dispatch=arrival[keep] + 4_000,
        start=start[keep],
        end=end[keep],
        done=done[keep],
        lane=lane[keep],
        unfinished=int(np.count_nonzero((arrival >= warmup_ns) & (done >= duration_ns))),
    )


@pytest.fixture
def scenario() -> Scenario:
    return parse_scenario(SCENARIO)


@pytest.fixture(scope="session")
def toy_results() -> Results:
    """A whole bench run on the toy testbed, with one policy that it can't run."""
    testbed = ToyTestbed(fail_at={("partition", 7): UnsupportedError("this GPU has no SM partitions.")})
    results, stopped = run_all(Bench(parse_scenario(SCENARIO), testbed), lambda index, step: None)
    assert stopped is None
    return results


@pytest.fixture
def toy_testbed() -> type[ToyTestbed]:
    return ToyTestbed
