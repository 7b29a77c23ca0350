"""What a simulated GPU answers when its memory is measured: latencies and contention, by physical address.

A model, not a simulation of every access: latency is a table by (SM, slice) plus noise, drift and disturbance, and
contention is a flow model over slices, channels and SMs. Deterministic for a spec and a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError
from missile.gpu.interface import Access, ContentionResult, Traffic
from missile.gpu.sim.hashing import AddressHash
from missile.gpu.sim.memory_spec import MemorySpec

__all__ = ["MemoryLab"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

UNIT_BYTES = 256  # what one address of a `Traffic` stands for
_MEASUREMENT_STEP = 1 << 18  # addresses measured at a time: bounds the memory that noise takes


class MemoryLab:
    """The memory of one simulated GPU under measurement.

    Addresses here are physical. `disturbance` (0..1) is the share of measurements that other work hits; it may be set
    at any time. The chip (who stands where) follows from the spec alone, noise from `seed`.
    """

    def __init__(self, spec: MemorySpec, sms: int, seed: int) -> None:
        self.spec = spec
        self.sms = sms
        self.hash = AddressHash(spec)
        self.disturbance = spec.latency.disturbance
        self._rng = np.random.default_rng(seed)
        self._latency = _latency_table(spec, sms)

    def frames(self) -> Ints:
        """Physical addresses of all pages in the order in which the driver hands them out: short runs, shuffled."""
        count = self.spec.memory_bytes // self.spec.page_bytes
        runs = np.array_split(np.arange(count, dtype=np.int64), max(1, count // 16))
        order = self._rng.permutation(len(runs))
        return np.concatenate([runs[i] for i in order]) * self.spec.page_bytes

    def measure_latency(
        self, physical: Ints, sms: Sequence[int], *, loads: int = 4, repeats: int = 2, concurrent: int | None = None
    ) -> tuple[npt.NDArray[np.float32], int]:
        """As `Gpu.measure_latency`, over physical addresses. Also gives how long it took, ns of simulated time."""
        if loads < 1 or repeats < 1:
            raise MisuseError("A latency measurement needs at least one load and one repeat.")
        unknown = [sm for sm in sms if not 0 <= sm < self.sms]
        if unknown:
            raise MisuseError(f"There is no SM {unknown[0]}; this GPU has SMs 0 to {self.sms - 1}.")
        together = min(concurrent or len(sms), len(sms))
        cycles = np.empty((len(sms), len(physical)), np.float32)
        slices = self.hash.slice_of(np.asarray(physical, np.int64))
        for start in range(0, len(physical), _MEASUREMENT_STEP):
            part = slices[start : start + _MEASUREMENT_STEP]
            for row, sm in enumerate(sms):
                cycles[row, start : start + len(part)] = self._chain(sm, part, loads, repeats)
        cycles += self._drift(len(sms), len(physical), together)
        rounds = -(-len(sms) // together)
        busy = float(cycles.mean()) * (loads * repeats + 1) * len(physical) * rounds if cycles.size else 0.0
        return cycles, int(busy / self.spec.rates.clock_hz * 1e9)

    def measure_contention(
        self,
        victim: Traffic | None,
        aggressor: Traffic | None = None,
        *,
        repeats: int = 20,
        passes: int = 1,
        mode: Literal["bandwidth", "latency"] = "bandwidth",
    ) -> tuple[ContentionResult, int]:
        """As `Gpu.measure_contention`, over physical addresses. Also gives how long it took, ns of simulated time."""
        if victim is None and aggressor is None:
            raise MisuseError("A contention measurement needs a victim, an aggressor or both.")
        clock = self.spec.rates.clock_hz
        flows = [_Flow(self.spec, self.hash, traffic) for traffic in (victim, aggressor) if traffic is not None]
        if sum(flow.sms for flow in flows) > self.sms:
            raise MisuseError(f"Victim and aggressor ask for more than the {self.sms} SMs of this GPU.")
        if victim is None:
            rate = flows[0].solo_rate()
            return ContentionResult(np.empty(0), 0.0, rate * clock), int(1e7)
        mine, other = flows[0], flows[1] if aggressor is not None else None
        rate, other_rate = _share(mine, other)
        nbytes = len(victim.addresses) * UNIT_BYTES * passes
        if mode == "latency":
            pressure = mine.pressure_from(other, other_rate) if other is not None else 0.0
            cycles = self._latency.mean() * (1.0 + pressure) * len(victim.addresses) * passes / max(mine.sms * 32, 1)
        else:
            cycles = nbytes / rate + self._latency.mean()
        jitter = 1.0 + 0.01 * self._rng.standard_normal(repeats) + 3.0 * (self._rng.random(repeats) < self.disturbance)
        times = np.maximum(cycles * jitter, 1.0) / clock * 1e9
        result = ContentionResult(times, nbytes / float(np.median(times)) * 1e9, other_rate * clock)
        return result, int(times.sum())

    def _chain(self, sm: int, slices: Ints, loads: int, repeats: int) -> npt.NDArray[np.float32]:
        """Minimum over `repeats` of a chain's mean latency, shape (n,)."""
        noise = self.spec.latency.noise * (4.0 / loads) ** 0.5
        table = self._latency[sm].astype(np.float32)[slices]
        best = np.full(len(slices), np.inf, np.float32)
        for _ in range(repeats):
            sample = self._rng.standard_normal(len(slices), np.float32) * np.float32(noise)
            if self.disturbance > 0:
                hit = self._rng.random(len(slices), np.float32) < self.disturbance
                sample += np.where(hit, self._rng.exponential(60.0, len(slices)), 0.0).astype(np.float32)
            np.minimum(best, table + sample, out=best)
        return best

    def _drift(self, sms: int, samples: int, together: int) -> npt.NDArray[np.float32]:
        """Slow drift along the order of measurement: a few low harmonics, stronger the more SMs measure at once."""
        amplitude = self.spec.latency.drift * (together - 1) / max(self.sms - 1, 1)
        position = np.linspace(0.0, 1.0, samples, endpoint=False, dtype=np.float32)
        drift = np.zeros((sms, samples), np.float32)
        for harmonic in (1, 2, 5):
            phase = self._rng.random((sms, 1), np.float32)
            drift += np.float32(amplitude / harmonic) * np.sin(2 * np.pi * (harmonic * position + phase))
        return drift


