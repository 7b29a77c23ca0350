"""The report's pictures as inline SVG: trade-off, bars, latency distributions, timeline. Pure: results in, markup out.

Classes name the series (`p0`, `p1`, ... for policies in the scenario's order, `t0`, `t1`, ... for tenants); the style sheet
gives each its color and dash pattern, light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np

from missile.bench.results import Results, Run, TenantInfo, TenantRun
from missile.bench.summary import PolicySummary, Spread, Summary, latencies_ms
from missile.bench.svg import (
    Axis,
    element,
    figure,
    grid,
    linear_axis,
    log_axis,
    nines_axis,
    polyline,
    rectangle,
    text,
    thin,
)
from missile.bench.table import format_share, three_digits

__all__ = ["bars", "busiest_window", "distribution", "tenant_classes", "timeline", "tradeoff"]

# The style sheet has cool colors for LS and warm ones for BE; a ninth tenant begins again.
_LS_COLORS = ("t0", "t1", "t2", "t6", "t7")
_BE_COLORS = ("t3", "t4", "t5")
_BAR = 18  # from one LS tenant's bar to the next


def tenant_classes(tenants: Sequence[TenantInfo]) -> dict[str, str]:
    """The color class of each tenant, by name."""
    ls = [tenant.name for tenant in tenants if tenant.tenant_class == "LS"]
    be = [tenant.name for tenant in tenants if tenant.tenant_class == "BE"]
    return dict(zip(ls, cycle(_LS_COLORS), strict=False)) | dict(zip(be, cycle(_BE_COLORS), strict=False))


def tradeoff(summary: Summary, policies: Sequence[str]) -> str:
    """LS tail (upwards, against solo, log) over BE throughput (to the right): one point per policy."""
    width, height = 440, 300
    shown = [p for p in summary.policies if p.ls_over_solo is not None and p.be_share is not None]
    if not shown:
        return ""
    worst = max(row.over_solo or 1.0 for p in shown for row in p.ls)
    x = linear_axis(max(1.0, *(p.be_share or 0.0 for p in shown)) * 100, 52, width - 16, suffix="%")
    y = log_axis(0.9, worst * 1.15, height - 46, 26, suffix="×")
    parts = [
        grid(x, y, x_label="BE throughput, sum of shares of solo  → better", y_label="LS p99 against solo  ↓ better"),
        element("line", x1=x.start, x2=x.end, y1=y(1), y2=y(1), class_="solo"),
        text(x.end, y(1) - 5, "solo", anchor="end", class_="label faint"),
    ]
    points = [(x((p.be_share or 0) * 100), y(p.ls_over_solo or 1)) for p in shown]
    taken = [(at - 8, over - 8, at + 8, over + 8) for at, over in points]
    for p, (at, over) in zip(shown, points, strict=True):
        name = f"p{policies.index(p.policy)}"
        each = [y(row.over_solo) for row in p.ls if row.over_solo]
        parts.append(element("line", x1=at, x2=at, y1=min(each), y2=max(each), class_=f"whisker {name}"))
        tip = f"{p.policy}: LS p99 {three_digits(p.ls_over_solo)} × solo, BE {format_share(p.be_share)} of solo"
        parts.append(element("circle", element("title", tip), cx=at, cy=over, r=6, class_=f"dot {name}"))
        box = _free_box(at, over, 7.4 * len(p.policy) + 4, (x, y), taken)
        taken.append(box)
        parts.append(text(box[0], box[3] - 3, p.policy, class_="name"))
    description = "LS tail latency against BE throughput, one point per policy; the table has the numbers."
    return figure(width, height, *parts, description=description)


_Box = tuple[float, float, float, float]  # left, top, right, bottom


def _free_box(at: float, over: float, width: float, axes: tuple[Axis, Axis], taken: Sequence[_Box]) -> _Box:
    """Where a label of `width` for the point (at, over) overlaps nothing; right of the point if nowhere is free."""
    spots = [(at + side, over + dy) for dy in (0, -15, 15, -30, 30, -45) for side in (10, -10 - width)]
    boxes = [(left, middle - 7, left + width, middle + 7) for left, middle in spots]
    x, y = axes
    inside = [
        box for box in boxes if x.start <= box[0] and box[2] <= x.end + 8 and y.end <= box[1] and box[3] <= y.start
    ]
    free = (box for box in inside if not any(_overlap(box, other) for other in taken))
    return next(free, boxes[0])


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def bars(summary: Summary, tenants: Sequence[TenantInfo]) -> str:
    """For each policy, left: each LS tenant's p99 against solo; right: BE throughput, tenants stacked."""
    ls = [tenant.name for tenant in tenants if tenant.tenant_class == "LS"]
    color = tenant_classes(tenants)
    row, top, width, left, middle = _BAR * max(1, len(ls)) + 18, 34, 490, 80, 300
    height = top + row * len(summary.policies) + 26
    worst = max([r.over_solo for p in summary.policies for r in p.ls if r.over_solo] or [2.0])
    share = max([p.be_share for p in summary.policies if p.be_share] or [1.0])
    x = log_axis(1.0, worst * 1.05, left, middle - 48, suffix="×")
    z = linear_axis(max(1.0, share) * 100, middle, width - 48, suffix="%", ticks=2)
    parts = [
        text(left, 12, "LS p99 against solo"),
        text(middle, 12, "BE throughput, shares of solo"),
    ]
    for axis in (x, z):
        for value, label in axis.ticks:
            at = axis(value)
            parts.append(element("line", x1=at, x2=at, y1=top - 10, y2=height - 24, class_="grid"))
            parts.append(text(at, height - 8, label, anchor="middle"))
    for index, p in enumerate(summary.policies):
        base = top + index * row
        parts.append(text(left - 10, base + row / 2 - 5, p.policy, anchor="end", class_="name"))
        parts += _ls_bars(p, x, base, color)
        parts += _be_bar(p, z, base, row - 18, color)
    return figure(width, height, *parts, description="LS p99 and BE throughput of every policy, as bars.")


