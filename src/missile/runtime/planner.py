"""The planner: which SMs BE keeps off beside LS requests, from profiles, objectives and rates; tried before it is believed.

Pure: candidates come from `prediction`, and what is measured comes in through a callback. Why a plan was chosen, what would
break first and, where none holds, what would, is data (`Plan`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from missile.errors import MisuseError
from missile.runtime.prediction import Demand, Machine, Prediction, Share, predict, service_on

__all__ = [
    "ATTAINMENT",
    "MARGIN",
    "TAIL",
    "Candidate",
    "Measured",
    "Plan",
    "Trial",
    "candidates",
    "fitting_sms",
    "make_plan",
    "rates_changed",
]

ATTAINMENT = 0.99
"""Share of each LS tenant's requests that have to meet its objective for a plan to be accepted."""

MARGIN = 0.85
"""What share of its objective a tenant's p99 may take up in a trial, which is too short to show the one in a hundred."""

TAIL = 1.10
"""How many times its p99 alone an LS tenant's p99 may be beside BE, before BE's work counts."""

_BELIEF = 1.0 / 3.0  # of a tail that was predicted longer than a trial saw it
_TAIL_NOISE = 0.05  # p99s of two trials on the same arrivals that differ by less are alike
_LENDS = (0.15, 0.3, 0.45)  # of objectives of 1.5 times the p99 alone, up to two thirds of that p99
_STRETCH = 1.2  # predicted tails that are longer, over that of a BE that pauses, are tried last
_FITTING = 1.05  # LS requests that take no longer than so many times their time alone have the SMs that they need
_TRIED = 6
_MOST_FACTOR = 64.0
_RATE_CHANGE = 1.3
_ALIKE = 0.02


@dataclass(frozen=True, slots=True)
class Measured:
    """What a short run under a candidate gave: share of requests within the objective by LS tenant (those that have one),
    p99 by LS tenant (ns), the BE tenants' rates over those alone, summed, and by LS tenant p99 over that alone on the same
    arrivals (those of which it is known)."""

    attainment: Mapping[str, float]
    p99_ns: Mapping[str, float]
    be_rate: float
    tails: Mapping[str, float] = field(default_factory=dict)

    @property
    def tail(self) -> float:
        """The largest p99 over that alone; 0.0 where none is known."""
        return max(self.tails.values(), default=0.0)

    @property
    def accepted(self) -> bool:
        """Whether every objective was met."""
        return all(share >= ATTAINMENT for share in self.attainment.values())

    def strain(self, slo_ns: Mapping[str, float], demands: Sequence[Demand] = ()) -> float:
        """The largest share of an objective (ns, by tenant) that a p99 takes up. demands: p99s alone on these and on other
        arrivals, where they are known; at high loads the trial's can be much longer than those that the objective is for."""
        usual = {d.name: d.alone_ns / d.tail_ns for d in demands if d.alone_ns and d.tail_ns}
        return max(
            (self.p99_ns.get(name, math.inf) * usual.get(name, 1.0) / slo for name, slo in slo_ns.items()), default=0.0
        )


Trial = Callable[[str], Measured]
"""Runs the tenants for a short while under a policy, given as text for `create_policy`."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A share, the policy that carries it out as text for `create_policy`, and what is known of it."""

    policy: str
    predicted: Prediction
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """accepted: every objective is expected to hold (by what was measured where there was a trial).

    considered: all candidates, best first by prediction. breaks_first: the LS tenant with the least room, "" where none has
    an objective; breaks_at: on how many times the present rates its objective breaks, by prediction. remedies: what would
    make a plan hold, where none does. tail: as `make_plan` was told. copy_weights: by tenant, on the link to the host; empty
    where copies are not scheduled, and everybody keeps its own.
    """

    accepted: bool
    chosen: Candidate
    considered: tuple[Candidate, ...]
    machine: Machine
    demands: tuple[Demand, ...]
    breaks_first: str
    breaks_at: float
    remedies: tuple[str, ...]
    tail: float | None = None
    copy_weights: Mapping[str, float] = field(default_factory=dict)


