"""One PNG of the models' isolation results: service time beside each BE model, plain and colored, over alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from missile.bench.isolation.models_results import RealResults, pair_outcomes

__all__ = ["plot_models"]


def plot_models(results: RealResults, path: Path) -> bool:
    """Write the figure to `path`, whole or not at all; False (and nothing written) where no pair was measured."""
    pairs = {(pair.ls, pair.be, pair.colored): pair for pair in pair_outcomes(results) if pair.of_share}
    if not pairs:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ls, be = list(dict.fromkeys(key[0] for key in pairs)), list(dict.fromkeys(key[1] for key in pairs))
    figure, panels = pyplot.subplots(
        1, len(be), figsize=(3.0 + 2.6 * len(be), 0.5 * len(ls) + 1.8), sharey=True, squeeze=False, layout="constrained"
    )
    what = " (simulated)" if results.simulated else ""
    sides = f"{results.ls_sms} + {results.be_sms} SMs"
    figure.suptitle(f"{results.gpu}{what}: LS time over alone on the same SMs ({sides})")
    places = np.arange(len(ls))
    for axes, model in zip(panels[0], be, strict=True):
        for colored, label in ((False, "plain"), (True, "colored")):
            found = [pairs.get((name, model, colored)) for name in ls]
            ratios = [pair.of_share if pair else None for pair in found]
            axes.barh(places + (0.2 if colored else -0.2), [ratio or 0.0 for ratio in ratios], 0.38, label=label)
        axes.axvline(1.0, color="grey", linewidth=0.8)
        axes.set(title=f"beside {model}", xlim=(0, None))
    panels[0][0].set_yticks(places, ls)
    panels[0][0].invert_yaxis()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=120)
    pyplot.close(figure)
    part.replace(path)
    return True
