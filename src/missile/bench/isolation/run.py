"""One run of the isolation micro-benchmark: map, pages, cells, and a file that is whole whenever it stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from missile.bench.isolation.lab import ColoredUnits, Sample, measure, pages_for
from missile.bench.isolation.plan import Cell, MicroPlan, Scheme, cells_of, schemes_of
from missile.bench.isolation.record import header_of
from missile.bench.isolation.results import IsolationResults, MeasuredCell, measured_schemes, outcomes
from missile.coloring.pool import ColoredPool
from missile.gpu.interface import Gpu
from missile.probe.channel_map import ChannelMap
from missile.probe.reuse import map_for

__all__ = ["Progress", "run_micro"]

Progress = Callable[[int, int, str], None]

_WRITE_EVERY_S = 2.0


def run_micro(
    gpu: Gpu,
    plan: MicroPlan,
    path: Path,
    *,
    known: ChannelMap | Path | None = None,
    wanted: Callable[[Scheme], bool] = lambda scheme: True,
    seed: int = 0,
    progress: Progress = lambda done, all_, text: None,
) -> IsolationResults:
    """Measure every cell of `plan` on `gpu`, otherwise idle, and keep what there is in `path` all the time.

    Cells that `path` holds already from this chip are not measured again. known: see `map_for`. wanted: which schemes are
    measured. On Ctrl-C the file says `interrupted` and holds what was measured. Raises what `map_for` raises,
    OutOfMemoryError, and MisuseError for a `path` with another GPU's results.
    """
    begin = time.monotonic()
    before = IsolationResults.before(path, gpu)
    # A pool's pages are classified one by one anyway: a probe of few of them is sure enough.
    channel_map = map_for(gpu, known=known, pages=512, seed=seed, progress=lambda text: progress(0, 0, text))
    schemes = tuple(filter(wanted, schemes_of(channel_map)))
    cells = list(cells_of(plan, schemes, gpu.info.sms))
    results = IsolationResults(
        **header_of(gpu),
        channel_map=_describe_map(channel_map),
        schemes=measured_schemes(schemes, channel_map.colors, channel_map.slices),
    )
    # Colors have no names of their own: earlier cells count only where the schemes mean the same slices.
    if before is not None and (
        before.schemes != results.schemes or before.channel_map["colors"] != results.channel_map["colors"]
    ):
        before = None
    kept = {measured.cell: measured for measured in before.cells} if before is not None else {}
    found = {cell: kept[cell] for cell in cells if cell in kept}
    open_ = [cell for cell in cells if cell not in found]
    written = time.monotonic()

    def state(*, interrupted: bool) -> IsolationResults:
        seconds = round(time.monotonic() - begin + (before.seconds if before is not None else 0.0), 1)
        ordered = tuple(found[cell] for cell in cells if cell in found)
        return results.model_copy(update={"cells": ordered, "seconds": seconds, "interrupted": interrupted})

    def write(what: IsolationResults) -> None:
        what.write(path, outcomes(what))

    def done(cell: Cell, sample: Sample) -> None:
        nonlocal written
        found[cell] = MeasuredCell.from_sample(cell, sample)
        progress(len(found), len(cells), cell.scheme)
        if time.monotonic() - written > _WRITE_EVERY_S:
            write(state(interrupted=True))
            written = time.monotonic()

    if open_:
        progress(len(found), len(cells), "taking and classifying pages")
        try:
            with ColoredPool(gpu, pages_for(plan, schemes, channel_map)) as pool:
                measure(gpu, ColoredUnits(gpu, channel_map, pool, seed=seed), schemes, open_, plan.repeats, done)
        except BaseException:
            if found:
                write(state(interrupted=True))
            raise
    whole = state(interrupted=False)
    write(whole)
    return whole


def _describe_map(channel_map: ChannelMap) -> dict[str, object]:
    return {
        "slices": channel_map.slices,
        "granule_bytes": channel_map.granule_bytes,
        "colors": [list(color) for color in channel_map.colors],
        "seconds": channel_map.seconds,
        "witnesses": {w.name: f"{w.verdict}: {w.says}" for w in channel_map.witnesses},
    }
