"""A few SVG primitives: elements, text, scales and axes. Colors come from the page's style sheet through classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "Axis",
    "element",
    "figure",
    "grid",
    "linear_axis",
    "log_axis",
    "nines_axis",
    "polyline",
    "rectangle",
    "text",
    "thin",
]


def element(name: str, *children: str, **attributes: object) -> str:
    """An element; `_` in an attribute's name becomes `-`, a trailing one is dropped (`class_`). None leaves it out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{given}>{''.join(children)}</{name}>" if children else f"<{name}{given}/>"


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str = "label", **more: object) -> str:
    return element("text", escape(content), x=x, y=y, text_anchor=anchor, class_=class_, **more)


def rectangle(
    x: float, y: float, width: float, height: float, *, class_: str, title: str = "", radius: float = 0
) -> str:
    tip = (element("title", escape(title)),) if title else ()
    return element("rect", *tip, x=x, y=y, width=width, height=height, rx=radius or None, class_=class_)


def polyline(points: Iterable[tuple[float, float]], *, class_: str, title: str = "") -> str:
    tip = (element("title", escape(title)),) if title else ()
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", *tip, points=path, class_=class_)


def figure(width: float, height: float, *children: str, description: str, class_: str = "chart") -> str:
    """An <svg> that scales to its container. `description` is what a screen reader says."""
    return element(
        "svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=description, class_=class_
    )


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values in [low, high] to positions in [start, end] through `forward`, with labelled ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The position of `value`, clipped to the axis."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def linear_axis(high: float, start: float, end: float, *, suffix: str = "", ticks: int = 4) -> Axis:
    """From 0 to at least `high`, with round ticks."""
    raw = max(high, 1e-9) / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    count = max(1, math.ceil(high / step - 1e-9))
    return Axis(0.0, count * step, start, end, tuple((i * step, f"{i * step:g}{suffix}") for i in range(count + 1)))


def log_axis(low: float, high: float, start: float, end: float, *, suffix: str = "") -> Axis:
    """From `low` to `high` (both above 0), widened to a factor of two where they are closer, ticks at 1, 2 and 5."""
    high = max(high, low * 2)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = [1, 2, 5] if high / low < 200 else [1]
    ticks = [m * 10.0**p for p in powers for m in steps]
    shown = tuple((tick, f"{tick:g}{suffix}") for tick in ticks if low * 0.999 <= tick <= high * 1.001)
    return Axis(low, high, start, end, shown, logarithmic=True)


def nines_axis(nines: float, start: float, end: float) -> Axis:
    """For a distribution: position is -log10(1 - F), so that 90%, 99% and 99.9% are equally far apart."""
    known = ((0.0, "0"), (-math.log10(0.5), "50%"), (1.0, "90%"), (2.0, "99%"), (3.0, "99.9%"), (4.0, "99.99%"))
    return Axis(0.0, nines, start, end, tuple((value, label) for value, label in known if value <= nines + 1e-9))


def grid(x: Axis, y: Axis, *, x_label: str = "", y_label: str = "") -> str:
    """Grid lines, tick labels and axis titles for a plot with `x` to the right and `y` upwards."""
    parts: list[str] = []
    for value, label in y.ticks:
        parts.append(element("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"))
        parts.append(text(x.start - 6, y(value) + 4, label, anchor="end"))
    for value, label in x.ticks:
        parts.append(element("line", x1=x(value), x2=x(value), y1=y.start, y2=y.end, class_="grid"))
        parts.append(text(x(value), y.start + 16, label, anchor="middle"))
    if x_label:
        parts.append(text((x.start + x.end) / 2, y.start + 34, x_label, anchor="middle"))
    if y_label:
        parts.append(text(x.start, y.end - 8, y_label, anchor="start"))
    return "".join(parts)


def thin(points: Sequence[tuple[float, float]], least: float = 0.7) -> list[tuple[float, float]]:
    """`points` without those closer than `least` to the one kept before; the last is always kept."""
    kept: list[tuple[float, float]] = []
    for point in points:
        if not kept or math.dist(point, kept[-1]) >= least:
            kept.append(point)
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