def _ls_bars(policy: PolicySummary, x: Axis, base: float, color: Mapping[str, str]) -> list[str]:
    parts = []
    for index, row in enumerate(policy.ls):
        if row.over_solo is None or row.p99 is None:
            continue
        y, scale = base + _BAR * index, row.over_solo / row.p99.value
        tip = (
            f"{policy.policy}, {row.tenant}: p99 {three_digits(row.p99.value)} ms, {three_digits(row.over_solo)} × solo"
        )
        parts.append(
            rectangle(
                x.start,
                y,
                max(x(row.over_solo) - x.start, 1.5),
                _BAR - 4,
                class_=f"fill {color[row.tenant]}",
                title=tip,
            )
        )
        spread = Spread(row.over_solo, row.p99.low * scale, row.p99.high * scale)
        parts.append(_whisker(x, spread, y + _BAR / 2 - 2))
        parts.append(
            text(
                x(spread.high) + 5,
                y + _BAR - 6,
                f"{three_digits(row.over_solo)}×",
            )
        )
    return parts


def _be_bar(policy: PolicySummary, z: Axis, base: float, height: float, color: Mapping[str, str]) -> list[str]:
    parts, at, thick = [], 0.0, min(26.0, height)
    y = base + (height - thick) / 2
    for row in policy.be:
        if row.share is None:
            continue
        share = row.share.value * 100
        tip = (
            f"{policy.policy}, {row.tenant}: {three_digits(row.rate.value)}/s, {format_share(row.share.value)} of solo"
        )
        parts.append(
            rectangle(
                z(at), y, max(z(at + share) - z(at) - 1, 0.5), thick, class_=f"fill {color[row.tenant]}", title=tip
            )
        )
        at += share
    parts.append(text(z(at) + 5, y + thick / 2 + 4, format_share(policy.be_share)))
    return parts


def _whisker(x: Axis, spread: Spread, y: float) -> str:
    low, high = x(spread.low), x(spread.high)
    path = f"M{low:.1f},{y - 3:.1f}v6m0,-3H{high:.1f}m0,-3v6"
    return element("path", d=path, class_="spread")


def distribution(results: Results, tenant: TenantInfo) -> str:
    """Cumulative distribution of `tenant`'s latencies under every policy and alone, on an axis of nines."""
    width, height = 370, 270
    solo = [run for run in results.runs if run.kind == "solo"]
    series = [("alone", "alone", latencies_ms(solo, tenant.name))]
    for index, policy in enumerate(results.scenario.policies):
        runs = [run for run in results.runs if run.kind == "policy" and run.policy == policy]
        series.append((policy, f"p{index}", latencies_ms(runs, tenant.name)))
    series = [(name, class_, np.sort(samples)) for name, class_, samples in series if len(samples)]
    if not series:
        return ""
    most = max(len(samples) for _, _, samples in series)
    low = min(float(samples[0]) for _, _, samples in series)
    high = max(float(samples[-1]) for _, _, samples in series)
    x = log_axis(low * 0.9, high * 1.1, 52, width - 12)
    y = nines_axis(min(4.0, max(1.0, math.log10(most))), height - 46, 24)
    parts = [grid(x, y, x_label="latency, ms (log)", y_label="share of requests done within")]
    if tenant.slo_ms and x.low <= tenant.slo_ms <= x.high:
        at = x(tenant.slo_ms)
        parts.append(element("line", x1=at, x2=at, y1=y.start, y2=y.end, class_="slo"))
        parts.append(
            text(at - 4, y.end + 10, f"SLO {three_digits(tenant.slo_ms)}", anchor="end", class_="label slo-label")
        )
    for name, class_, samples in series:
        # The share of samples strictly below each one, so that the largest of n ends at 1 - 1/n: no claim beyond the data.
        points = [(x(value), y(-math.log10(1 - i / len(samples)))) for i, value in enumerate(samples.tolist())]
        parts.append(polyline(thin(points), class_=f"line {class_}", title=f"{name}, n = {len(samples)}"))
    description = f"Latency distribution of {tenant.name} under each policy."
    return figure(width, height, *parts, description=description)


