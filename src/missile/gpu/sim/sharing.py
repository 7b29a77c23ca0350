"""How running kernels slow each other: pure functions from what runs to each one's speed.

Speed 1 is alone on the whole GPU. `demands` are taken at the speed each kernel would have if nobody else asked for
memory, so adding a neighbour can only slow the others (docs/simulator.md has the argument and the limits).
"""

from __future__ import annotations

from collections.abc import Sequence

from missile.gpu.sim.cost import KernelCost, missing_share
from missile.gpu.sim.spec import GpuSpec

__all__ = ["fair_shares", "latency_growth", "placed_speed", "speeds"]


def fair_shares(demands: Sequence[float], weights: Sequence[float], capacity: float) -> list[float]:
    """Weighted max-min fair shares of `capacity`: nobody gets more than its demand, nothing is left while somebody wants.

    All in one unit. weights > 0.
    """
    shares = list(demands)
    total = sum(shares)
    if total <= capacity:
        return shares
    open_ = sorted(range(len(shares)), key=lambda i: demands[i] / weights[i])
    weight_left = sum(weights)
    for i in open_:
        share = min(demands[i], capacity * weights[i] / weight_left)
        shares[i] = share
        capacity = max(capacity - share, 0.0)
        weight_left -= weights[i]
    return shares


def latency_growth(load: float, spec: GpuSpec) -> float:
    """Memory latency at `load` (share of VRAM's bandwidth that reads ask for) over that of an idle memory, at least 1.

    The queueing curve 1 + a load^2 / (1 - load), held beyond the limit where requests in flight run out.
    """
    sharing = spec.sharing
    load = min(load, sharing.queueing_limit)
    return 1.0 + sharing.queueing * load * load / (1.0 - load)


def placed_speed(cost: KernelCost, held: int, sms: int, all_sms: int) -> float:
    """Speed of a kernel that holds room for `held` blocks on `sms` of `all_sms` SMs, with no neighbour; 0 without room.

    Blocks go in whole waves. A bandwidth-bound kernel keeps its speed until it has lost its headroom of SMs.
    """
    if held <= 0:
        return 0.0
    waves = -(-cost.blocks // held)
    speed = min(1.0, cost.waves / (waves * cost.stretch))
    if cost.arithmetic * speed * all_sms > sms:
        speed = sms / (cost.arithmetic * all_sms)
    return speed


def speeds(costs: Sequence[KernelCost], placed: Sequence[float], room: Sequence[float], spec: GpuSpec) -> list[float]:
    """Speeds of kernels that run at once. placed: each one's `placed_speed`, > 0; room: SMs' worth of room held, > 0."""
    if len(costs) == 1:
        return [placed[0]]
    # L2 holds part of what each kernel touches; what the neighbours push out comes from VRAM instead.
    kept = 0.0
    for cost in costs:
        kept += cost.working_set
    missing = missing_share(kept, spec.l2_bytes)
    vram_rate, miss_penalty = spec.vram_rate, spec.sharing.miss_penalty
    vram, reads = [], []
    l2 = arithmetic = 0.0
    for cost, speed in zip(costs, placed, strict=True):
        share = missing * speed
        vram.append(cost.vram * share)
        reads.append(cost.reads * share)
        l2 += cost.l2 * speed
        arithmetic += cost.arithmetic * speed
    all_reads = sum(reads)
    result = []
    for cost, speed, read in zip(costs, placed, reads, strict=True):
        if cost.sensitivity:
            growth = latency_growth((all_reads - read) / vram_rate, spec)
            growth *= 1.0 + miss_penalty * (missing - cost.missing)
            speed /= 1.0 + cost.sensitivity * (growth - 1.0)
        result.append(speed)
    if sum(vram) > vram_rate:
        _limit(result, placed, vram, room, vram_rate)
    if l2 > spec.l2.bandwidth_gb_s:
        _limit(result, placed, [c.l2 * s for c, s in zip(costs, placed, strict=True)], room, spec.l2.bandwidth_gb_s)
    if arithmetic > 1.0:
        _limit(result, placed, [c.arithmetic * s for c, s in zip(costs, placed, strict=True)], room, 1.0)
    return result


def _limit(
    result: list[float], placed: Sequence[float], demands: Sequence[float], weights: Sequence[float], capacity: float
) -> None:
    """Lower `result` to what a fair share of `capacity` allows; `demands` are those at the placed speeds."""
    for i, share in enumerate(fair_shares(demands, weights, capacity)):
        if share < demands[i]:
            result[i] = min(result[i], placed[i] * share / demands[i])
