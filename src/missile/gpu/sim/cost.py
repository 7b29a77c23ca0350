"""What one kernel costs on one spec'd GPU, alone: its duration there, and the rates at which it asks for shared things.

Pure. Everything about contention is in `sharing`, everything about placement in `compute`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from missile.errors import MisuseError
from missile.gpu.sim.spec import GpuSpec, builtin_specs
from missile.gpu.work import KernelWork

__all__ = [
    "UNITS_PER_SM",
    "KernelCost",
    "block_time",
    "color_shares",
    "kernel_cost",
    "missing_share",
    "part_of",
    "working_set",
]

UNITS_PER_SM = 5040  # an SM's room, divisible by every small occupancy; a block takes UNITS_PER_SM // blocks_per_sm
MINIMUM_NS = 1000.0  # nothing that was launched takes less
LEAST_WORK = 0.3  # share of a recorded duration that is work, whatever the gap
SATURATION = 0.97  # a kernel alone can ask for this share of a bandwidth at most, so that alone it never queues


@dataclass(frozen=True, slots=True)
class KernelCost:
    """Costs at full speed, that is alone on the whole GPU.

    solo_ns: duration. blocks, units: how many blocks, and the room each takes. waves: how many rounds of blocks.
    vram, l2: bytes per ns asked of VRAM (if nothing were in L2), of L2. load: `vram` as its queues feel it.
    arithmetic: share of the GPU's arithmetic. trips: memory round trips that it waits for one after another, per ns.
    bound: share of the duration that more SMs would not shorten. alone: time on all SMs in `block_time`'s unit.
    working_set: bytes that the kernel and those that run with it in turn keep coming back to. missing: share of its
    footprint that L2 does not hold when alone. brings: bytes that it brings into L2.
    colors: share of its memory in each color, () for evenly in all.
    """

    solo_ns: float
    blocks: int
    units: int
    waves: int
    vram: float
    load: float
    l2: float
    arithmetic: float
    trips: float
    bound: float
    alone: float
    working_set: float
    missing: float
    brings: float
    colors: tuple[float, ...] = ()


def part_of(cost: KernelCost, share: float) -> KernelCost:
    """The cost of a launch of which only this share of the blocks runs."""
    blocks = max(math.ceil(cost.blocks * share), 1)
    waves = max(math.ceil(cost.waves * blocks / cost.blocks), 1)
    return replace(cost, solo_ns=max(cost.solo_ns * share, MINIMUM_NS), blocks=blocks, waves=waves)


def working_set(works: Sequence[KernelWork]) -> float:
    """Bytes that a sequence run over and over comes back to. What it writes it reads once more, and then writes something
    else there: both uses are taken off the sum of the footprints, which leaves weights and what is read time and again.
    """
    kept = sum(work.footprint_bytes - 2 * work.write_bytes for work in works)
    return float(max(kept, max((work.footprint_bytes for work in works), default=0)))


def missing_share(kept: float, l2_bytes: float) -> float:
    """Share of accesses that L2 misses when `kept` bytes are come back to in turn: none while they fit with room to
    spare, all from one and a half times its size on (a cyclic pass over more than a cache holds evicts what comes next).
    """
    return min(max((kept / l2_bytes - 0.8) / 0.7, 0.0), 1.0)


def kernel_cost(work: KernelWork, spec: GpuSpec, keeps: float = 0.0) -> KernelCost:
    """The cost of `work` on `spec`. keeps: the working set of the sequence it belongs to, bytes."""
    blocks = max(work.blocks, 1)
    per_sm = max(min(work.blocks_per_sm, spec.sm.max_blocks), 1)
    waves = -(-blocks // (per_sm * spec.sm.count))
    solo = _solo_ns(work, spec)
    traffic = work.read_bytes + work.write_bytes
    read_share = work.read_bytes / traffic if traffic else 1.0
    keeps = max(keeps, float(work.footprint_bytes))
    colors = color_shares(work.bytes_by_color, spec.l2.colors)
    part = spec.l2_bytes / spec.l2.colors
    if colors:
        missing = sum(share * missing_share(keeps * share, part) for share in colors if share)
    else:
        missing = missing_share(keeps, spec.l2_bytes)
    vram = min(work.footprint_bytes / solo, SATURATION * spec.vram_rate)
    arithmetic = min(work.operations / solo / spec.operation_rate(work.tensor_ops), SATURATION)
    return KernelCost(
        solo_ns=solo,
        blocks=blocks,
        units=UNITS_PER_SM // per_sm,
        waves=waves,
        vram=vram,
        load=vram * (1.0 + spec.sharing.write_load * (1.0 - read_share)),
        l2=min(traffic / solo, SATURATION * spec.l2.bandwidth_gb_s),
        arithmetic=arithmetic,
        trips=_trips(work, spec, waves) / solo,
        bound=spec.sharing.headroom * min(vram / spec.vram_rate, 1.0) ** 2,
        alone=block_time(blocks, waves, min(blocks, spec.sm.count), spec.sharing.crowding),
        working_set=keeps,
        missing=missing,
        brings=float(max(work.footprint_bytes - work.write_bytes, 0)),
        colors=colors,
    )


def color_shares(by_color: Mapping[int, float], colors: int) -> tuple[float, ...]:
    """Share of memory in each of `colors` colors, () where they are alike or nothing is said. MisuseError for another."""
    if not by_color:
        return ()
    total = sum(by_color.values())
    if min(by_color) < 0 or max(by_color) >= colors or total <= 0:
        raise MisuseError(f"A launch is in colors {sorted(by_color)}; the simulated GPU has 0 to {colors - 1}.")
    shares = tuple(by_color.get(color, 0.0) / total for color in range(colors))
    return () if max(shares) - min(shares) < 1e-9 else shares


def block_time(blocks: int, waves: int, sms: float, crowding: float) -> float:
    """Time that `blocks` blocks take on `sms` SMs in `waves` waves, over what one alone on its SM would take in a wave that
    costs nothing but latency: a wave each, and `crowding` for each block on the SM that has most of them."""
    return waves + crowding * math.ceil(blocks / sms - 1e-9)


def _trips(work: KernelWork, spec: GpuSpec, waves: int) -> float:
    """Memory round trips that pass one after another: one for the launch, and each thread's loads, by rounds and waves."""
    per_round = max(work.blocks, 1) * max(work.threads, 1) * 16 * spec.sharing.loads_in_flight
    return 1.0 + work.read_bytes / per_round * waves


