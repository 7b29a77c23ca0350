"""Tables of isolation results: for the terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from missile.bench.isolation_results import IsolationResults, Outcome, outcomes

__all__ = ["micro_rows", "render_isolation", "title_of"]

MIB = 1 << 20
HEAD = ("colors", "victim", "working set", "beside", "slowdown", "aggressor GB/s", "of its share")


def title_of(results: IsolationResults) -> str:
    """One line: which GPU, and whether it is a simulated one."""
    what = " (simulated)" if results.simulated else ""
    unfinished = ", unfinished" if results.interrupted else ""
    return f"Isolation on {results.gpu}{what}{unfinished}"


def micro_rows(results: IsolationResults) -> list[tuple[str, ...]]:
    """One row a scheme, victim's access, split and aggressor, worst slowdown over the working sets beside the median."""
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for outcome in outcomes(results):
        if outcome.slowdown is not None:
            key = (
                outcome.victim_sms,
                outcome.aggressor_bytes,
                outcome.victim_access,
                outcome.aggressor_access,
                outcome.scheme,
            )
            groups.setdefault(key, []).append(outcome)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[Outcome]) -> tuple[str, ...]:
    first = group[0]
    return (
        first.scheme,
        f"{first.victim_sms} SMs {first.victim_access}",
        f"{_size(min(o.victim_bytes for o in group))}-{_size(max(o.victim_bytes for o in group))}",
        f"{first.aggressor_sms} SMs {first.aggressor_access} {_size(first.aggressor_bytes)}",
        _range(o.slowdown for o in group),
        _range((o.aggressor_rate / 1e9 for o in group), ".0f"),
        _range(o.aggressor_kept for o in group),
    )


def _size(nbytes: int) -> str:
    return f"{nbytes >> 30} GiB" if nbytes >= 1 << 30 else f"{nbytes // MIB} MiB"


def _range(values: Iterable[float | None], form: str = ".2f") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    least, most = format(min(known), form), format(max(known), form)
    return least if least == most else f"{least}-{most}"


def render_isolation(results: IsolationResults) -> Group:
    """The terminal's table."""
    table = Table(*HEAD, title=title_of(results))
    last = ""
    for row in micro_rows(results):
        beside = row[1] + row[3]
        if last and beside != last:
            table.add_section()
        last = beside
        table.add_row(*row)
    said = "Slowdown: the victim's median time over its median alone on the same colors, over all working sets."
    kept = "Of its share: the aggressor's rate over its share by slices of what it moves alone on all colors."
    return Group(table, Text(said), Text(kept))
