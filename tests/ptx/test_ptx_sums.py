"""Sums of unknown values say what arithmetic of the same widths gives, whatever the values are."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from missile.compiler.ptx.sums import Sum, Values, signed


class Known:
    """Values, and numbers for them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.values = Values()
        self._numbers: dict[int, int] = {}

    def any(self, width: int) -> Sum:
        """A sum of few values with few bits, and a constant."""
        terms = []
        for _ in range(self.random.randrange(4)):
            ones = self.random.choice((7, 31, 248, 4080, (1 << width) - 1, -512, -16)) & ((1 << width) - 1)
            name = self.values.number(("given", self.random.randrange(5), ones), ones)
            terms.append((name, self.random.choice((1, 2, 16, 48, 256, 768, 1 << width - 4, -1))))
        constant = self.random.choice((0, 3, 16, 128, 1 << width - 1, -1, -7168))
        total = Sum.of(width, constant)
        for name, times in terms:
            total = total.plus(Sum.of(width, 0, [(name, times)]))
        return total

    def number(self, given: Sum) -> int:
        return (given.constant + sum(self._value(v) * times for v, times in given.terms)) % (1 << given.width)

    def _value(self, value: int) -> int:
        if value not in self._numbers:
            match self.values.keys[value]:
                case ("given", *_):
                    number = self.random.getrandbits(64) & self.values.ones[value]
                case ("zext", Sum() as inner):
                    number = self.number(inner)
                case ("sext", Sum() as inner, width):
                    number = signed(self.number(inner), inner.width) % (1 << width)
                case ("bits", Sum() as inner, place, ones):
                    number = self.number(inner) >> place & ones
                case key:
                    raise AssertionError(key)
            assert number & ~self.values.ones[value] == 0
            self._numbers[value] = number
        return self._numbers[value]


@given(st.integers(0, 1 << 32), st.sampled_from((16, 32)))
def test_sums_are_what_they_say(seed: int, width: int) -> None:
    known = Known(seed)
    values, (left, right) = known.values, (known.any(width) for _ in range(2))
    number = known.number
    assert number(left.plus(right, -3)) == (number(left) - 3 * number(right)) % (1 << width)
    assert number(left) & ~values.bits(left) == 0
    assert values.most(left) >= number(left)
    for wider in (32, 64):
        assert number(values.extend(left, wider, False)) == number(left)
        assert number(values.extend(left, wider, True)) == signed(number(left), width) % (1 << wider)
        assert number(values.cut(values.extend(left, wider, bool(seed % 2)), width)) == number(left)
    mask = known.random.choice((255, 0xFF00, 0xFFF0, 1 << 5, known.random.getrandbits(width)))
    assert number(values.masked(left, mask)) == number(left) & mask
    count = known.random.randrange(1, width)
    shifted = values.shifted(left, count)
    assert shifted is None or number(shifted) == number(left) >> count
    assert number(values.cut(left, 8)) == number(left) % 256


def test_the_same_bits_are_one_value() -> None:
    values = Values()
    row, column = values.value("row", 32).times(1024), values.value("column", 32, 248)
    assert values.extend(row.plus(column), 64, True) == values.extend(row, 64, True).plus(
        values.extend(column, 64, False)
    )
    assert values.masked(row.plus(column), -1024 % (1 << 32)) == row
    thread = values.value("thread", 32, 1023)
    field = values.shifted(values.masked(thread, 32), 5)
    assert field is not None
    assert field == values.masked(values.shifted(thread, 5) or field, 1)
    assert values.masked(thread.times(8), 0xF8) == values.masked(thread, 31).times(8)
