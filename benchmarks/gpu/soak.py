"""A soak with arrivals from a recorded trace: nothing may grow, drift, get lost or come twice.

    PYTHONPATH=src python3 benchmarks/gpu/soak.py -o OUT [--seconds 60 | --seconds 3600] [--device sim:h200]
        [--policy "missile:lend=0.3,ls_share=0.25" --slo-factor 1.5]

Two LS tenants replay the Azure LLM conversation trace, compressed, beside two BE tenants. With --slo-factor each has an
objective, so many times its p99 alone, which is measured first in a leg of its own. Writes `soak.json` as it goes and exits
1 when something does not hold. What is simulated says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from missile.bench.environment import describe_environment
from missile.bench.scenario import Scenario
from missile.bench.soak import Soak, held_now
from missile.bench.testbed import GpuTestbed, open_testbed
from missile.runtime.metrics import attainment, quantile
from missile.runtime.records import RunRecord
from missile.runtime.tenant import Tenant

TRACE = "azure-llm-2023/conv"
LS = (("resnet34", 300.0), ("efficientnet_b0", 300.0))
BE = ("densenet161", "decoder_1b")


def tenants(rate_factor: float) -> list[dict[str, object]]:
    ls = [
        {
            "name": model,
            "class": "LS",
            "model": model,
            "arrivals": {"kind": "trace", "name": TRACE, "rate_per_s": rate * rate_factor},
        }
        for model, rate in LS
    ]
    be = [{"name": model, "class": "BE", "model": model, "arrivals": {"kind": "closed", "depth": 2}} for model in BE]
    return [*ls, *be]


def with_objective(testbed: GpuTestbed, tenant: Tenant, factor: float, duration_ns: int) -> Tenant:
    """An LS tenant with an objective of `factor` times its p99 alone; others, and all where it is 0, as they are."""
    if not factor or not tenant.latency_sensitive:
        return tenant
    (alone,) = testbed.solo(tenant, seed=1, duration_ns=duration_ns, warmup_ns=0).tenants
    p99 = quantile(alone.latency, 0.99)
    if p99 is None:
        raise SystemExit(f"{tenant.name} finished too few requests alone for an objective; legs have to be longer.")
    return tenant.model_copy(update={"slo_ms": round(factor * p99.value / 1e6, 4)})


def leg_of(record: RunRecord, some: Sequence[Tenant]) -> dict[str, dict[str, float]]:
    """What each tenant had in a leg: the share within its objective, or requests/s of BE."""
    rows = {row.name: row for row in record.tenants}
    met = {t.name: attainment(rows[t.name], round(t.slo_ms * 1e6)) or 0.0 for t in some if t.slo_ms is not None}
    rates = {t.name: len(rows[t.name].done) / record.duration_ns * 1e9 for t in some if not t.latency_sensitive}
    return {"met": met, "be_per_s": rates}


def soak(
    testbed: GpuTestbed, scenario: Scenario, seconds: float, leg_s: float, out: Path | None, slo_factor: float = 0.0
) -> tuple[Soak, list[dict[str, dict[str, float]]]]:
    """Play legs of `leg_s` until they make `seconds` together; `soak.json` is written after each. What each leg gave."""
    (policy,) = scenario.policies
    duration_ns = round(leg_s * 1e9)
    tenants = [with_objective(testbed, tenant, slo_factor, duration_ns) for tenant in scenario.tenants]
    gave: list[dict[str, dict[str, float]]] = []

    def serve(some: Sequence[Tenant], seed: int) -> RunRecord:
        record = testbed.shared(some, policy, seed=seed, duration_ns=duration_ns, warmup_ns=0)
        gave.append(leg_of(record, some))
        return record

    legs = max(round(seconds / leg_s), 3)
    soaking = Soak(tenants, serve, lambda: held_now(testbed.gpu), legs)
    begin = time.monotonic()
    for leg in range(legs):
        record = soaking.play()
        if out is not None:
            write(out, testbed, soaking, policy, leg_s, time.monotonic() - begin, gave)
        if record.fault or record.interrupted:
            break
        if sys.stderr.isatty():
            print(f"\rleg {leg + 1} of {legs}", end="", file=sys.stderr, flush=True)
    return soaking, gave


def write(
    out: Path,
    testbed: GpuTestbed,
    soaking: Soak,
    policy: str,
    leg_s: float,
    took_s: float,
    gave: Sequence[dict[str, dict[str, float]]],
) -> None:
    result = {
        "simulated": testbed.info.simulated,
        "environment": describe_environment(testbed.info),
        "policy": policy,
        "trace": TRACE,
        "leg_s": leg_s,
        "legs": soaking.played,
        "took_s": round(took_s, 1),
        "requests": soaking.requests,
        "rejected": soaking.rejected,
        "problems": soaking.problems,
        "p99_ms_by_third": soaking.tails_ms(),
        "slo_ms": {tenant.name: tenant.slo_ms for tenant in soaking.tenants if tenant.slo_ms is not None},
        "gave": gave,
        "checks": [asdict(check) for check in soaking.checks()],
        "held": [asdict(held) for held in soaking.held],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--leg-s", type=float, default=2.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--policy", default="missile")
    parser.add_argument("--slo-factor", type=float, default=0.0, help="objectives over p99s alone; 0: none")
    parser.add_argument("--rates", type=float, default=1.0, help="times the rates here (300/s each)")
    options = parser.parse_args()
    if "lend=" in options.policy and not options.slo_factor:
        parser.error("without objectives nothing is lent: give --slo-factor")
    scenario = Scenario.model_validate(
        {
            "duration_s": options.leg_s,
            "device": options.device,
            "policies": [options.policy],
            "tenant": tenants(options.rates),
        }
    )
    with open_testbed(scenario) as testbed:
        testbed.prepare(scenario.tenants, scenario.policies)
        soaking, gave = soak(testbed, scenario, options.seconds, options.leg_s, options.out, options.slo_factor)
        name = f"{'simulated ' if testbed.info.simulated else ''}{testbed.info.name}"
    print(f"{name}, {options.policy}: {soaking.played} legs of {options.leg_s:g} s")
    for check in soaking.checks():
        print(
            f"{ {True: 'holds', False: 'DOES NOT HOLD', None: 'not known'}[check.holds]:14} {check.what}: {check.found}"
        )
    for what, title in (("met", "within the objective, least of a leg and mean"), ("be_per_s", "BE/s, least and mean")):
        for name in gave[0][what] if gave else ():
            found = [leg[what][name] for leg in gave]
            print(f"{title}: {name} {min(found):.4g}, {sum(found) / len(found):.4g}")
    return 0 if all(check.holds is not False for check in soaking.checks()) else 1


if __name__ == "__main__":
    sys.exit(main())
