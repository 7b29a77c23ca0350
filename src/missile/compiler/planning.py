"""Where scratch buffers lie: buffers that are never alive together may share memory. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd

from missile.compiler.package import Buffer, BufferKind, KernelStep, ModelPackage, PointerArgument

__all__ = ["ALIGNMENT", "Placement", "alignments", "needed_bytes", "pack", "place_buffers", "plan_scratch"]

ALIGNMENT = 512  # bytes: one L2 granule, and what the widest vector access needs


@dataclass(frozen=True, slots=True)
class Placement:
    """offsets: where each buffer starts, bytes from the region's start. nbytes: the region's size."""

    offsets: Mapping[str, int]
    nbytes: int


def pack(buffers: Iterable[Buffer], *, alignment: int = ALIGNMENT) -> Placement:
    """One after another, each aligned: for buffers that all live at once."""
    offsets: dict[str, int] = {}
    end = 0
    for buffer in buffers:
        offsets[buffer.id] = end
        end += _aligned(buffer.nbytes, alignment)
    return Placement(offsets, end)


def place_buffers(package: ModelPackage) -> dict[BufferKind, Placement]:
    """Where each kind of a package's buffers lies in a region of its own, for the kinds that it has.

    Weights lie in order of first use, so that they can be brought in from the front while the plan runs.
    """
    places = {}
    for kind in BufferKind:
        members = [b for b in package.buffers if b.kind is kind]
        if kind is BufferKind.WEIGHT:
            members.sort(key=lambda b: b.first)
        if members:
            places[kind] = plan_scratch(members) if kind is BufferKind.SCRATCH else pack(members)
    return places


def needed_bytes(package: ModelPackage) -> int:
    """Memory for all buffers of `package`, bytes."""
    return sum(place.nbytes for place in place_buffers(package).values())


def plan_scratch(buffers: Iterable[Buffer], *, alignment: int = ALIGNMENT) -> Placement:
    """Place buffers by lifetime: two of them overlap in memory only if no step lies in both `first..last` ranges.

    Greedy by size (Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020): the largest
    first, each into the smallest gap between the buffers that are alive with it. Deterministic.
    """
    order = sorted(buffers, key=lambda b: (-b.nbytes, b.first, b.id))
    placed: list[tuple[int, int, Buffer]] = []  # (start, end, buffer), by start
    offsets: dict[str, int] = {}
    for buffer in order:
        size = _aligned(buffer.nbytes, alignment)
        best, best_gap, end = -1, -1, 0
        for start, stop, other in placed:
            if other.last < buffer.first or buffer.last < other.first:
                continue
            gap = start - end
            if gap >= size and (best < 0 or gap < best_gap):
                best, best_gap = end, gap
            end = max(end, stop)
        at = best if best >= 0 else end
        offsets[buffer.id] = at
        placed.append((at, at + size, buffer))
        placed.sort(key=lambda entry: entry[0])
    return Placement(offsets, max((stop for _, stop, _ in placed), default=0))


def alignments(package: ModelPackage) -> dict[str, tuple[int, ...]]:
    """Bytes that each argument of a kernel is a multiple of in all of its launches, by kernel; 1 for what is no pointer.

    Memory is allocated in multiples of `ALIGNMENT`, and buffers are placed in it so.
    """
    found: dict[str, tuple[int, ...]] = {}
    for step in package.steps:
        if isinstance(step, KernelStep):
            units = tuple(gcd(ALIGNMENT, a.offset) if isinstance(a, PointerArgument) else 1 for a in step.arguments)
            found[step.kernel] = tuple(map(min, units, found.get(step.kernel, units)))
    return found


def _aligned(nbytes: int, alignment: int) -> int:
    """The space a buffer takes; an empty one still gets an address of its own."""
    return max(1, -(-nbytes // alignment)) * alignment
