"""A suite's pictures: each cell's policies as curves over their settings. Pure: summaries in, SVG out."""

from __future__ import annotations

from missile.bench.suite.cells import BASELINES
from missile.bench.suite.summary import ATTAINED, CellSummary, Point
from missile.bench.svg import element, figure, grid, linear_axis, log_axis, polyline, text
from missile.bench.table import format_share, three_digits

__all__ = ["curves", "family_class"]

_SERIES = (*BASELINES, "missile")


def family_class(family: str) -> str:
    """The color class of a family; all others have one."""
    return f"p{_SERIES.index(family)}" if family in _SERIES else "p7"


def curves(cell: CellSummary) -> str:
    """LS tail (upwards, against solo, log) over BE rate (to the right): a point per setting, a line through a family's.

    Filled: every LS tenant met its objective in 99% of requests. "" where no point has both figures.
    """
    shown = {
        name: known
        for name, points in cell.points.items()
        if name in _SERIES and (known := [(p.be, p.p99.value, p) for p in points if p.be is not None and p.p99])
    }
    if not shown:
        return ""
    width, height = 330, 230
    every = [point for points in shown.values() for point in points]
    x = linear_axis(max(1.0, *(be for be, _, _ in every)) * 100, 44, width - 22, suffix="%")
    y = log_axis(0.9, max(tail for _, tail, _ in every) * 1.15, height - 40, 22, suffix="×")
    parts = [
        grid(x, y, x_label="BE rate, of solo", y_label="LS p99 / solo"),
        element("line", x1=x.start, x2=x.end, y1=y(1), y2=y(1), class_="solo"),
    ]
    for name, points in shown.items():
        class_ = family_class(name)
        if len(points) > 1:
            path = sorted((x(be * 100), y(tail)) for be, tail, _ in points)
            parts.append(polyline(path, class_=f"line thin {class_}"))
        for be, tail, point in points:
            parts.append(_dot(x(be * 100), y(tail), point, class_, name == "missile"))
    best = cell.best.get("missile")
    if best and best.p99 and best.be is not None:
        parts.append(text(x(best.be * 100), y(best.p99.value) - 9, "missile", anchor="middle", class_="name"))
    description = f"LS tail against BE rate in {cell.cell.name}, a point per setting; the tables have the numbers."
    return figure(width, height, *parts, description=description)


def _dot(x: float, y: float, point: Point, class_: str, large: bool) -> str:
    tail = three_digits(point.p99.value if point.p99 else None)
    tip = (
        f"{point.policy}: LS p99 {tail} × solo, BE {format_share(point.be)} of solo, "
        f"objective met {format_share(point.attainment)}"
    )
    met = point.attainment is not None and point.attainment >= ATTAINED
    return element(
        "circle",
        element("title", tip),
        cx=x,
        cy=y,
        r=5.5 if large else 4,
        class_=f"{'dot' if met else 'ring'} {class_}",
    )
