"""Integers of a kernel as sums of values that are not known: `4 * row + 2 * column + 96`, by what they wrap at.

Two sums over the same values differ by a constant, whatever the values are. That is what an address in a loop is asked for.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

__all__ = ["Sum", "Values", "signed"]


@dataclass(frozen=True, slots=True)
class Sum:
    """`constant` and `terms`, modulo 2**width. terms: pairs of a value's number in `Values` and its factor, by number."""

    width: int
    constant: int
    terms: tuple[tuple[int, int], ...] = ()

    @property
    def known(self) -> int | None:
        """The number, unsigned, where nothing is unknown."""
        return None if self.terms else self.constant

    @property
    def signed(self) -> int:
        """The constant, read with its sign."""
        return signed(self.constant, self.width)

    def plus(self, other: Sum, factor: int = 1) -> Sum:
        """`self + factor * other`, of one width."""
        terms = dict(self.terms)
        for value, times in other.terms:
            terms[value] = terms.get(value, 0) + factor * times
        return Sum.of(self.width, self.constant + factor * other.constant, terms.items())

    def times(self, factor: int) -> Sum:
        return Sum.of(self.width, self.constant * factor, ((value, times * factor) for value, times in self.terms))

    def cut(self, width: int) -> Sum:
        """The lowest `width` bits, of no more than there are."""
        return Sum.of(width, self.constant, self.terms)

    @classmethod
    def of(cls, width: int, constant: int, terms: Iterable[tuple[int, int]] = ()) -> Sum:
        mask = (1 << width) - 1
        kept = tuple(sorted((value, times & mask) for value, times in terms if times & mask))
        return cls(width, constant & mask, kept)