def candidates(
    machine: Machine,
    be_min: float = 0.0,
    *,
    colors: bool = False,
    preempts: bool = False,
    lends: bool = False,
    fitting: int | None = None,
) -> tuple[Share, ...]:
    """BE pausing, and splits of about three quarters, a half and a quarter of the SMs for LS, or of `fitting` SMs.

    be_min: the least rate that BE was promised: with it, BE has to run beside LS requests. colors: the splits also with
    tenants' memory in different colors; BE that pauses does not meet LS requests in memory. preempts: some BE work can be
    stopped; then BE may also pause when what it has on the GPU has ended by itself. lends: all LS tenants have objectives;
    then BE may also pause except where these leave room, and have a half or three quarters of the SMs there.
    """

    def splits(*wanted: float) -> list[int]:
        counts = dict.fromkeys(round(count / machine.unit) * machine.unit for count in wanted)
        most = min(machine.sms - machine.least, (1.0 - be_min) * machine.sms)
        return [count for count in counts if machine.least <= count <= most]

    counts = splits(0.75 * machine.sms, 0.5 * machine.sms, 0.25 * machine.sms, fitting or 0)
    whole: tuple[Share, ...] = () if be_min else (Share(machine.sms),)
    if whole and preempts:
        whole += (Share(machine.sms, preempts=False),)
    lent = splits(0.5 * machine.sms, 0.25 * machine.sms) if whole and lends else []
    lending = [Share(count, lend=lend) for count in lent for lend in _LENDS]
    plain = (*whole, *lending, *(Share(count) for count in counts))
    return (*plain, *(Share(count, separated=True) for count in counts)) if colors else plain


def fitting_sms(demands: Sequence[Demand], machine: Machine) -> int | None:
    """The least SMs on which every LS tenant's requests take at most 5% longer than on all, by their kernels; None: there
    are none."""
    ls = [demand for demand in demands if demand.latency_sensitive]
    for count in range(machine.unit, machine.sms, machine.unit):
        if all(service_on(demand, machine, count) <= _FITTING * demand.service_ns for demand in ls):
            return count
    return None


def policy_text(share: Share, machine: Machine, be_min: float = 0.0, pause_above: float = 0.0) -> str:
    """The policy that carries a share out. pause_above: LS requests/s above which BE should rather pause; 0.0: none."""
    if share.ls_sms >= machine.sms:
        return "missile" if share.preempts else "missile:preempt=off"
    options = f"{f'lend={share.lend:g}' if share.lend else 'pause=off'},ls_share={share.ls_sms / machine.sms:.3f}"
    options += f",be_min={be_min:g}" if be_min else ""
    options += f",pause_above={pause_above:.0f}" if pause_above else ""
    return f"missile:{options}" + (",colors=on" if share.separated else "")


