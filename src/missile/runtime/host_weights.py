"""Weights that wait in pinned memory: where on the device they are used, and in which parts they are copied there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from missile.gpu.interface import HostBuffer

__all__ = ["HostWeights", "Part", "joined"]

_GAP: Final = 512
"""Bytes between neighbours that are copied along: what buffers are aligned to."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [offset, offset + nbytes) of a model's weights, first read by its operation number `first`."""

    offset: int
    nbytes: int
    first: int


@dataclass(frozen=True, slots=True)
class HostWeights:
    """A tenant's weights in pinned memory, and where on the device they are used. The roster owns both.

    parts: what is copied as one, in order of first use.
    """

    image: HostBuffer
    address: int
    nbytes: int
    parts: tuple[Part, ...]

    def overlaps(self, other: HostWeights) -> bool:
        """Whether only one of them can be on the device."""
        return self.address < other.address + other.nbytes and other.address < self.address + self.nbytes


def joined(parts: Iterable[Part], *, at_least: int) -> tuple[Part, ...]:
    """`parts` in order of first use, joined where they are neighbours until one has `at_least` bytes.

    Gaps of alignment are copied along. Weights that lie in order of first use give long parts.
    """
    out: list[Part] = []
    for part in sorted(parts, key=lambda item: (item.first, item.offset)):
        if out:
            last = out[-1]
            gap = part.offset - (last.offset + last.nbytes)
            if last.nbytes < at_least and 0 <= gap < _GAP:
                out[-1] = Part(last.offset, last.nbytes + gap + part.nbytes, last.first)
                continue
        out.append(part)
    return tuple(out)
