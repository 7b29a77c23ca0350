"""LS models next to BE models on a GPU, pair by pair under every policy, within a budget of time. Resumable.

    PYTHONPATH=src python3 benchmarks/gpu_bench.py -o benchmarks/results/h200-pairs --budget 300

Writes one results file per pair (raw samples), `pairs.md` (the table) and `scenario.toml`. Run it again with the same
options and it makes what is missing. Models that the package cache doesn't have are compiled first, several at a time;
that is not counted against the budget, and a model that doesn't compile within its limit is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from missile.bench.matrix import Matrix, tabulate
from missile.bench.scenario import Scenario, format_scenario
from missile.bench.testbed import open_testbed
from missile.compiler.library import package_directory
from missile.compiler.synthetic import is_synthetic
from missile.errors import MissileError
from missile.gpu import open_gpu
from missile.workloads.models import default_batch

LS = "resnet34,efficientnet_b0,mobilenet_v3_large,mobilebert"
BE = "densenet161,resnet152,bert_large,decoder_1b"


def scenario(options: argparse.Namespace) -> Scenario:
    """Every tenant of the matrix in one scenario: LS under Poisson arrivals, BE in a closed loop."""
    ls = [
        {
            "name": model,
            "class": "LS",
            "model": model,
            "slo_factor": 1.5,
            "arrivals": {"kind": "poisson", "rate_per_s": options.rate},
        }
        for model in options.ls.split(",")
    ]
    be = [
        {"name": model, "class": "BE", "model": model, "arrivals": {"kind": "closed", "depth": 2}}
        for model in options.be.split(",")
    ]
    return Scenario.model_validate(
        {
            "name": "pairs",
            "description": "Every LS model next to every BE model.",
            "device": options.device,
            "seed": options.seed,
            "duration_s": options.duration,
            "warmup_s": options.duration / 10,
            "repeats": options.repeats,
            "policies": options.policies.split(","),
            "tenant": ls + be,
        }
    )


def compile_missing(models: Sequence[str], device: str, *, limit_s: float, say: Callable[[str], None]) -> list[str]:
    """Compile what the cache lacks, all at once, each in a process of its own; returns the models that can be run."""
    with open_gpu(device) as gpu:
        info = gpu.info
    if info.simulated:
        return list(models)
    running: dict[str, subprocess.Popen[str]] = {}
    for model in models:
        if is_synthetic(model):
            continue
        directory = package_directory(model, default_batch(model), info.name)
        if not (directory / "package.json").is_file():
            command = [sys.executable, "-m", "missile", "compile", model, "--device", device, "-o", str(directory)]
            running[model] = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ
            )
    failed: set[str] = set()
    end = time.monotonic() + limit_s
    for model, process in running.items():
        try:
            _, errors = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            reason = errors.strip().splitlines()[-1] if process.returncode and errors.strip() else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            reason = f"not done within {limit_s:g} s"
        if process.returncode:
            failed.add(model)
            say(f"{model} is left out, it did not compile: {reason}")
        else:
            say(f"{model} is compiled")
    return [model for model in models if model not in failed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("missile-out/gpu-bench"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--ls", default=LS, help="LS models, with commas")
    parser.add_argument("--be", default=BE, help="BE models, with commas")
    parser.add_argument("--policies", default="temporal,streams,priority,partition")
    parser.add_argument("--rate", type=float, default=300.0, help="requests/s of each LS tenant")
    parser.add_argument("--duration", type=float, default=0.9, help="seconds of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile-limit", type=float, default=900.0, help="seconds that compiling may take in all")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of measuring before it stops")
    options = parser.parse_args()

    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    try:
        models = [*options.ls.split(","), *options.be.split(",")]
        able = compile_missing(models, options.device, limit_s=options.compile_limit, say=say)
        whole = scenario(options)
        chosen = whole.model_copy(update={"tenants": tuple(tenant for tenant in whole.tenants if tenant.model in able)})
        with open_testbed(chosen, lambda tenant: say(f"loading {tenant}")) as testbed:
            for loaded in testbed.roster.tenants:
                if loaded.error:
                    say(f"{loaded.tenant.name} is left out: {loaded.error}")
            left_out = {loaded.tenant.name for loaded in testbed.roster.tenants if loaded.error}
            chosen = chosen.model_copy(update={"tenants": tuple(t for t in chosen.tenants if t.name not in left_out)})
            say(f"loaded; measuring on {testbed.info.name} for at most {options.budget:g} s")
            deadline = time.monotonic() + options.budget
            matrix = Matrix(chosen, testbed, options.out)
            results = matrix.run(out_of_time=lambda: time.monotonic() > deadline, say=say)
    except MissileError as error:
        print(f"gpu_bench: {error}", file=sys.stderr)
        return error.exit_code
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scenario.toml").write_text(format_scenario(chosen))
    table = tabulate(results)
    (options.out / "pairs.md").write_text(table)
    print(table)
    say(f"{len(results)} of {len(matrix.pairs)} pairs are in {options.out}")
    return 0 if len(results) == len(matrix.pairs) else 3


if __name__ == "__main__":
    sys.exit(main())