def make_plan(
    demands: Sequence[Demand],
    machine: Machine,
    *,
    be_min: float = 0.0,
    trial: Trial | None = None,
    tried: int = _TRIED,
    tail: float | None = TAIL,
    variants: Sequence[str] = (),
) -> Plan:
    """The candidate with the most BE work of those whose objectives hold and whose p99s are at most `tail` times that alone.

    be_min: least BE rate, as a share of that alone. Colors are considered when it is known what they cost every tenant
    (`Demand.colored_ns`). trial: measures a candidate; the `tried` most promising ones are measured, those in which BE
    pauses among them, and the choice is made by what was measured. Without it, the prediction decides, which can't judge
    tails. tail: None leaves all that the objectives allow to BE. Where no candidate keeps it, the shortest tails come first.
    variants: options of `missile` that are tried together with the chosen candidate, one by one, where it lacks them.
    MisuseError for shares that can't be promised, and for an objective below the time that the tenant takes alone.
    """
    _check(demands, be_min)
    shares = candidates(
        machine,
        be_min,
        colors=all(demand.colored_ns is not None for demand in demands),
        preempts=any(demand.preemptible for demand in demands if not demand.latency_sensitive),
        lends=all(demand.slo_ns is not None for demand in demands if demand.latency_sensitive),
        fitting=fitting_sms(demands, machine),
    )
    if not shares:
        raise MisuseError(f"No split of {machine.sms} SMs leaves BE the {be_min:.0%} that it was promised.")
    predictions = sorted((predict(share, demands, machine) for share in shares), key=_promise(demands, machine))
    considered = [
        Candidate(policy_text(found.share, machine, be_min, _pause_above(found, demands, machine, be_min)), found)
        for found in predictions
    ]
    chosen, accepted = considered[0], predictions[0].slack >= 1.0
    if trial is not None:
        # BE that pauses is what LS requests feel least, however its rate was predicted: it is always tried.
        order = sorted(range(len(considered)), key=lambda place: considered[place].predicted.share.ls_sms < machine.sms)
        for place in sorted(order[:tried]):
            considered[place] = replace(considered[place], measured=trial(considered[place].policy))
        chosen, accepted = _best(_tried(considered), demands, tail)
        for variant in variants:
            policy = chosen.policy + ("," if ":" in chosen.policy else ":") + variant
            if variant in chosen.policy or any(found.policy == policy and found.measured for found in considered):
                continue
            considered.append(replace(chosen, policy=policy, measured=trial(policy)))
            chosen, accepted = _best(_tried((chosen, considered[-1])), demands, tail)
    first, factor = _breaks(chosen, demands, machine)
    return Plan(
        accepted=accepted,
        chosen=chosen,
        considered=tuple(considered),
        machine=machine,
        demands=tuple(demands),
        breaks_first=first,
        breaks_at=factor,
        remedies=() if accepted else _remedies(demands, machine, considered),
        tail=tail,
    )


def _promise(demands: Sequence[Demand], machine: Machine) -> Callable[[Prediction], tuple[bool, bool, float]]:
    """Sorts predictions: objectives kept, tails not much longer than where BE pauses, then the most BE work."""
    pausing = predict(Share(machine.sms), demands, machine).p99_ns

    def key(found: Prediction) -> tuple[bool, bool, float]:
        if found.slack < 1.0:
            return True, True, -found.slack
        stretch = max(
            (ns / pausing[name] for name, ns in found.p99_ns.items() if pausing[name] < math.inf), default=1.0
        )
        return False, stretch > _STRETCH, -found.be_rate

    return key


def _tried(considered: Sequence[Candidate]) -> list[tuple[Candidate, Measured]]:
    return [(candidate, candidate.measured) for candidate in considered if candidate.measured is not None]


def _best(
    tried: Sequence[tuple[Candidate, Measured]], demands: Sequence[Demand], tail: float | None
) -> tuple[Candidate, bool]:
    """The choice by what was measured, and whether it holds.

    Of those that hold with a margin and whose tails are at most `tail` (where none is: within what a trial can tell of the
    shortest), the one with the most BE work (of those that differ by less than a trial can tell, the one with the least
    strain); else of those that just hold, or of all, the one with the least strain.
    """

    def strain(pair: tuple[Candidate, Measured]) -> float:
        return pair[1].strain(pair[0].predicted.slo_ns, demands)

    holding = [pair for pair in tried if pair[1].accepted]
    safe = [pair for pair in holding if strain(pair) <= MARGIN]
    if safe:
        if tail is not None:
            shortest = min(_tail_of(*pair) for pair in safe)
            bound = tail if shortest <= tail else shortest * (1.0 + _TAIL_NOISE)
            safe = [pair for pair in safe if _tail_of(*pair) <= bound]
        most = max(result.be_rate for _, result in safe)
        return min((pair for pair in safe if pair[1].be_rate >= most * (1.0 - _ALIKE)), key=strain)[0], True
    return min(holding or tried, key=strain)[0], bool(holding)


def _tail_of(candidate: Candidate, result: Measured) -> float:
    """The largest p99 over that alone, as far as it can be told: of several trials some look better than they are, and those
    that lend BE most are the ones that a choice by BE work would take."""
    stretch = candidate.predicted.stretch
    return result.tail + _BELIEF * (max(stretch, result.tail) - result.tail) if result.tail else 0.0


