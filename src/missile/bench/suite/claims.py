"""What the evaluation set out to show, checked against a suite's results: what holds, where it does not, and why. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from missile.bench.fidelity import Comparison
from missile.bench.suite.cells import BASELINES, family
from missile.bench.suite.summary import ATTAINED, CellSummary, Point, geometric_mean
from missile.bench.table import format_share, three_digits

__all__ = ["Claim", "Rival", "check_claims", "compare_with_baselines"]

MEDIAN_P99, WORST_P99, BE_SHARE = 1.10, 1.25, 0.70
HALF, TIMES = 0.5, 2.36
PREDICTED = 0.80
_AS_HIGH = 0.99  # a BE rate within 1% counts as as high


@dataclass(frozen=True, slots=True)
class Claim:
    """holds: None where nothing was measured that could tell. found: the figure in a sentence. exceptions: where and why."""

    title: str
    holds: bool | None
    found: str
    exceptions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rival:
    """`missile` against one baseline.

    compared: cells in which some setting of it had as high a BE rate. halved: of these, where `missile`'s LS p99 was at
    most half of the shortest such. ratio: missile's p99 / that, geometric mean. exceptions: (cell, ratio).
    """

    baseline: str
    compared: int
    halved: int
    ratio: float | None
    exceptions: tuple[tuple[str, float], ...]


def check_claims(cells: Sequence[CellSummary], predictions: Sequence[Comparison] = ()) -> list[Claim]:
    """Every claim about `missile`, in order, then the one about the simulator. Cells without `missile` say nothing."""
    predicted = [_predicted(predictions)] if predictions else []
    ours = [cell for cell in cells if "missile" in cell.best]
    failed = [cell for cell in cells if cell.left_out("missile")]
    if not ours and not failed:
        return predicted
    pairs = [cell for cell in ours if cell.cell.pair]
    rivals = compare_with_baselines(ours)
    return [
        _attainment(ours, failed),
        _median(pairs),
        _worst(pairs),
        _be_share(ours),
        _halved(rivals),
        _times(ours),
        *predicted,
    ]


def _attainment(cells: Sequence[CellSummary], failed: Sequence[CellSummary]) -> Claim:
    accepted = [cell for cell in cells if cell.accepted is not False]
    refused = [cell for cell in cells if cell.accepted is False]
    missed = [cell for cell in accepted if not _of(cell).attained]
    met = sum(_of(cell).attained for cell in refused)
    more = f"; of {len(refused)} others, for which it found no plan, in {met}" if refused else ""
    more += f"; it failed to run in {len(failed)} more" if failed else ""
    return Claim(
        f"SLO attainment of at least {ATTAINED:.0%} of every LS tenant in every cell that the planner accepts",
        not missed and not failed if accepted or failed else None,
        f"in {len(accepted) - len(missed)} of {len(accepted)} cells{more}",
        (
            *(f"{cell.cell.name}: {format_share(_of(cell).attainment)}; {_why(cell)}" for cell in missed),
            *(f"{cell.cell.name}: not accepted; {format_share(_of(cell).attainment)}" for cell in refused),
            *(f"{cell.cell.name}: it did not run: {cell.left_out('missile')}" for cell in failed),
        ),
    )


def _median(pairs: Sequence[CellSummary]) -> Claim:
    tails = [cell.best["missile"].p99.value for cell in pairs if cell.best["missile"].p99]
    found = float(np.median(tails)) if tails else None
    return Claim(
        f"LS p99 at most {MEDIAN_P99:.2f} × solo in the median pair",
        None if found is None else found <= MEDIAN_P99,
        f"{three_digits(found)} × over {len(tails)} pairs{_with_lost(pairs, np.median)}",
    )


def _worst(pairs: Sequence[CellSummary]) -> Claim:
    told = [cell for cell in pairs if cell.best["missile"].worst is not None]
    over = sorted((c for c in told if _of(c).worst > WORST_P99), key=lambda c: -_of(c).worst)  # type: ignore[operator]
    most = max((_of(cell).worst or 0.0 for cell in told), default=None)
    return Claim(
        f"LS p99 at most {WORST_P99:.2f} × solo in the worst pair",
        None if most is None else most <= WORST_P99,
        f"{three_digits(most)} × over {len(told)} pairs, {len(over)} above{_with_lost(pairs, np.max)}",
        tuple(f"{cell.cell.name}: {three_digits(_of(cell).worst)} ×; {_why(cell)}" for cell in over),
    )


def _with_lost(pairs: Sequence[CellSummary], of: Callable[[list[float]], float]) -> str:
    """The same figure when requests that were turned away count as the slowest, where that is another one."""
    points = [_of(pair) for pair in pairs if _of(pair).worst is not None]
    tails = [math.inf if point.worst_of_all is None else point.worst_of_all for point in points]
    if tails == [point.worst for point in points]:
        return ""
    found = of(tails)
    said = f"{three_digits(found)} ×" if math.isfinite(found) else "without bound"
    return f"; {said} with requests that were turned away counted as the slowest"


def _be_share(cells: Sequence[CellSummary]) -> Claim:
    shares = [point.be for cell in cells if (point := _of(cell)).be is not None]
    mean = geometric_mean([share for share in shares if share is not None])
    low = sorted((cell for cell in cells if (_of(cell).be or 0.0) < BE_SHARE), key=lambda c: _of(c).be or 0.0)
    bounds = [cell.free for cell in cells if cell.free is not None and _of(cell).be is not None]
    bound = geometric_mean(bounds)
    some = [share for share in shares if share]
    nothing = ""
    if len(some) < len(shares):
        others = format_share(geometric_mean(some))
        nothing = f"; it finished nothing in {len(shares) - len(some)}, and over the others it is {others}"
    more = f"; time free of LS requests, which bounds a BE that never runs beside them: {format_share(bound)}"
    return Claim(
        f"BE rate at least {BE_SHARE:.2f} of solo (geometric mean)",
        None if mean is None else mean >= BE_SHARE,
        f"{format_share(mean)} over {len(shares)} cells{nothing}{more if len(bounds) == len(shares) > 0 else ''}",
        tuple(f"{cell.cell.name}: {format_share(_of(cell).be)}{_free(cell)}" for cell in low),
    )


def _free(cell: CellSummary) -> str:
    return "" if cell.free is None else f" ({format_share(cell.free)} of the time is free of LS requests)"


def compare_with_baselines(cells: Sequence[CellSummary]) -> list[Rival]:
    """LS p99 of `missile` against the shortest of each baseline among its settings with as high a BE rate."""
    found = []
    for baseline in BASELINES:
        ratios: list[tuple[str, float]] = []
        for cell in cells:
            ours = _of(cell)
            if ours.p99 is None or ours.be is None:
                continue
            tails = [
                point.p99.value
                for point in cell.points.get(baseline, ())
                if point.p99 and point.be is not None and point.be >= _AS_HIGH * ours.be
            ]
            if tails:
                ratios.append((cell.cell.name, ours.p99.value / min(tails)))
        above = tuple(sorted((one for one in ratios if one[1] > HALF), key=lambda one: -one[1]))
        mean = geometric_mean([ratio for _, ratio in ratios])
        found.append(Rival(baseline, len(ratios), len(ratios) - len(above), mean, above))
    return found


def _halved(rivals: Sequence[Rival]) -> Claim:
    compared, halved = sum(r.compared for r in rivals), sum(r.halved for r in rivals)
    lines = [
        f"{rival.baseline}: {rival.halved} of {rival.compared} cells, {three_digits(rival.ratio)} of its p99 on average"
        + (
            f"; above in {', '.join(f'{name} ({three_digits(ratio)})' for name, ratio in rival.exceptions)}"
            if rival.exceptions
            else ""
        )
        for rival in rivals
        if rival.compared
    ]
    return Claim(
        "LS p99 at most half of each baseline's wherever that baseline's BE rate is as high",
        halved == compared if compared else None,
        f"in {halved} of {compared} comparisons",
        tuple(lines),
    )


def _times(cells: Sequence[CellSummary]) -> Claim:
    ratios: list[tuple[str, float, str]] = []
    alone, missed = 0, []
    for cell in cells:
        ours = _of(cell)
        rivals = [point.be for name in BASELINES if (point := cell.best.get(name)) and point.attained and point.be]
        if not ours.attained or ours.be is None:
            missed += [f"{cell.cell.name}: missile itself does not attain, and a baseline does"] if rivals else []
        elif rivals:
            ratios.append((cell.cell.name, ours.be / max(rivals), _room(max(rivals)) + _free(cell)))
        else:
            alone += 1
    below = sorted((one for one in ratios if one[1] < TIMES), key=lambda one: one[1])
    mean = geometric_mean([ratio for _, ratio, _ in ratios])
    return Claim(
        f"BE rate at least {TIMES} × that of the best baseline that also attains {ATTAINED:.0%}",
        not below and not missed if ratios or alone or missed else None,
        f"{three_digits(mean)} × on average over {len(ratios)} cells in which both attain; no baseline does in {alone}",
        (*missed, *(f"{name}: {three_digits(ratio)} ×; {why}" for name, ratio, why in below)),
    )


def _predicted(predictions: Sequence[Comparison]) -> Claim:
    groups: dict[tuple[str, str], list[bool]] = {}
    for one in predictions:
        if one.figure in ("p99", "rate"):
            what = "LS p99" if one.figure == "p99" else "BE rate"
            groups.setdefault((family(one.policy), what), []).append(one.close)
    shares = {key: sum(close) / len(close) for key, close in groups.items()}
    below = [
        f"{policy}, {what}: {format_share(share)}" for (policy, what), share in shares.items() if share < PREDICTED
    ]
    return Claim(
        f"The simulated GPU predicts LS p99 and BE rate of each policy within 20% for at least {PREDICTED:.0%} of the cells",
        not below,
        f"of {len(shares)} figures by policy, {len(shares) - len(below)}",
        tuple(below),
    )


def _room(best: float) -> str:
    if best * TIMES > 1.0:
        return f"the baseline has {format_share(best)} of solo already, of which {TIMES} × is more than the GPU gives"
    return f"the baseline has {format_share(best)} of solo"


def _of(cell: CellSummary) -> Point:
    return cell.best["missile"]


def _why(cell: CellSummary) -> str:
    """Which part of the latency grew, and whether anybody did better."""
    point = _of(cell)
    parts = []
    if point.queueing is not None and point.service is not None:
        part = "waiting" if point.queueing > point.service else "running"
        parts.append(
            f"p99 of waiting {three_digits(point.queueing)}, of running {three_digits(point.service)} × solo p99: {part}"
        )
    better = [name for name in BASELINES if (other := cell.best.get(name)) and other.attained]
    parts.append(f"attained by {', '.join(better)}" if better else "no baseline attains it either")
    return "; ".join(parts)