def _roofline(work: KernelWork, spec: GpuSpec, in_l2: bool = False) -> float:
    """Lower bound on the duration, ns: the largest of the VRAM (unless all is in L2), L2 and arithmetic times."""
    return max(
        0.0 if in_l2 else work.footprint_bytes / spec.vram_rate,
        (work.read_bytes + work.write_bytes) / spec.l2.bandwidth_gb_s,
        work.operations / spec.operation_rate(work.tensor_ops),
    )


def _latency_bound(work: KernelWork, spec: GpuSpec) -> float:
    """Time that only latency takes, ns: each wave of blocks waits for memory and clock alike."""
    waves = -(-max(work.blocks, 1) // (max(work.blocks_per_sm, 1) * spec.sm.count))
    return waves / spec.sm.clock_mhz


def _solo_ns(work: KernelWork, spec: GpuSpec) -> float:
    """Duration alone on `spec`: as measured there; else scaled from where it was measured; else the roofline.

    Scaling: the part that the roofline of the recorded GPU explains scales with the rooflines, the rest with waves and
    clock. A recording whose GPU has no spec is taken for this one's.
    """
    if work.solo_ns <= 0.0:
        bound = _roofline(work, spec)
        per_thread = work.operations / max(work.blocks * work.threads, 1) / max(spec.sm.clock_mhz, 1.0) * 1000
        return max(bound + spec.sharing.memory_latency_ns, per_thread, MINIMUM_NS)
    measured = _without_gap(work, spec)
    recorded = _recorded_spec(work.recorded_on)
    if recorded is None or recorded.name == spec.name:
        return measured
    # Faster than VRAM would have allowed: it found its data in L2, and does so here if they fit.
    in_l2 = recorded.vram_rate * measured < work.footprint_bytes <= recorded.l2_bytes
    recorded_bound = _roofline(work, recorded, in_l2)
    bound = _roofline(work, spec, in_l2 and work.footprint_bytes <= spec.l2_bytes)
    explained = min(recorded_bound, measured)
    by_roofline = bound / recorded_bound if recorded_bound else 1.0
    by_latency = _latency_bound(work, spec) / _latency_bound(work, recorded)
    return explained * by_roofline + (measured - explained) * by_latency


def _without_gap(work: KernelWork, spec: GpuSpec) -> float:
    """The measured duration less the launch gap, which the simulator adds itself: recordings are made inside graphs."""
    if not work.recorded_on:
        return work.solo_ns
    return max(work.solo_ns - spec.sharing.graph_gap_ns, LEAST_WORK * work.solo_ns)


def _recorded_spec(name: str) -> GpuSpec | None:
    return next((spec for spec in builtin_specs().values() if spec.name == name), None) if name else None
