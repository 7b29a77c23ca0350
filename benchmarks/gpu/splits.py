"""Halves of the colors that tenants get against the chip's own halves: `missile bench isolation`, cut down to these.

    PYTHONPATH=src python3 benchmarks/gpu/splits.py -o OUT --map MAP.json [--device DEVICE] [--quick]

Victims on 32 of 132 SMs that read, read and write, or write 2 MiB to 1 GiB, beside each kind of aggressor on the others. OUT
gets `isolation.json`, whole whenever it stops; about 25 s.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from missile.bench.isolation.plan import MicroPlan, Scheme
from missile.bench.isolation.run import run_micro
from missile.bench.isolation.table import render_markdown
from missile.gpu import open_gpu
from missile.gpu.interface import Access

MIB = 1 << 20
# The order is that of importance: a run that is cut short has these.
PLAN = MicroPlan(
    working_sets=tuple(mib * MIB for mib in (24, 8, 48, 2, 80, 1024)),
    victim_accesses=(Access.READ, Access.READ_WRITE, Access.WRITE),
    repeats=7,
)


def halves(scheme: Scheme) -> bool:
    """None, and every split into halves but for both sides on the same one."""
    return scheme.name == "none" or (scheme.disjoint and len(scheme.victim) == len(scheme.aggressor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("missile-out/splits"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--map", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="two working sets: a look, or a test")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    plan = replace(PLAN, working_sets=PLAN.working_sets[:2], aggressor_bytes=(64 * MIB,)) if options.quick else PLAN
    with open_gpu(options.device) as gpu:
        results = run_micro(gpu, plan, options.out / "isolation.json", known=options.map, wanted=halves)
    sys.stdout.write(render_markdown(results) + "\n")


if __name__ == "__main__":
    main()
