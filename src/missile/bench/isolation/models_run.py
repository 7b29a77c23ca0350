"""One run of the models' isolation benchmark: map, models, cells, and a file that is whole whenever it stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from missile.bench.isolation.models import RealCell, RealPlan, RealSample, measure_real, real_cells
from missile.bench.isolation.models_results import RealResults, RealRun, pair_outcomes
from missile.bench.isolation.plan import halves_of
from missile.bench.isolation.record import header_of
from missile.gpu.interface import Gpu
from missile.probe.channel_map import ChannelMap
from missile.probe.reuse import map_for
from missile.runtime.policies.partition import PartitionPolicy
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import ClosedLoop

__all__ = ["run_real"]

Progress = Callable[[int, int, str], None]


def run_real(
    gpu: Gpu,
    plan: RealPlan,
    path: Path,
    *,
    known: ChannelMap | Path | None = None,
    notes: Sequence[str] = (),
    progress: Progress = lambda done, count, text: None,
) -> RealResults:
    """Run every cell of `plan` on `gpu` and keep what there is in `path` all the time.

    Runs that `path` holds already from this GPU, this split and these colors are not made again. On Ctrl-C and on a fault
    the file says `interrupted`. Raises what `map_for` raises, MissileError when a run faults, and MisuseError for a `path`
    with another GPU's results.
    """
    begin = time.monotonic()
    before = RealResults.before(path, gpu)
    channel_map = map_for(gpu, known=known, pages=512, seed=plan.seed, progress=lambda text: progress(0, 0, text))
    ours, theirs = halves_of(channel_map)
    both = [
        Tenant.model_validate({"name": side, "class": side, "model": side, "arrivals": ClosedLoop(depth=1)})
        for side in ("LS", "BE")
    ]
    ls_sms = PartitionPolicy(plan.ls_share).setup(both, gpu.info).partitions[0]
    results = RealResults(
        **header_of(gpu),
        ls_sms=ls_sms,
        be_sms=gpu.info.sms - ls_sms,
        ls_colors=ours,
        be_colors=theirs,
        colors=channel_map.colors,
        duration_s=plan.duration_s,
        notes=tuple(notes),
        overlap=plan.overlap,
    )
    if before is not None and _setting(before) != _setting(results):
        before = None
    cells = real_cells(plan)
    found: dict[RealCell, RealRun] = {}
    if before is not None:
        found = {run.cell: run for run in before.runs if not run.error}
    open_ = [cell for cell in cells if cell not in found]

    def state(*, interrupted: bool) -> RealResults:
        seconds = time.monotonic() - begin + (before.seconds if before is not None else 0.0)
        ordered = [found[cell] for cell in cells if cell in found]
        # Runs of other models in the same setting stay.
        ordered += [run for cell, run in found.items() if cell not in cells]
        return results.model_copy(
            update={"runs": tuple(ordered), "seconds": round(seconds, 1), "interrupted": interrupted}
        )

    def write(what: RealResults) -> None:
        what.write(path, pair_outcomes(what))

    def done(cell: RealCell, sample: RealSample) -> None:
        found[cell] = RealRun.from_sample(cell, sample)
        progress(sum(cell in found for cell in cells), len(cells), f"{cell.ls} {cell.be}".strip())
        write(state(interrupted=True))

    if open_:
        measure_real(
            gpu, channel_map, plan, open_, done, lambda text: progress(len(cells) - len(open_), len(cells), text)
        )
    whole = state(interrupted=False)
    write(whole)
    return whole


def _setting(results: RealResults) -> tuple[object, ...]:
    """What must be the same for two results to be parts of one."""
    return (results.ls_sms, results.ls_colors, results.colors, results.duration_s, results.overlap)
