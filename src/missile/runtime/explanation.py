"""A plan in words and as data: why these shares, what would break first, what would help. Pure."""

from __future__ import annotations

import math
from typing import Any

from missile.runtime.planner import ATTAINMENT, MARGIN, Candidate, Measured, Plan
from missile.runtime.prediction import Prediction

__all__ = ["explain", "plan_data"]


def explain(plan: Plan) -> str:
    """The plan for a person, some lines of text."""
    lines = [
        f"Plan: {plan.chosen.policy}" + ("" if plan.accepted else " (does not meet the objectives)"),
        _why(plan),
        "",
        "Considered, best first by prediction:",
    ]
    for candidate in plan.considered:
        lines.append(f"  {candidate.policy}")
        lines.append(f"    predicted: {_predicted(candidate.predicted)}")
        if candidate.measured is not None:
            lines.append(f"    measured: {_measured(candidate.measured)}")
    if plan.breaks_first and math.isfinite(plan.breaks_at):
        lines += [
            "",
            f"Would break first: {plan.breaks_first}, at {plan.breaks_at:.2g} times the present rates (by prediction).",
        ]
    if plan.copy_weights:
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in plan.copy_weights.items())
        lines += ["", f"Weights on the link to the host: {weights}."]
    if plan.remedies:
        lines += ["", f"Would help: {'; or '.join(plan.remedies)}."]
    return "\n".join(lines)


def plan_data(plan: Plan) -> dict[str, Any]:
    """What `explain` says, ready for JSON. Times in ms; None for what has no bound."""
    return {
        "policy": plan.chosen.policy,
        "accepted": plan.accepted,
        "why": _why(plan),
        "tail": plan.tail,
        "copy_weights": dict(plan.copy_weights),
        "objectives_ms": {name: ns / 1e6 for name, ns in plan.chosen.predicted.slo_ns.items()},
        "considered": [_candidate_data(candidate) for candidate in plan.considered],
        "breaks_first": plan.breaks_first,
        "breaks_at": _finite(plan.breaks_at),
        "remedies": list(plan.remedies),
    }


def _candidate_data(candidate: Candidate) -> dict[str, Any]:
    predicted, measured = candidate.predicted, candidate.measured
    return {
        "policy": candidate.policy,
        "ls_sms": predicted.share.ls_sms,
        "colors": predicted.share.separated,
        "preempts": predicted.share.preempts,
        "lend": predicted.share.lend,
        "predicted": {
            "load": predicted.load,
            "p99_ms": {name: _finite(ns / 1e6) for name, ns in predicted.p99_ns.items()},
            "be_rate": predicted.be_rate,
        },
        "measured": None
        if measured is None
        else {
            "attainment": dict(measured.attainment),
            "p99_ms": {name: ns / 1e6 for name, ns in measured.p99_ns.items()},
            "be_rate": measured.be_rate,
            "p99_over_alone": dict(measured.tails),
        },
    }


def _why(plan: Plan) -> str:
    sms, kept = plan.machine.sms, plan.chosen.predicted.share.ls_sms
    share = plan.chosen.predicted.share
    pauses = "pauses while one is" if share.preempts else "pauses while one is, when its work has ended"
    beside = pauses if kept >= sms else f"has {sms - kept} of {sms} while one is"
    if share.lend:
        beside += f" and is expected to end within {share.lend:.0%} of its objective, and pauses else"
    measured = plan.chosen.measured
    held = f"keep {ATTAINMENT:.0%} of requests within their objectives"
    if not plan.accepted:
        reason = f"no candidate would {held}; this one comes nearest"
    elif measured is None or measured.strain(plan.chosen.predicted.slo_ns, plan.demands) <= MARGIN:
        reason = f"of the candidates that {held}, with something to spare{_tail(plan)}, none has more BE work"
    else:
        reason = f"of the candidates that just {held}, this one has the shortest tails"
    basis = "predicted" if measured is None else "measured"
    apart = ", LS and BE memory in different colors" if plan.chosen.predicted.share.separated else ""
    return f"BE has all SMs while no LS request is there and {beside}{apart}: {reason} ({basis})."


def _tail(plan: Plan) -> str:
    measured = plan.chosen.measured
    if plan.tail is None or measured is None or not measured.tails:
        return ""
    if measured.tail <= plan.tail:
        return f", and p99s of at most {plan.tail:.2f} times those alone"
    return f", and the shortest tails (none has p99s of at most {plan.tail:.2f} times those alone)"


def _predicted(found: Prediction) -> str:
    parts = [f"LS there {found.load:.0%} of the time", f"BE at {found.be_rate:.0%} of its rate alone"]
    for name, ns in found.p99_ns.items():
        objective = f" (objective {found.slo_ns[name] / 1e6:.3g} ms)" if name in found.slo_ns else ""
        parts.append(
            f"{name} p99 {ns / 1e6:.3g} ms{objective}" if math.isfinite(ns) else f"{name} p99 unbounded{objective}"
        )
    return ", ".join(parts)


def _measured(found: Measured) -> str:
    parts = [f"BE at {found.be_rate:.0%} of its rate alone"]
    for name, ns in found.p99_ns.items():
        met = f", {found.attainment[name]:.1%} within its objective" if name in found.attainment else ""
        alone = f" ({found.tails[name]:.2f} times that alone)" if name in found.tails else ""
        parts.append(f"{name} p99 {ns / 1e6:.3g} ms{alone}{met}")
    return ", ".join(parts)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
