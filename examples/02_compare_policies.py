"""The bench from Python: run a scenario, and ask which policy keeps the LS tail shortest.

python examples/02_compare_policies.py
"""

from __future__ import annotations

from pathlib import Path

from missile.bench.run import Bench, run_all
from missile.bench.scenario import read_scenario
from missile.bench.summary import summarize
from missile.bench.testbed import open_testbed

scenario = read_scenario(Path(__file__).with_name("01_scenario.toml")).changed(
    device="sim:h100", duration_s=0.3, repeats=1
)

with open_testbed(scenario) as testbed:
    results, stopped = run_all(Bench(scenario, testbed), lambda index, step: print(f"{index + 1}. {step}"))

for policy in summarize(results).policies:
    (tiny,), (copy,) = policy.ls, policy.be
    print(f"{policy.policy:10} p50 of tiny {tiny.p50:8.2f} ms   copy keeps {copy.share.value:.0%} of its solo rate")