class _Flow:
    """One side's traffic: how its bytes spread over slices and channels, and what they cost there."""

    def __init__(self, spec: MemorySpec, hash_: AddressHash, traffic: Traffic) -> None:
        rates = spec.rates
        self.sms = traffic.sms if isinstance(traffic.sms, int) else len(traffic.sms)
        if self.sms < 1 or not len(traffic.addresses):
            raise MisuseError("Traffic needs at least one SM and one address.")
        slices = hash_.slice_of(np.asarray(traffic.addresses, np.int64))
        count = np.bincount(slices, minlength=spec.slices).astype(np.float64)
        share = count / count.sum()
        reads, writes = {Access.READ: (1.0, 0.0), Access.WRITE: (0.0, 1.0), Access.READ_WRITE: (0.5, 0.5)}[
            traffic.access
        ]
        slice_cost = reads / rates.slice_read + writes / rates.slice_write
        held = spec.l2_bytes / spec.slices
        missing = np.clip(1.0 - held / np.maximum(count * UNIT_BYTES, 1.0), 0.0, 1.0)
        channel = np.bincount(hash_.channel_of(np.arange(spec.slices)), share * missing, minlength=spec.channels)
        # Cycles each resource is busy per byte of this flow: every slice, then every channel.
        self.cost = np.concatenate([share * slice_cost, channel * (1.0 + writes) / rates.channel])
        self.sm_rate = self.sms * rates.sm

    def solo_rate(self) -> float:
        """Bytes per cycle alone."""
        return float(min(self.sm_rate, 1.0 / self.cost.max()))

    def pressure_from(self, other: _Flow, rate: float) -> float:
        """How much longer one load takes: queues grow with how busy the other keeps the resources that this one uses."""
        busy = np.minimum(other.cost * rate, 0.9)
        used = self.cost / self.cost.sum()
        return float((used * busy / (1.0 - busy)).sum())


def _share(victim: _Flow, aggressor: _Flow | None) -> tuple[float, float]:
    """Bytes per cycle of both: a resource that both want is shared by SMs."""
    if aggressor is None:
        return victim.solo_rate(), 0.0
    alone = victim.solo_rate(), aggressor.solo_rate()
    rates = list(alone)
    for index, (mine, other) in enumerate(((victim, aggressor), (aggressor, victim))):
        fair = mine.sms / (mine.sms + other.sms)
        left = np.maximum(1.0 - other.cost * alone[1 - index], fair)
        with np.errstate(divide="ignore"):
            limit = np.where(mine.cost > 0, left / mine.cost, np.inf)
        rates[index] = float(min(alone[index], limit.min()))
    return rates[0], rates[1]


def _latency_table(spec: MemorySpec, sms: int) -> Floats:
    """Cycles by (SM, slice), shape (sms, slices). Who stands where is drawn from the spec, not from the run's seed."""
    latency = spec.latency
    slices = spec.slices
    rng = np.random.default_rng([slices, sms, latency.groups])
    group = np.arange(sms) % latency.groups
    way = rng.normal(0.0, latency.spread, (latency.groups, slices))
    sm_half = (np.arange(latency.groups) % 2)[group]
    slice_half = rng.permutation(np.arange(slices) % 2)
    across = latency.half * (sm_half[:, None] != slice_half[None, :])
    detail = rng.normal(0.0, latency.spread / 8, (sms, slices))
    table = np.maximum(latency.base + way[group] + across + detail, 1.0)
    alike = np.arange(slices) // latency.coincide * latency.coincide
    return np.asarray(table[:, alike], np.float64)
