"""Tables of isolation results: for the terminal and, as Markdown, for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from missile.bench.isolation.results import IsolationResults, Outcome, outcomes

__all__ = ["Block", "blocks_of", "format_bytes", "render_isolation", "render_markdown", "title_of"]

LEGEND = (
    "x: the victim's median time over its median alone on the same colors. %: the aggressor's rate over its share, by "
    "slices, of what it moves alone on all colors."
)


@dataclass(frozen=True, slots=True)
class Block:
    """One table: a victim's working sets (rows) under every scheme (columns). title: who does what beside whom."""

    title: str
    schemes: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Outcome | None, ...]], ...]


def title_of(results: IsolationResults) -> str:
    """One line: which GPU, and whether it is a simulated one."""
    what = " (simulated)" if results.simulated else ""
    unfinished = ", unfinished" if results.interrupted else ""
    return f"Isolation on {results.gpu}{what}{unfinished}"


def blocks_of(results: IsolationResults) -> list[Block]:
    """The tables of a result, in the order of measuring."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes(results):
        if outcome.slowdown is not None:
            groups.setdefault(_title(outcome), []).append(outcome)
    return [_block(title, group) for title, group in groups.items()]


def _title(outcome: Outcome) -> str:
    victim = f"{outcome.victim_sms} SMs {_does(outcome.victim_access)}"
    aggressor = f"{outcome.aggressor_sms} SMs {_does(outcome.aggressor_access)}"
    return f"{victim}, beside {aggressor} {format_bytes(outcome.aggressor_bytes)}"


def _does(access: str) -> str:
    return {"read": "read", "read_write": "read and write", "write": "write"}[str(access)]


def _block(title: str, group: Sequence[Outcome]) -> Block:
    schemes = tuple(dict.fromkeys(outcome.scheme for outcome in group))
    place = {(outcome.victim_bytes, outcome.scheme): outcome for outcome in group}
    sizes = sorted({outcome.victim_bytes for outcome in group})
    rows = tuple((format_bytes(size), tuple(place.get((size, scheme)) for scheme in schemes)) for size in sizes)
    return Block(title, schemes, rows)


def format_bytes(nbytes: int) -> str:
    """`nbytes` as MiB or GiB."""
    return f"{nbytes >> 30} GiB" if nbytes >= 1 << 30 else f"{nbytes >> 20} MiB"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None or outcome.slowdown is None:
        return "-"
    kept = f" {outcome.aggressor_kept:.0%}" if outcome.aggressor_kept is not None else ""
    return f"x{outcome.slowdown:.2f}{kept}"


def render_isolation(results: IsolationResults) -> Group:
    """The terminal's tables."""
    tables = []
    for block in blocks_of(results):
        table = Table("set", *block.schemes, title=block.title, title_justify="left")
        for size, row in block.rows:
            table.add_row(size, *map(_cell, row))
        tables.append(table)
    return Group(Text(title_of(results)), *tables, Text(LEGEND))


def render_markdown(results: IsolationResults) -> str:
    """The same tables for a page."""
    lines = [f"# {title_of(results)}", "", LEGEND, ""]
    for block in blocks_of(results):
        lines += [f"**{block.title[:1].upper()}{block.title[1:]}**", ""]
        lines += _markdown_table(("set", *block.schemes), ((size, *map(_cell, row)) for size, row in block.rows))
        lines.append("")
    return "\n".join(lines)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
