"""What is known of values where an access is made: its condition holds there, so `column < 14`.

A convolution reads pixels of a row above and below, and copies nothing where there is none. Its arithmetic wraps for pixels
that are not there, so only the condition says that it doesn't.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from missile.compiler.ptx.sums import Sum, Values, signed

__all__ = ["Fact", "Facts", "facts_of"]

_HIGHEST = 1 << 14  # limits


@dataclass(frozen=True, slots=True)
class Fact:
    """`given`, unsigned, is less than `limit`."""

    given: Sum
    limit: int


def facts_of(values: Values, conditions: Iterable[Sum]) -> list[Fact]:
    """What follows from all of `conditions` not being zero: predicates, or sizes that a predicate sets to zero."""
    found: list[Fact] = []
    pending = list(conditions)
    while pending:
        condition = pending.pop()
        if len(condition.terms) != 1 or condition.constant or condition.terms[0][1] != 1:
            continue
        match values.keys[condition.terms[0][0]]:
            case ("selp", Sum() as then, Sum(terms=(), constant=0), Sum() as chosen):
                pending += [then, chosen]
            case ("and.pred", Sum() as left, Sum() as right):
                pending += [left, right]
            case ("setp.lt.u16" | "setp.lt.u32", Sum() as left, Sum(terms=(), constant=limit)):
                found += [Fact(part, limit) for part in _parts(values, left) if _is_near(part, limit)]
    return found


def _parts(values: Values, largest: Sum) -> Iterable[Sum]:
    """What a maximum is of."""
    if len(largest.terms) == 1 and not largest.constant and largest.terms[0][1] == 1:
        match values.keys[largest.terms[0][0]]:
            case ("max.u16" | "max.u32", Sum() as left, Sum() as right):
                yield from _parts(values, left)
                yield from _parts(values, right)
                return
            case ("bits", Sum(width=width) as inner, 0, ones) if ones == (1 << width) - 1:
                largest = values.cut(inner, width)
    yield largest


def _is_near(given: Sum, limit: int) -> bool:
    if not given.terms or given.width < 8:
        return False
    return abs(given.signed) < _far(given.width) and limit <= min(_HIGHEST, 1 << given.width - 2)


def _far(width: int) -> int:
    """Constants that are added to what is compared are less."""
    return min(1 << 12, 1 << width - 4)


class Facts:
    """Sign extensions that facts allow."""

    def __init__(self, values: Values, facts: Iterable[Fact] = ()) -> None:
        self._values = values
        self._facts = list(facts)

    def extend(self, given: Sum, width: int) -> Sum | None:
        """The sum in `width` bits with its sign; None where facts don't say that it does not wrap.

        With `F = T + c < K` for the facts, `given` is a sum of multiples of some F and of what is known to be small. If the
        access is made, each T, read with its sign, lies between -c and K - c. Then the sum of the multiples of T and of the
        constants does not wrap here, nor does it in any other iteration, whose constants are as small (`_far`).
        """
        rest, out, most = given, Sum(width, 0), 0
        used = []
        facts = [fact for fact in self._facts if fact.given.width == given.width]
        for fact in facts:
            factor = _times(fact.given, rest, [other.given for other in facts if other is not fact])
            if factor < 1:
                continue
            used.append(fact)
            rest = rest.plus(fact.given, -factor)
            core = Sum(given.width, 0, fact.given.terms)
            extended = self._values.extend(core, width, True)
            out = out.plus(extended.plus(Sum.of(width, fact.given.signed)).times(factor))
            most += factor * (fact.limit + 2 * _far(given.width))
        small = Sum(given.width, 0, rest.terms)
        if not used or most + self._values.most(small) + abs(rest.signed) >= 1 << (given.width - 1):
            return None
        out = out.plus(Sum(width, 0, rest.terms)).plus(Sum.of(width, rest.signed))
        if len(used) == 1 and given == used[0].given and Fact(out, used[0].limit) not in self._facts:
            self._facts.append(Fact(out, used[0].limit))
        return out


def _times(part: Sum, given: Sum, others: Iterable[Sum]) -> int:
    """How many times `part` is in `given`, by a value that is in none of the `others` if there is one; 0 where that is no
    whole number."""
    elsewhere = {value for other in others for value, _ in other.terms}
    value, times = min(part.terms, key=lambda term: term[0] in elsewhere)
    inside = signed(dict(given.terms).get(value, 0), given.width)
    factor = signed(times, given.width)
    return inside // factor if inside % factor == 0 else 0