def busiest_window(run: Run, tenants: Sequence[TenantInfo], length_ns: int) -> tuple[int, int]:
    """The window of `length_ns` of `run` in which most LS requests arrive, ns."""
    ls = {tenant.name for tenant in tenants if tenant.tenant_class == "LS"}
    arrivals = np.sort(
        np.array([at for tenant in run.tenants if tenant.name in ls for at in tenant.arrival_ns], np.int64)
    )
    if not len(arrivals):
        return run.warmup_ns, run.warmup_ns + length_ns
    counts = np.searchsorted(arrivals, arrivals + length_ns * 3 // 4) - np.arange(len(arrivals))
    start = int(arrivals[int(np.argmax(counts))]) - length_ns // 8
    return start, start + length_ns


def timeline(run: Run, tenants: Sequence[TenantInfo], window: tuple[int, int]) -> str:
    """Who ran where in `window` (ns): one row per lane, a bar per request from its first kernel to its last.

    A thin line before an LS request's bar is its wait; a tick above the rows is an LS arrival.
    """
    start, end = window
    width, left, row, top = 1040, 236, 26, 26
    x = Axis(start, end, left, width - 12, ())
    used = sorted({lane for tenant in run.tenants for lane in tenant.lane})
    top_of = {lane: top + row * index for index, lane in enumerate(used)}
    bottom = top + row * len(used)
    parts = []
    step = max(1, (end - start) // 8_000_000)
    for tick in range(0, (end - start) // 1_000_000, step):
        at = x(start + tick * 1_000_000)
        parts.append(element("line", x1=at, x2=at, y1=top - 4, y2=bottom, class_="grid"))
        parts.append(text(at, bottom + 16, f"{tick} ms", anchor="middle"))
    for lane in used:
        label = run.lanes[lane] if lane < len(run.lanes) else f"lane {lane}"
        label = label if len(label) <= 37 else label[:36] + "…"
        parts.append(text(left - 10, top_of[lane] + 17, label, anchor="end"))
        parts.append(rectangle(left, top_of[lane] + 2, width - 12 - left, row - 4, class_="lane"))
    latency_sensitive = {tenant.name for tenant in tenants if tenant.tenant_class == "LS"}
    color = tenant_classes(tenants)
    for tenant in sorted(run.tenants, key=lambda t: t.name in latency_sensitive):  # LS on top of BE
        parts += _requests(tenant, window, x, top_of, row, color[tenant.name], waits=tenant.name in latency_sensitive)
    return figure(width, bottom + 22, *parts, description=f"Who ran where under {run.policy}.", class_="chart wide")


def _requests(
    tenant: TenantRun,
    window: tuple[int, int],
    x: Axis,
    top_of: Mapping[int, float],
    row: float,
    color: str,
    *,
    waits: bool,
) -> list[str]:
    """The bars of one tenant, and with `waits` its arrivals and waits."""
    start, end = window
    above = min(top_of.values(), default=0.0)
    parts = []
    times = zip(tenant.arrival_ns, tenant.start_ns, tenant.end_ns, tenant.lane, strict=True)
    for arrival, begin, finish, lane in times:
        if finish < start or arrival > end:
            continue
        y = top_of[lane]
        if waits:
            middle = y + row / 2
            parts.append(element("line", x1=x(arrival), x2=x(begin), y1=middle, y2=middle, class_=f"wait {color}"))
            if arrival >= start:
                at = x(arrival)
                parts.append(element("line", x1=at, x2=at, y1=above - 12, y2=above - 2, class_=f"tick {color}"))
        if begin <= end:
            waited, ran = three_digits((begin - arrival) / 1e6), three_digits((finish - begin) / 1e6)
            tip = f"{tenant.name}: waited {waited} ms, ran {ran} ms"
            long = max(x(finish) - x(begin), 1.2)
            parts.append(rectangle(x(begin), y + 5, long, row - 10, class_=f"run {color}", title=tip))
    return parts
