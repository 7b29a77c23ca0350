"""Cold starts of tenants whose weights wait on the host, for tables. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from missile.bench.results import Results

__all__ = ["ColdStarts", "cold_starts"]


@dataclass(frozen=True, slots=True)
class ColdStarts:
    """A tenant's under one policy, all repeats. Times in ms; ideal: its bytes over the link's measured rate."""

    policy: str
    tenant: str
    starts: int
    median: float
    worst: float
    ideal: float
    nbytes: int


def cold_starts(results: Results) -> list[ColdStarts]:
    """In the scenario's order of policies and tenants; those without any cold start are left out."""
    found = []
    for policy in results.scenario.policies:
        for tenant in results.scenario.tenants:
            runs = [
                run_tenant
                for run in results.runs
                if run.kind == "policy" and run.policy == policy
                for run_tenant in run.tenants
                if run_tenant.name == tenant.name and run_tenant.cold_ns
            ]
            if runs:
                times = np.array([pair for one in runs for pair in one.cold_ns], np.int64)
                took = (times[:, 1] - times[:, 0]) / 1e6
                found.append(
                    ColdStarts(
                        policy,
                        tenant.name,
                        len(took),
                        float(np.median(took)),
                        float(took.max()),
                        runs[0].cold_ideal_ns / 1e6,
                        runs[0].cold_bytes,
                    )
                )
    return found
