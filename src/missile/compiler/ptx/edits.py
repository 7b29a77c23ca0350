"""Changes to a text, made together: what is not changed stays as it was, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Edit", "apply", "lines"]


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace what stands from `start` to `end` by `text`."""

    start: int
    end: int
    text: str


def lines(code: Sequence[str]) -> str:
    """`code` to stand before an instruction."""
    return "".join(f"{line}\n\t" for line in code)


def apply(source: str, edits: Sequence[Edit], start: int = 0, end: int | None = None) -> str:
    """`source` from `start` to `end` with all edits made; those at one place in the order given."""
    out: list[str] = []
    position = start
    for edit in sorted(edits, key=lambda e: (e.start, e.end)):
        assert edit.start >= position, "edits overlap"
        out.append(source[position : edit.start])
        out.append(edit.text)
        position = edit.end
    out.append(source[position:end])
    return "".join(out)
