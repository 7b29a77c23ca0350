"""The simulator's error: scenarios measured on hardware, run again on the simulated GPU, side by side.

    python benchmarks/simulator_error.py benchmarks/results/h200-pairs benchmarks/results/h200-default --device sim:h200

Prints a Markdown table for each folder of results files. Needs no GPU; a few minutes for the results in this repository.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from missile.bench.fidelity import Comparison, compare, rank_by_be, rank_by_p99, simulate, tabulate_error
from missile.bench.results import read_results
from missile.bench.summary import summarize
from missile.errors import MissileError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--device", default="sim:h200")
    parser.add_argument("--duration", type=float, help="seconds of each simulated run (default: as measured)")
    parser.add_argument("--repeats", type=int, help="simulated runs of each policy (default: as measured)")
    options = parser.parse_args()
    try:
        for folder in options.folders:
            found: list[Comparison] = []
            agree, ranked = 0, 0
            for path in sorted(folder.glob("*.json.gz")):
                measured = read_results(path)
                there = summarize(measured)
                simulated = simulate(measured, options.device, duration_s=options.duration, repeats=options.repeats)
                here = summarize(simulated)
                found += compare(there, here)
                both = {run.policy for run in simulated.runs if run.kind == "policy"}  # `mps` is not simulated
                pairs = [(rank_by_be(there), rank_by_be(here))]
                ls = [tenant.name for tenant in measured.tenants if tenant.tenant_class == "LS"]
                pairs += [(rank_by_p99(there, name), rank_by_p99(here, name)) for name in ls]
                agree += sum([policy for policy in first if policy in both] == second for first, second in pairs)
                ranked += len(pairs)
                print(f"{path.name}: done", file=sys.stderr)
            print(f"## {folder.name}, simulated on {options.device}\n")
            print(tabulate_error(found))
            print(f"Policies in the same order (by an LS tenant's p99, or by BE work): {agree} of {ranked} orders.\n")
    except MissileError as error:
        print(f"simulator_error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
