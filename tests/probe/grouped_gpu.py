"""A simulated GPU whose slices stand in groups, as an H200's do: writers slow readers of their group, and brush others."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from missile.gpu.interface import Access, ContentionResult, Traffic
from missile.gpu.sim import SimulatedGpu
from missile.gpu.sim.spec import GpuSpec

SAME, PARTNER, BRUSHED = 8.0, 5.0, 1.39  # measured: benchmarks/results/probe-h200/contention-slices.json
BASE = 11
GROUP = 3  # digits of one group; the last one has what is left
MEMORY: dict[str, Any] = {
    "hash": {
        "masks": [0x230AB000],
        "digits": [
            {
                "base": BASE,
                "folds": [
                    0x5A280000,
                    0x93500000,
                    0x2C8F2400,
                    0x71264800,
                    0x0D792800,
                    0x667DA400,
                    0x9B820000,
                    0x48340000,
                ],
                "weights": [1, 2, 3, 6, 9, 4, 7, 5],
            }
        ],
    },
    "latency": {"groups": 12, "half": 30.0},
}


def another_chip() -> dict[str, Any]:
    """The same hash, everything standing elsewhere."""
    other = copy.deepcopy(MEMORY)
    other["latency"]["groups"] = 13
    return other


class GroupedGpu(SimulatedGpu):
    """Contention between single slices as measured on an H200, with noise that a threshold too low takes for a group.

    brush: how much a writer slows readers of a few slices of other groups. spikes: share of the measurements beside a writer
    that other work makes twice as long. late: share of those in which the writer comes too late to be felt. odd_reads: both
    beside a reader, too.
    """

    def __init__(
        self,
        memory: dict[str, Any],
        *,
        seed: int = 0,
        brush: float = BRUSHED,
        spikes: float = 0.0,
        late: float = 0.0,
        odd_reads: bool = False,
    ) -> None:
        spec = GpuSpec.model_validate(
            {
                "name": "grouped",
                "compute_capability": [9, 0],
                "sm": {
                    "count": 48,
                    "clock_mhz": 1000,
                    "operations_per_clock": 256,
                    "tensor_operations_per_clock": 1024,
                },
                "l2": {"mib": 4, "bandwidth_gb_s": 1000},
                "vram": {"gib": 1.0, "bandwidth_gb_s": 500},
                "link": {"h2d_gb_s": 10, "d2h_gb_s": 10},
                "memory": memory,
            }
        )
        super().__init__(spec, seed=seed)
        self.brush, self.spikes, self.late, self.odd_reads = brush, spikes, late, odd_reads
        self.noise = np.random.default_rng(seed)

    def group_of(self, slices: np.ndarray) -> np.ndarray:
        """The group of each slice, by the hash's own digit."""
        return (slices // 2) // GROUP

    def slices_at(self, addresses: np.ndarray) -> np.ndarray:
        physical = self._memory.physical(np.asarray(addresses, np.int64).reshape(-1))
        return self._lab.hash.slice_of(physical)

    def measure_contention(self, victim: Traffic, aggressor: Traffic | None = None, **options: Any) -> ContentionResult:
        repeats = options.get("repeats", 20)
        ratio = 1.0
        if aggressor is not None:
            mine, other = (int(self.slices_at(side.addresses[:1])[0]) for side in (victim, aggressor))
            ratio = self._slowdown(mine, other, aggressor.access)
            draw = self.noise.random() if self.odd_reads or aggressor.access is Access.WRITE else 1.0
            if draw < self.spikes:
                ratio *= 2.0
            elif draw < self.spikes + self.late:
                ratio = 1.0
        times = 2800.0 * ratio * self.noise.lognormal(0.0, 0.03) * self.noise.lognormal(0.0, 0.01, repeats)
        return ContentionResult(times, 1.0, 1.0)

    def _slowdown(self, mine: int, other: int, access: Access) -> float:
        if access is Access.READ:
            return 2.29 if mine == other else 1.01
        if mine == other:
            return SAME
        if (mine // 2) // GROUP == (other // 2) // GROUP:
            return PARTNER
        return self.brush if np.random.default_rng([mine, other]).random() < 0.1 else 1.0
