"""One PNG of isolation results: the victim's slowdown by working set, shared and disjoint colors side by side."""

from __future__ import annotations

from pathlib import Path

from missile.bench.isolation.results import IsolationResults, outcomes
from missile.bench.isolation.table import title_of
from missile.gpu.interface import Access

__all__ = ["plot_isolation"]

MIB = 1 << 20
_TICKS = (1, 1.2, 1.5, 2, 3, 5, 8)


def plot_isolation(results: IsolationResults, path: Path) -> bool:
    """Write the figure to `path`, whole or not at all; False (and nothing written) where there is nothing to draw.

    One panel for each access of the aggressor; of splits and aggressors' sizes the first.
    """
    found = [o for o in outcomes(results) if o.slowdown is not None and o.victim_access is Access.READ]
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = found[0]
    same = [o for o in found if (o.victim_sms, o.aggressor_bytes) == (first.victim_sms, first.aggressor_bytes)]
    accesses = list(dict.fromkeys(o.aggressor_access for o in same))
    sizes = sorted({o.victim_bytes / MIB for o in same})
    figure, panels = pyplot.subplots(
        1, len(accesses), figsize=(5.2 * len(accesses), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(f"{title_of(results)}: {first.victim_sms} SMs read beside {first.aggressor_sms} SMs")
    for axes, access in zip(panels[0], accesses, strict=True):
        for scheme in dict.fromkeys(o.scheme for o in same):
            line = [
                (o.victim_bytes / MIB, o.slowdown) for o in same if (o.aggressor_access, o.scheme) == (access, scheme)
            ]
            disjoint = next(o.disjoint for o in same if o.scheme == scheme)
            axes.plot(*zip(*sorted(line), strict=True), marker="o", linestyle="-" if disjoint else "--", label=scheme)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="victim's working set, MiB", title=f"neighbour: {access}")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axes.minorticks_off()
    panels[0][0].set_ylabel("victim's time over alone")
    panels[0][-1].legend(title="victim + aggressor", fontsize="small")
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=120)
    pyplot.close(figure)
    part.replace(path)
    return True
