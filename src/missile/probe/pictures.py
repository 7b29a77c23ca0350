"""Pictures of a channel map, drawn without a display."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from missile.errors import MisuseError
from missile.probe.channel_map import ChannelMap

__all__ = ["draw"]

_FORMATS = (".png", ".svg", ".pdf")


def draw(channel_map: ChannelMap, path: Path) -> None:
    """Fingerprints by slice, the slice pattern of a page, interference between colors, and SM groups, in one picture.

    Written whole or not at all. MisuseError for a file type other than PNG, SVG and PDF.
    """
    if path.suffix.lower() not in _FORMATS:
        raise MisuseError(f"A picture can be {', '.join(_FORMATS)}; {path.name} is none of them.")
    # Imported here: half a second that reading a map doesn't need.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _fingerprints(channel_map, axes[0, 0])
    _pattern(channel_map, axes[0, 1])
    _interference(channel_map, axes[1, 0])
    _groups(channel_map, axes[1, 1])
    simulated = " (simulated)" if channel_map.simulated else ""
    figure.suptitle(
        f"{channel_map.gpu}{simulated}: {channel_map.slices} slices, granule {channel_map.granule_bytes} B, "
        f"page {channel_map.page_bytes >> 10} KiB"
    )
    part = path.with_name(path.stem + ".part" + path.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, dpi=110)
        part.replace(path)
    except OSError as error:
        raise MisuseError(f"{path} can't be written: {error.strerror}.") from error
    finally:
        part.unlink(missing_ok=True)


def _fingerprints(channel_map: ChannelMap, axes) -> None:  # type: ignore[no-untyped-def]
    centres = channel_map.metric.centres[channel_map.metric.ball]
    image = axes.imshow(centres, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set(title="Latency by slice and SM (SM clock cycles)", ylabel="slice", xlabel="SM")
    axes.set_xticks(range(len(channel_map.metric.sms)), [str(sm) for sm in channel_map.metric.sms], fontsize=7)
    axes.figure.colorbar(image, ax=axes)


def _pattern(channel_map: ChannelMap, axes) -> None:  # type: ignore[no-untyped-def]
    slices = channel_map.page_slices()
    width = 1 << (len(channel_map.layout.index_bits) // 2)
    image = axes.imshow(slices.reshape(-1, width), aspect="auto", interpolation="nearest", cmap="nipy_spectral")
    axes.set(title="Slice of each granule of a page", xlabel="granule index, low bits", ylabel="high bits")
    axes.figure.colorbar(image, ax=axes)


def _interference(channel_map: ChannelMap, axes) -> None:  # type: ignore[no-untyped-def]
    if channel_map.interference is None:
        axes.text(0.5, 0.5, "interference was not measured", ha="center", va="center")
        axes.set_axis_off()
        return
    slowdown = channel_map.interference.slowdown
    joined = np.concatenate(list(slowdown.values()), axis=1)
    image = axes.imshow(joined, aspect="auto", interpolation="nearest", cmap="magma_r", vmin=1.0)
    colors = len(channel_map.colors)
    for place in range(1, len(slowdown)):
        axes.axvline(place * colors - 0.5, color="tab:blue")
    axes.set(
        title="Slowdown of a reader beside: " + " | ".join(slowdown),
        xlabel="aggressor's color",
        ylabel="victim's color",
    )
    axes.set_xticks(range(joined.shape[1]), [str(i % colors) for i in range(joined.shape[1])], fontsize=7)
    axes.figure.colorbar(image, ax=axes)


def _groups(channel_map: ChannelMap, axes) -> None:  # type: ignore[no-untyped-def]
    topology = channel_map.topology
    half = dict(zip(topology.sms, topology.sm_half, strict=True))
    for row, group in enumerate(topology.groups):
        axes.scatter(group, [row] * len(group), s=14, c=["tab:orange" if half[sm] else "tab:blue" for sm in group])
    halves = f"two halves, {topology.step:.0f} cycles apart" if topology.step else "one half"
    axes.set(title=f"SM groups by latency ({halves}: colour)", xlabel="SM", ylabel="group")
