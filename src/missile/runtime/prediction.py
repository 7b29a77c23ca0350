"""What a share of the SMs would give LS and BE tenants: a rough model of profiles and queues, for a planner to try first.

Pure. Its purpose is an order in which plans are tried on the GPU, and an answer to "what would break first"; no promise
rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from missile.gpu.work import KernelWork
from missile.runtime.lending import Lending, lending

__all__ = ["Demand", "Machine", "Prediction", "Share", "predict", "service_on", "wait_p99"]

# How much of its SMs a kernel that only waits for memory can lose at no loss of speed, and how far queueing at the memory
# goes (docs/simulator.md has both, with what they were fitted to).
_HEADROOM = 0.6
_QUEUE_LIMIT = 0.8
# What BE loses each time LS requests come and go, beyond their time alone: the way of its blocks off the GPU and back. Over
# five cells on an H200, with segments armed behind LS requests and BE stopped after their launch, 26 us at most beyond
# the time that they took; without both, 72 us in the median (docs/runtime.md).
_TURN_NS = 20_000.0


@dataclass(frozen=True, slots=True)
class Machine:
    """sms: of the whole GPU. unit, least: how its SMs can be split. memory_rate: of VRAM, bytes/s; 0.0 where unknown."""

    sms: int
    unit: int
    least: int
    memory_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What one tenant asks for.

    works: its model's kernels (empty: never profiled). service_ns: of a request alone on the whole GPU. rate_per_s: of
    arrivals; 0.0 for BE, which takes what there is. slo_ns: on a request's latency, for LS. preemptible: its kernels leave
    when told to. colored_ns: as service_ns, with its memory in the colors that it would get; None where that is not known.
    tail_ns: p99 of its requests' latency alone on the arrivals of the trials, for LS, and alone_ns in the run alone that its
    objective may come from; None where that is not known. copy_bytes: of the longer of a request's input and output.
    """

    name: str
    latency_sensitive: bool
    service_ns: float
    rate_per_s: float = 0.0
    slo_ns: float | None = None
    works: tuple[KernelWork, ...] = ()
    preemptible: bool = False
    colored_ns: float | None = None
    tail_ns: float | None = None
    alone_ns: float | None = None
    copy_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """ls_sms: SMs that BE keeps off while an LS request is there; all of them: BE pauses. separated: LS and BE tenants'
    memory is in different colors. preempts: BE work that can be stopped is, when an LS request comes (else it ends).
    lend: above 0, BE runs beside LS requests only while all of them are expected to end within so large a share of their
    objectives, and pauses else."""

    ls_sms: int
    separated: bool = False
    preempts: bool = True
    lend: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """p99_ns, slo_ns: by LS tenant (slo_ns without those that have none). load: share of time in which an LS request is
    there. be_rate: of all BE tenants together, over that alone on the whole GPU. stretch: how many times as long tails are
    by what BE is lent."""

    share: Share
    load: float
    p99_ns: dict[str, float]
    slo_ns: dict[str, float]
    be_rate: float
    stretch: float = 1.0

    @property
    def slack(self) -> float:
        """The tightest objective over the predicted p99: at least 1 where all are met; infinity where there is none."""
        return min((slo / self.p99_ns[name] for name, slo in self.slo_ns.items()), default=math.inf)