def _pause_above(found: Prediction, demands: Sequence[Demand], machine: Machine, be_min: float) -> float:
    """At how many LS requests/s BE should pause instead of running beside: where an objective breaks first, by prediction.
    0.0 where BE pauses anyway or may not, and where that is too close to the present rate to tell them apart."""
    if found.share.ls_sms >= machine.sms or found.share.lend or be_min:
        return 0.0
    _, factor = _breaks(Candidate("", found), demands, machine)
    return factor * sum(demand.rate_per_s for demand in demands) if _RATE_CHANGE <= factor < _MOST_FACTOR else 0.0


def rates_changed(plan: Plan, rates: Mapping[str, float]) -> tuple[str, ...]:
    """LS tenants whose arrival rate (per s) is no longer what the plan was made for, by a factor of 1.3 or more; and tenants
    that came or went. Then it is time for another plan."""
    planned = {demand.name: demand.rate_per_s for demand in plan.demands if demand.latency_sensitive}
    changed = [name for name in {**planned, **rates} if (name in planned) != (name in rates)]
    for name in planned.keys() & rates.keys():
        low, high = sorted((planned[name], rates[name]))
        if high > _RATE_CHANGE * low:
            changed.append(name)
    return tuple(sorted(changed))


def _check(demands: Sequence[Demand], be_min: float) -> None:
    if not 0.0 <= be_min < 1.0:
        raise MisuseError(f"The least BE rate must be at least 0 and below 1, not {be_min:g}.")
    for demand in demands:
        if demand.slo_ns is not None and demand.slo_ns < demand.service_ns:
            raise MisuseError(
                f"Tenant {demand.name!r} has an objective of {demand.slo_ns / 1e6:.3g} ms and takes "
                f"{demand.service_ns / 1e6:.3g} ms when it is alone; no plan can meet that."
            )


def _breaks(chosen: Candidate, demands: Sequence[Demand], machine: Machine) -> tuple[str, float]:
    """The LS tenant whose objective breaks first when all rates grow, and the factor at which it does: as predicted, with
    predictions off by the same factors as at the present rates where those were measured. BE that is lent SMs pauses by
    then."""
    present = chosen.predicted
    share = Share(machine.sms) if present.share.lend else present.share
    if not present.slo_ns:
        return "", math.inf
    measured = {} if chosen.measured is None else chosen.measured.p99_ns
    off = {
        name: measured[name] / present.p99_ns[name] if name in measured and math.isfinite(present.p99_ns[name]) else 1.0
        for name in present.slo_ns
    }

    def slacks(factor: float) -> dict[str, float]:
        found = predict(share, demands, machine, rate_factor=factor)
        return {name: slo / (found.p99_ns[name] * off[name]) for name, slo in found.slo_ns.items()}

    def holds(factor: float) -> bool:
        return min(slacks(factor).values()) >= 1.0

    low, high = 0.0, 1.0
    while high < _MOST_FACTOR and holds(high):
        low, high = high, high * 2
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    there = slacks(high)
    return min(there, key=there.__getitem__), low


def _remedies(demands: Sequence[Demand], machine: Machine, considered: Sequence[Candidate]) -> tuple[str, ...]:
    """What would let a plan hold: lower rates, looser objectives, or BE kernels that can be preempted."""
    found = []
    pausing = predict(Share(machine.sms), demands, machine)
    _, factor = _breaks(Candidate("missile", pausing), demands, machine)
    if 0.0 < factor < 1.0:
        found.append(f"arrival rates of at most {factor:.0%} of the present ones, with BE pausing beside LS requests")
    seen = [candidate.measured.p99_ns for candidate in considered if candidate.measured is not None]
    for name, slo in pausing.slo_ns.items():
        best = min((p99[name] for p99 in seen if name in p99), default=pausing.p99_ns[name])
        if slo < best < math.inf:
            found.append(f"an objective of {best / 1e6:.3g} ms for {name!r} instead of {slo / 1e6:.3g} ms")
    stiff = [demand.name for demand in demands if not demand.latency_sensitive and not demand.preemptible]
    leaving = predict(Share(machine.sms), [replace(demand, preemptible=True) for demand in demands], machine)
    if stiff and leaving.slack > pausing.slack:
        found.append(f"preemptible kernels for {', '.join(repr(name) for name in stiff)}")
    return tuple(found)
