"""The isolation micro-benchmark on a GPU: pages, classified and dealt to two sides, and the cells measured on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.bench.isolation.plan import Cell, MicroPlan, Scheme
from missile.coloring.pool import ColoredPool
from missile.errors import NoisyGpuError
from missile.gpu.interface import Access, Gpu, Traffic
from missile.probe.channel_map import ChannelMap

__all__ = ["ColoredUnits", "Sample", "measure", "pages_for"]

Ints = npt.NDArray[np.int64]

UNIT_BYTES = 256  # what one address of a `Traffic` stands for
_SLACK = 1.04  # pages differ a little in how much they have of a color
_LEAST_TIMED_BYTES = 32 << 20  # that one timed round passes over: short sets are passed over several times
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """One cell's raw measurement. victim_ns: one timed round each, of `passes` passes. Rates in bytes/s, 0.0 where the
    side was not there."""

    victim_ns: tuple[float, ...]
    passes: int
    victim_bytes_per_s: float
    aggressor_bytes_per_s: float


class ColoredUnits:
    """Addresses of 256-byte units by color, on pages dealt to a victim (from the front) and an aggressor (from the back).

    As few pages as hold a working set are used, as a tenant's pool does. `pool` has to outlive this.
    """

    def __init__(self, gpu: Gpu, channel_map: ChannelMap, pool: ColoredPool, *, seed: int = 0) -> None:
        constants = channel_map.classify(gpu, pool.addresses, seed=seed)
        known = constants[:, 2] >= 0
        if known.mean() < 0.99:
            raise NoisyGpuError(
                f"{int((~known).sum())} of {len(known)} pages could not be classified; measure while nothing else runs."
            )
        self._map = channel_map
        self._pages: Ints = pool.addresses[known]
        self._constants: Ints = constants[known]
        layout = channel_map.layout
        steps = np.arange(0, max(layout.piece_bytes, UNIT_BYTES), UNIT_BYTES)
        inner = (layout.pieces()[:, None] + steps[None, :]).reshape(-1)
        self._offsets = layout.offsets()
        self._units = np.sort(inner)
        self._color = channel_map.color_of_slice

    def units(self, colors: Sequence[int], nbytes: int, *, victim: bool) -> Ints:
        """`nbytes` (rounded up to units) of memory of `colors`, ascending addresses, from the side's first pages."""
        wanted = -(-nbytes // UNIT_BYTES)
        order = np.arange(len(self._pages)) if victim else np.arange(len(self._pages))[::-1]
        mine = np.isin(self._color, list(colors))
        found: list[Ints] = []
        have = 0
        for start in range(0, len(order), _CHUNK):
            pages = order[start : start + _CHUNK]
            inside = mine[self._map.page_slices(self._constants[pages])]
            rows, granules = np.nonzero(inside)
            starts = self._pages[pages][rows] + self._offsets[granules]
            units = (starts[:, None] + self._units).reshape(-1)[: wanted - have]
            found.append(units)
            have += len(units)
            if have == wanted:
                return np.sort(np.concatenate(found))
        raise NoisyGpuError(f"The pages hold {have * UNIT_BYTES} bytes of the colors asked for, not {nbytes}.")


def pages_for(plan: MicroPlan, schemes: Sequence[Scheme], channel_map: ChannelMap) -> int:
    """Pages that both sides of the largest cell need together."""

    def pages(colors: Sequence[int], nbytes: int) -> int:
        share = sum(len(channel_map.colors[color]) for color in colors) / channel_map.slices
        return int(nbytes * _SLACK / share / channel_map.page_bytes) + 2

    largest = max((*plan.working_sets, *plan.few_sets))
    ours = max(pages(scheme.victim, largest) for scheme in schemes)
    return ours + max(pages(scheme.aggressor, max(plan.aggressor_bytes)) for scheme in schemes)


def measure(
    gpu: Gpu,
    units: ColoredUnits,
    schemes: Sequence[Scheme],
    cells: Sequence[Cell],
    repeats: int,
    done: Callable[[Cell, Sample], None],
) -> None:
    """Measure `cells` in order, `repeats` timed rounds each; `done(cell, sample)` after each. The GPU is otherwise idle."""
    by_name: Mapping[str, Scheme] = {scheme.name: scheme for scheme in schemes}
    kept: dict[tuple[tuple[int, ...], int, bool], Ints] = {}

    def side(colors: tuple[int, ...], nbytes: int, sms: int, access: Access | None, victim: bool) -> Traffic | None:
        if access is None:
            return None
        key = (colors, nbytes, victim)
        if key not in kept:
            if victim:  # a cell's neighbours share their sets; those of another size are not needed again soon
                for old in [old for old in kept if old[2] and old[1] != nbytes]:
                    del kept[old]
            kept[key] = units.units(colors, nbytes, victim=victim)
        return Traffic(kept[key], sms, access)

    for cell in cells:
        scheme = by_name[cell.scheme]
        victim = side(scheme.victim, cell.victim_bytes, cell.victim_sms, cell.victim_access, True)
        aggressor = side(scheme.aggressor, cell.aggressor_bytes, cell.aggressor_sms, cell.aggressor_access, False)
        passes = max(1, _LEAST_TIMED_BYTES // cell.victim_bytes) if victim else 1
        result = gpu.measure_contention(victim, aggressor, repeats=repeats, passes=passes)
        done(
            cell,
            Sample(
                tuple(float(ns) for ns in result.victim_ns),
                passes,
                result.victim_bytes_per_s,
                result.aggressor_bytes_per_s,
            ),
        )
