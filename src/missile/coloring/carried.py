"""Bits that a launch carries: what the pair form's table says of the buffers that the launch is given, in its parameters.

A table in global memory costs each kernel a trip to L2, since no kernel before has left it in an L1 cache. Parameters are
at hand when a kernel starts, by lines of 64 bytes, each of which takes a while when it is first touched. So behind the
tenant's constants there is a short header for each buffer, and then come words of bits, the fewest first. That layout is
written down here once for both sides: the code that reads them and the host that fills them in.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from missile.coloring.shape import LOGICAL_BASE, WINDOW_ENTRIES, Field, Form, Shape
from missile.coloring.translation import PairTranslation, packed
from missile.errors import InternalError

__all__ = ["GRANULE", "MOST_BYTES", "Carried", "Range", "Slot", "plan_carried", "range_of"]

GRANULE = 512
"""Ranges start and end at multiples of so many bytes, as buffers do."""

MOST_BYTES = 24 << 10
"""Of a launch's constants: GPUs since Volta take 32,764 bytes of parameters, the kernel's own among them."""

_FINE_BYTES = 4 << 10  # with a bit for each piece as well; larger ones have one for each two pieces only
_HEADER = struct.Struct("<IIQ")


@dataclass(frozen=True, slots=True)
class Range:
    """Logical memory that an argument points into: `nbytes` from `address` on, both multiples of `GRANULE`."""

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a launch's constants have what is known of one of its buffers; all offsets in bytes from the constants' start.

    argument: the kernel's parameter that points into it, by index. nbytes: of the longest that a launch is given. header:
    where the range starts that bits are carried of, `Shape.head_bytes` before the buffer, so that windows can begin there:
    its logical address's lower half (u32), how far the buffer reaches from there (u32), its physical address (u64).
    words: of bits from there on, by how many bytes a bit stands for; count: words of each.
    """

    argument: int
    nbytes: int
    header: int
    words: tuple[tuple[int, int], ...]
    count: tuple[int, ...]

    BASE, LIMIT, PHYSICAL = 0, 4, 8

    def at(self, unit: int) -> int | None:
        """Offset of the words whose bits stand for `unit` bytes; None where there are none."""
        return dict(self.words).get(unit)


@dataclass(frozen=True, slots=True)
class Carried:
    """What every launch of a kernel carries. nbytes: of its constants, the tenant's own among them, which come first."""

    slots: tuple[Slot, ...]
    nbytes: int

    def constants(self, own: bytes, translation: PairTranslation, base: int, ranges: Sequence[Range]) -> bytes:
        """The constants of one launch. own: the tenant's (`Field.BYTES`). base: address of the tenant's range of physical
        memory. ranges: of each slot in order, in memory of the tenant, none longer than was planned.
        """
        out = bytearray(self.nbytes)
        out[: Field.BYTES] = own
        head = translation.shape.head_bytes
        for slot, given in zip(self.slots, ranges, strict=True):
            start, end = given.address - LOGICAL_BASE - head, given.address - LOGICAL_BASE + given.nbytes
            if start < 0 or end > translation.logical_bytes or (start | end) % GRANULE or given.nbytes > slot.nbytes:
                raise InternalError("A launch carries bits of a range that is not its tenant's.")
            logical = LOGICAL_BASE + start & 0xFFFF_FFFF
            _HEADER.pack_into(out, slot.header, logical, end - start, base + 2 * start)
            for (unit, at), count in zip(slot.words, slot.count, strict=True):
                first, step = start // translation.shape.unit_bytes, unit // translation.shape.unit_bytes
                bits = translation.choices[first : first + 32 * count * step : step]
                words = packed(bits).astype("<u4").tobytes()
                out[at : at + len(words)] = words
        return bytes(out)


def plan_carried(shape: Shape, longest: Sequence[int], most: int = MOST_BYTES) -> Carried | None:
    """Where launches of a kernel carry bits of what they are given, at most `most` bytes; None where they can't, or have no
    use for it. longest: bytes of the longest range that each argument points into, a multiple of `GRANULE`; 0: no pointer.

    Where not all fit, the longest are left out.
    """
    if shape.form is not Form.PAIR or not shape.window_units:
        return None
    fine, coarse = shape.window_units, shape.window_units[-1:]
    order = sorted((nbytes, index) for index, nbytes in enumerate(longest) if nbytes)
    while order:
        arguments = sorted(index for _, index in order)
        for units, limit in ((fine, min(_FINE_BYTES, most)), (coarse, most)):
            found = _lay_out(shape, {index: longest[index] for index in arguments}, units)
            if found.nbytes <= limit:
                return found
        order.pop()
    return None


def _lay_out(shape: Shape, longest: dict[int, int], units: Sequence[int]) -> Carried:
    end = Field.BYTES + _HEADER.size * len(longest)
    places: dict[int, list[tuple[int, int, int]]] = {}
    for argument, nbytes in sorted(longest.items(), key=lambda entry: entry[1]):
        for unit in units:
            # A window that begins with the last byte has its last bits in the word behind that of its first.
            count = (shape.head_bytes + nbytes) // (WINDOW_ENTRIES * unit) + 2
            places.setdefault(argument, []).append((unit, end, count))
            end += 4 * count
    slots = []
    for number, (argument, nbytes) in enumerate(longest.items()):
        words = tuple((unit, at) for unit, at, _ in places[argument])
        counts = tuple(count for *_, count in places[argument])
        slots.append(Slot(argument, nbytes, Field.BYTES + _HEADER.size * number, words, counts))
    return Carried(tuple(slots), -(-end // 8) * 8)


def range_of(address: int, end: int) -> Range:
    """The range from `address`, which lies in a buffer that ends at `end`, to there, cut at multiples of `GRANULE`."""
    start = address // GRANULE * GRANULE
    return Range(start, -(-(end - start) // GRANULE) * GRANULE)
