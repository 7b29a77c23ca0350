"""One PNG of a report: rates by chunk, latencies by way of copying, shares over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from missile.pcie.report import SCHEDULER, Report
from missile.pcie.summary import windows
from missile.pcie.ticket import Direction

__all__ = ["plot_report"]


def plot_report(report: Report, path: Path) -> None:
    """Write the figure to `path` (whole or not at all)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rates, latencies, shares) = pyplot.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    mark = " (simulated)" if report.link.simulated else ""
    figure.suptitle(f"PCIe on {report.link.gpu}{mark}")
    _rates(rates, report)
    _latencies(latencies, report)
    _shares(shares, report)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=120)
    pyplot.close(figure)
    part.replace(path)


def _rates(axes: Any, report: Report) -> None:
    for direction, rates in report.link.chunk_rates.items():
        axes.plot(
            [chunk / 1024 for chunk in rates],
            [rate / 1e9 for rate in rates.values()],
            marker="o",
            label=direction.value.upper(),
        )
    axes.set(xscale="log", xlabel="chunk, KiB", ylabel="GB/s", title="Raw rate by chunk")
    axes.set_ylim(bottom=0)
    axes.legend()


def _latencies(axes: Any, report: Report) -> None:
    runs = {"alone": report.alone, **report.compared}
    if "beside" in report.native_source:
        runs[f"{SCHEDULER}, loop in C"] = report.native_source["beside"]
    for name, result in runs.items():
        times = np.sort(result.latency_ns["ls 1 MiB"]) / 1e3
        if len(times):
            axes.plot(times, 1 - np.arange(len(times)) / len(times), label=name, drawstyle="steps-post")
    axes.set(
        xscale="log", yscale="log", xlabel="us", ylabel="part of copies slower", title="1 MiB copies beside bulk copies"
    )
    axes.legend()


def _shares(axes: Any, report: Report) -> None:
    case = "1:2:4"
    weights, result = report.shares[case]
    window = 10_000_000
    names, table = windows(result, Direction.H2D, window, step_ns=window // 4, skip_ns=0)
    time_ms = (np.arange(len(table)) * (window // 4) + window / 2) / 1e6
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    total = sum(weights.values())
    for column, name in enumerate(names):
        line = axes.plot(time_ms, share[:, column], label=f"{name}, weight {weights[name]:g}")[0]
        axes.axhline(weights[name] / total, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="ms", ylabel="share of the bytes, 10 ms windows", title=f"Shares by weight {case}", ylim=(0, 1))
    axes.legend()
