"""How running kernels slow each other: pure functions from what runs to each one's speed.

Speed 1 is alone on the whole GPU. `demands` are taken at the speed each kernel would have if nobody else asked for
memory, so adding a neighbour can only slow the others (docs/simulator.md has the argument and the limits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from missile.gpu.sim.cost import KernelCost, block_time, missing_share
from missile.gpu.sim.spec import GpuSpec

__all__ = ["Capacities", "crowded_speed", "fair_shares", "placed_speed", "queueing_ns", "speeds"]


@dataclass(frozen=True, slots=True)
class Capacities:
    """What of a spec decides how kernels share, looked up once. Rates in bytes per ns, `l2_bytes` in bytes."""

    sms: int
    vram_rate: float
    l2_rate: float
    l2_bytes: int
    colors: int
    queueing_ns: float
    queueing_limit: float
    crowding: float

    @classmethod
    def of(cls, spec: GpuSpec) -> Capacities:
        sharing = spec.sharing
        return cls(
            sms=spec.sm.count,
            vram_rate=spec.vram_rate,
            l2_rate=spec.l2.bandwidth_gb_s,
            l2_bytes=spec.l2_bytes,
            colors=spec.l2.colors,
            queueing_ns=sharing.queueing_ns,
            queueing_limit=sharing.queueing_limit,
            crowding=sharing.crowding,
        )


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


def queueing_ns(load: float, capacities: Capacities) -> float:
    """What a memory round trip takes longer at `load`, the share of VRAM's bandwidth that others ask for, ns.

    The waiting time of a queue whose service time is short against the trip, a load / (1 - load), held beyond the limit
    where requests in flight run out.
    """
    load = min(load, capacities.queueing_limit)
    return capacities.queueing_ns * load / (1.0 - load)


def placed_speed(cost: KernelCost, held: int, sms: float, capacities: Capacities) -> float:
    """Speed of a kernel that holds room for `held` blocks on `sms` SMs, with no neighbour; 0 without room.

    Blocks go in whole waves, and slow each other on an SM. The part of a kernel that waits for VRAM stays as long.
    """
    if held <= 0:
        return 0.0
    waves = -(-cost.blocks // held)
    slower = block_time(cost.blocks, waves, sms, capacities.crowding) / cost.alone
    speed = min(1.0, 1.0 / (cost.bound + (1.0 - cost.bound) * slower))
    spread = min(cost.blocks, capacities.sms)  # when it is alone
    busy = min(cost.arithmetic * capacities.sms, spread)  # SMs' worth of arithmetic then
    return min(speed, sms / busy) if busy * speed > sms else speed


def crowded_speed(
    cost: KernelCost, placed: float, held: int, sms: float, around: float, capacities: Capacities
) -> float:
    """Speed of a kernel that holds room for `held` blocks on `sms` SMs, `placed` with no neighbour, where `around` blocks of
    others are on each of its SMs on average."""
    waves = -(-cost.blocks // held)
    slower = 1.0 + capacities.crowding * waves * around / block_time(cost.blocks, waves, sms, capacities.crowding)
    bound = cost.bound * placed
    return placed / (bound + (1.0 - bound) * slower)


def speeds(
    costs: Sequence[KernelCost], placed: Sequence[float], room: Sequence[float], capacities: Capacities
) -> list[float]:
    """Speeds of kernels that run at once. placed: each one's `placed_speed`, > 0; room: SMs' worth of room held, > 0."""
    if any(cost.colors for cost in costs):
        return _colored_speeds(costs, placed, room, capacities)
    if len(costs) == 1:
        return [placed[0]]
    # L2 holds part of what each kernel touches; what the neighbours push out comes from VRAM instead.
    kept = 0.0
    for cost in costs:
        kept += cost.working_set
    missing = missing_share(kept, capacities.l2_bytes)
    vram_rate = capacities.vram_rate
    vram = load = l2 = arithmetic = 0.0
    for cost, speed in zip(costs, placed, strict=True):
        vram += cost.vram * speed
        load += cost.load * speed
        l2 += cost.l2 * speed
        arithmetic += cost.arithmetic * speed
    result = []
    for cost, speed in zip(costs, placed, strict=True):
        result.append(
            speed / (1.0 + cost.trips * queueing_ns((load - cost.load * speed) * missing / vram_rate, capacities))
        )
    if vram * missing > vram_rate:
        _limit(result, placed, [c.vram * missing * s for c, s in zip(costs, placed, strict=True)], room, vram_rate)
    if l2 > capacities.l2_rate:
        _limit(result, placed, [c.l2 * s for c, s in zip(costs, placed, strict=True)], room, capacities.l2_rate)
    if arithmetic > 1.0:
        _limit(result, placed, [c.arithmetic * s for c, s in zip(costs, placed, strict=True)], room, 1.0)
    return result


def _colored_speeds(
    costs: Sequence[KernelCost], placed: Sequence[float], room: Sequence[float], capacities: Capacities
) -> list[float]:
    """As `speeds`, with L2 and VRAM in equal parts, one for each color, that don't disturb each other. A kernel goes as fast
    as the slowest part that it needs lets it, and waits for memory as long as its parts do on average."""
    count = capacities.colors
    even = (1.0 / count,) * count
    shares = [cost.colors or even for cost in costs]
    result = list(placed)
    queues = [0.0] * len(costs)
    limits: list[tuple[list[float], float]] = []
    for color in range(count):
        mine = [share[color] for share in shares]
        kept = sum(cost.working_set * part for cost, part in zip(costs, mine, strict=True))
        missing = missing_share(kept, capacities.l2_bytes / count)
        rate = capacities.vram_rate / count
        vram = [c.vram * missing * s * part for c, s, part in zip(costs, placed, mine, strict=True)]
        loads = [c.load * missing * s * part for c, s, part in zip(costs, placed, mine, strict=True)]
        asked = sum(loads)
        for i, part in enumerate(mine):
            queues[i] += part * queueing_ns(max(asked - loads[i], 0.0) / rate, capacities)
        l2 = [c.l2 * s * part for c, s, part in zip(costs, placed, mine, strict=True)]
        limits += [(vram, rate), (l2, capacities.l2_rate / count)]
    for i, cost in enumerate(costs):
        result[i] /= 1.0 + cost.trips * queues[i]
    arithmetic = [c.arithmetic * s for c, s in zip(costs, placed, strict=True)]
    for demands, capacity in (*limits, (arithmetic, 1.0)):
        if sum(demands) > capacity:
            _limit(result, placed, demands, room, capacity)
    return result


def _limit(
    result: list[float], placed: Sequence[float], demands: Sequence[float], weights: Sequence[float], capacity: float
) -> None:
    """Lower `result` to what a fair share of `capacity` allows; `demands` are those at the placed speeds."""
    for i, share in enumerate(fair_shares(demands, weights, capacity)):
        if share < demands[i]:
            result[i] = min(result[i], placed[i] * share / demands[i])
