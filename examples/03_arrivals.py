"""Arrivals: the same seed and tenant give the same requests, whatever else runs.

python examples/03_arrivals.py
"""

from __future__ import annotations

import numpy as np

from missile.workloads.arrivals import PoissonArrivals, TraceArrivals, arrival_times

SECOND = 1_000_000_000

for name, spec in {
    "Poisson": PoissonArrivals(rate_per_s=100),
    "recorded": TraceArrivals(name="azure-llm-2023/code", rate_per_s=100),
}.items():
    times = arrival_times(spec, seed=1, tenant="web", horizon_ns=60 * SECOND)
    gaps = np.diff(times)
    print(f"{name:9} {len(times):5} requests in 60 s; the gaps vary by {gaps.std() / gaps.mean():.1f} times their mean")
    assert (times == arrival_times(spec, seed=1, tenant="web", horizon_ns=60 * SECOND)).all()