def service_on(demand: Demand, machine: Machine, sms: int) -> float:
    """ns that a request of `demand` takes on `sms` of the SMs, alone: kernels go in whole waves, and one that waits for
    memory slows later. A tenant that was never profiled is taken to need all SMs all the time."""
    if sms >= machine.sms:
        return demand.service_ns
    if not demand.works:
        return demand.service_ns * machine.sms / sms
    alone = stretched = 0.0
    for work in demand.works:
        solo = max(work.solo_ns, 1.0)
        room = max(work.blocks_per_sm, 1)
        waves = -(-work.blocks // (room * machine.sms))
        slower = -(-work.blocks // (room * sms)) / waves
        use = min(work.footprint_bytes / solo * 1e9 / machine.memory_rate, 1.0) if machine.memory_rate else 0.0
        alone += solo
        stretched += solo * max(1.0, slower * (1.0 - _HEADROOM * use))
    return demand.service_ns * stretched / alone


def occupancy(demands: Sequence[Demand], machine: Machine) -> float:
    """Share of the SMs that the tenants' kernels hold while they run on the whole GPU, by time, 0..1; 0.0 where none was
    profiled."""
    took = held = 0.0
    for work in (work for demand in demands for work in demand.works):
        took += work.solo_ns
        held += work.solo_ns * min(work.blocks / (max(work.blocks_per_sm, 1) * machine.sms), 1.0)
    return held / took if took else 0.0


def memory_use(demands: Sequence[Demand], machine: Machine) -> float:
    """Share of VRAM's rate that the tenants ask for in turn, alone, 0..1; 0.0 where it is not known."""
    took = sum(work.solo_ns for demand in demands for work in demand.works)
    moved = sum(work.footprint_bytes for demand in demands for work in demand.works)
    return min(moved / took * 1e9 / machine.memory_rate, 1.0) if took and machine.memory_rate else 0.0


def wait_p99(load: float, service_ns: float) -> float:
    """ns that 1% of requests wait longer than, in a queue with Poisson arrivals and even service at `load` in [0, 1).

    The exponential tail of the M/D/1 queue in heavy traffic, P(wait > t) = load * exp(-2 (1 - load) t / service).
    """
    if load >= 1.0:
        return math.inf
    return max(service_ns / (2.0 * (1.0 - load)) * math.log(load / 0.01), 0.0) if load > 0.01 else 0.0


def predict(
    share: Share,
    demands: Sequence[Demand],
    machine: Machine,
    *,
    segment_ns: float = 80_000.0,
    leave_ns: float = 50_000.0,
    turn_ns: float = _TURN_NS,
    rate_factor: float = 1.0,
) -> Prediction:
    """What `share` gives. rate_factor: on all arrival rates.

    segment_ns: of BE; two are on the GPU when an LS request comes, and leave within `leave_ns` where they can be preempted.
    turn_ns: of GPU time that BE loses each time LS requests come and go, beyond what these take.
    """
    alone = {demand.name: demand.service_ns for demand in demands}
    if share.separated:
        demands = [d if d.colored_ns is None else replace(d, service_ns=d.colored_ns) for d in demands]
    ls = [demand for demand in demands if demand.latency_sensitive]
    be = [demand for demand in demands if not demand.latency_sensitive]
    pauses = share.ls_sms >= machine.sms
    growth = 1.0
    if be and not pauses and not share.separated:
        rest = (machine.sms - share.ls_sms) / machine.sms
        use = min(memory_use(be, machine) * min(rest / (1.0 - _HEADROOM), 1.0), _QUEUE_LIMIT)
        growth = 1.0 + use * use / (1.0 - use)
    sms = share.ls_sms if be else machine.sms
    slowed = {demand.name: service_on(demand, machine, sms) * growth for demand in ls}
    services = {d.name: d.service_ns for d in ls} if share.lend else slowed
    # Until BE has left, an LS request goes about half as fast.
    stops = [share.preempts and demand.preemptible for demand in be]
    react = max((min(2 * segment_ns, leave_ns) if stop else 2 * segment_ns) / 2 for stop in stops) if be else 0.0
    rate = max(sum(d.rate_per_s for d in ls), 1e-9)
    load = min(sum(services[d.name] * d.rate_per_s * rate_factor for d in ls) / 1e9, 1.0)
    mean = sum(services[d.name] * d.rate_per_s for d in ls) / rate
    lent = _lent(share, ls, mean, sum(slowed[d.name] * d.rate_per_s for d in ls) / rate, load)
    p99 = {d.name: lent.stretch * (services[d.name] + wait_p99(load, mean or services[d.name]) + react) for d in ls}
    beside, whole = 0.0, 1.0
    if be:
        work = sum(alone[d.name] for d in be)
        whole = work / sum(d.service_ns for d in be)
        if not pauses:
            left = machine.sms - share.ls_sms
            # LS requests run on all SMs, before BE: where they hold them, BE has none.
            beside = work / sum(service_on(d, machine, left) for d in be) / growth * (1.0 - occupancy(ls, machine))
        # How often LS requests come when none is there, and what each time costs BE. What is not stopped goes on at about
        # three quarters of its speed for two segments (94 to 187 us a turn over the same five cells).
        turns = rate / 1e9 * rate_factor * lent.idle
        kept = 0.0 if any(stops) else min(1.5 * segment_ns, mean / 2)
        whole *= max(lent.idle - turns * (turn_ns - kept), 0.0)
    return Prediction(
        share=share,
        load=load,
        p99_ns=p99,
        slo_ns={demand.name: demand.slo_ns for demand in ls if demand.slo_ns is not None},
        be_rate=min(whole + lent.lent * beside, 1.0) if be else 0.0,
        stretch=lent.stretch,
    )


def _lent(share: Share, ls: Sequence[Demand], service_ns: float, slowed_ns: float, load: float) -> Lending:
    """How the LS tenants' queue does, its requests taking `service_ns`, or `slowed_ns` beside BE. Without lending, BE runs
    beside all of them, or, where it pauses, beside none."""
    bounds = [share.lend * d.slo_ns / service_ns for d in ls if d.slo_ns is not None]
    if not share.lend or len(bounds) < len(ls) or not service_ns:
        return Lending(1.0, load, 1.0 - load)
    # Rounded, because a queue that was played is remembered.
    return lending(round(load, 3), round(slowed_ns / service_ns, 2), round(min(bounds), 2))