@dataclass(slots=True)
class Values:
    """Values that are not known, numbered; the same key has the same number.

    ones: for each the bits that may be set, of those that it has.
    """

    ones: list[int] = field(default_factory=list)
    keys: list[Hashable] = field(default_factory=list)
    _numbers: dict[Hashable, int] = field(default_factory=dict)

    def number(self, key: Hashable, ones: int) -> int:
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.ones)
            self.ones.append(ones)
            self.keys.append(key)
        return found

    def value(self, key: Hashable, width: int, ones: int | None = None) -> Sum:
        """A value of its own. ones: bits that may be set, all where nothing is known."""
        mask = (1 << width) - 1
        return Sum(width, 0, ((self.number(key, mask if ones is None else ones & mask), 1),))

    def fresh(self, width: int) -> Sum:
        """A value that is like no other."""
        return self.value(("fresh", len(self.ones)), width)

    def most(self, given: Sum) -> int:
        """The largest that the sum can be without wrapping, taking factors for positive; larger than the width allows
        where it may wrap."""
        return given.constant + sum(self.ones[value] * times for value, times in given.terms)

    def bits(self, given: Sum) -> int:
        """Bits of the sum that may be set."""
        mask = (1 << given.width) - 1
        out = given.constant
        for part in (self._scaled(value, times) & mask for value, times in given.terms):
            if out & part:  # bits may be carried, from the lowest that both have up to what the sum can be
                low = out & part
                out |= part | (((1 << (out + part).bit_length()) - 1) & -(low & -low))
            else:
                out |= part
        return out & mask

    def _scaled(self, value: int, times: int) -> int:
        """Bits that a term may have."""
        ones = self.ones[value]
        if times & (times - 1) == 0:
            return ones * times
        low = (ones & -ones) * (times & -times)  # both have zeros below
        return ((1 << (ones * times).bit_length()) - 1) & -low if ones else 0

    def extend(self, given: Sum, width: int, signed: bool) -> Sum:
        """The sum in `width` bits. What may wrap, or be negative where it is signed, becomes a value of its own."""
        limit = given.width - (1 if signed else 0)
        if width == given.width:
            return given
        if not given.terms:
            constant = given.constant
            if signed and constant >> (given.width - 1):
                constant -= 1 << given.width
            return Sum.of(width, constant)
        if self.most(given) < 1 << limit:
            return Sum(width, given.constant, given.terms)
        low, high = self._split(given)
        above = (1 << width) - (1 << given.width) if signed else 0
        key = ("sext", high, width) if signed else ("zext", high)
        found = self.value(key, width, self.bits(high) | above)
        return found.plus(Sum(width, low.constant, low.terms))

    def cut(self, given: Sum, width: int) -> Sum:
        """The lowest `width` bits, of no more than there are."""
        out = given.cut(width)
        for value, times in out.terms:
            match self.keys[value]:
                case ("zext" | "sext", Sum() as inner, *_) if inner.width >= width:
                    out = out.plus(Sum(width, 0, ((value, 1),)), -times).plus(inner.cut(width), times)
                case ("sext", Sum() as inner, int() as wider) if wider > width:
                    extended = self.extend(inner, width, True)
                    out = out.plus(Sum(width, 0, ((value, 1),)), -times).plus(extended, times)
        return out

    def masked(self, given: Sum, mask: int) -> Sum:
        """The bits of the sum that are in `mask`."""
        bits = self.bits(given)
        if bits & mask == bits:
            return given
        low, high = self._split(given, mask.bit_length())
        below = self.bits(low)
        if not below & mask:
            low = Sum(given.width, 0)
        elif below & mask != below:
            low, high = Sum(given.width, 0), given
        above = self.bits(high)
        if above & mask == above:
            return low.plus(high)
        # What all terms are multiples of stands outside, so that shifts before and behind are alike.
        shift = min((_zeros(times) for _, times in high.terms), default=0)
        shift = min(shift, _zeros(high.constant)) if high.constant else shift
        inner = Sum.of(given.width, high.constant >> shift, ((value, times >> shift) for value, times in high.terms))
        ones = self.bits(inner) & mask >> shift
        inner = inner.cut(ones.bit_length())
        if not inner.terms:
            return low.plus(Sum.of(given.width, inner.constant & ones).times(1 << shift))
        return low.plus(self._bits(inner, ones, given.width).times(1 << shift))

    def _bits(self, inner: Sum, ones: int, width: int) -> Sum:
        """The bits `ones` of `inner`, which has no more, in `width` bits; bits of bits are those of what they are of."""
        place, below = _zeros(ones), 0
        if len(inner.terms) == 1 and inner.terms[0][1] == 1 and not inner.constant:
            match self.keys[inner.terms[0][0]]:
                case ("bits", Sum() as whole, int() as below, int()):
                    inner = whole.cut(below + ones.bit_length())
        key = ("bits", inner, below + place, ones >> place)
        return self.value(key, width, ones >> place).times(1 << place)

    def shifted(self, given: Sum, count: int) -> Sum | None:
        """The sum without its lowest `count` bits, shifted; None where it can't be said."""
        kept = self.masked(given, (1 << given.width) - (1 << count))
        if any(times & (1 << count) - 1 for _, times in kept.terms) or kept.constant & (1 << count) - 1:
            return None
        if self.most(kept) >= 1 << given.width:
            return None
        return Sum(given.width, kept.constant >> count, tuple((v, times >> count) for v, times in kept.terms))

    def _split(self, given: Sum, other: int = 0) -> tuple[Sum, Sum]:
        """The sum as two without a carry between: what lies below some bit, and multiples of it. So neither the sign nor
        whether the sum wraps depends on the first. other: a bit to be tried beside those where terms begin."""
        kept = Sum(given.width, 0)
        cuts = {_zeros(self._scaled(value, times)) for value, times in given.terms} | {other}
        for cut in sorted(cuts, reverse=True):
            limit = 1 << cut
            terms = [(value, times) for value, times in given.terms if _zeros(self._scaled(value, times)) < cut]
            low = Sum(given.width, given.constant & (limit - 1), tuple(terms))
            if cut < given.width and self.most(low) < limit:
                kept = low
                break
        return kept, given.plus(kept, -1)


def signed(number: int, width: int) -> int:
    """`number` of `width` bits, read with its sign."""
    return number - (1 << width) if number >> (width - 1) else number


def _zeros(bits: int) -> int:
    """Below the lowest bit."""
    return (bits & -bits).bit_length() - 1 if bits else 0
