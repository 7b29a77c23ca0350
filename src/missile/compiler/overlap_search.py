"""The search for where each kernel of a model lets the next launch start. Pure: what a choice takes is asked of the caller.

Two ways, for two kinds of measurement. `descend` changes one kernel at a time and needs to see the difference that one
kernel makes: a model alone on the GPU. `sweep` takes the kernels in an order that is known already and asks only how many
of them should change: so it finds a choice beside a neighbour, where noise is larger than what one kernel makes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from missile.compiler.ptx.overlap import Dependents

__all__ = ["Choice", "Descent", "Swept", "by_gain", "descend", "sweep", "uniform"]

Choice = Mapping[str, Dependents]
Measure = Callable[[Choice], float]
PASSES = ((Dependents.START, Dependents.LATE), tuple(Dependents))  # what gains most first, should time run out


@dataclass(frozen=True, slots=True)
class Descent:
    """choice: what was found; ns: what it took when it was last measured. effects: what each change made of the time
    when it was first tried, as a ratio, by kernel and place. measured: how many times. complete: False where time ran out.
    """

    choice: dict[str, Dependents]
    ns: float
    uniform_ns: dict[Dependents, float]
    effects: dict[str, dict[Dependents, float]]
    measured: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Swept:
    """choice: the best of those tried; tried: how many kernels were changed, and what it took then."""

    choice: dict[str, Dependents]
    ns: float
    tried: dict[int, float]


def uniform(kernels: Sequence[str], place: Dependents) -> dict[str, Dependents]:
    """The same place in all of `kernels`."""
    return dict.fromkeys(kernels, place)


def descend(
    kernels: Sequence[str],
    measure: Measure,
    *,
    noise: float = 0.001,
    passes: Sequence[Collection[Dependents]] = PASSES,
    enough: Callable[[], bool] = lambda: False,
) -> Descent:
    """The place of each kernel, one by one, beginning with the best of those that all can have.

    kernels: in the order in which they are looked at; those first whose launches are most. measure: ns of a choice. noise: a
    change is kept if it gains more than this share. The choice so far is measured anew for every kernel, so that slow drift
    does not look like a gain. passes: what is tried for every kernel, one after another. enough:
    asked before each kernel; True ends the search with what there is.
    """
    count = 0

    def asked(choice: Choice) -> float:
        nonlocal count
        count += 1
        return measure(choice)

    start = {place: asked(uniform(kernels, place)) for place in Dependents}
    best = min(start, key=lambda place: start[place])
    choice, ns = uniform(kernels, best), start[best]
    effects: dict[str, dict[Dependents, float]] = {}
    for places in passes:
        for kernel in kernels:
            if enough():
                return Descent(choice, ns, start, effects, count, False)
            ns = asked(choice)
            found, found_ns = choice[kernel], ns * (1 - noise)
            for place in places:
                if place is choice[kernel]:
                    continue
                taken = asked({**choice, kernel: place})
                effects.setdefault(kernel, {}).setdefault(place, taken / ns)
                if taken < found_ns:
                    found, found_ns = place, taken
            if found is not choice[kernel]:
                choice[kernel], ns = found, found_ns
    return Descent(choice, ns, start, effects, count, True)


def sweep(
    base: Choice,
    order: Sequence[str],
    place: Dependents,
    measure: Measure,
    *,
    steps: int = 6,
    enough: Callable[[], bool] = lambda: False,
) -> Swept:
    """How many of `order`, from its first, should change from `base` to `place`: none, all, or one of `steps` - 1 between.

    Tried from both ends inwards, so that a search that ends early has seen both.
    """
    numbers = sorted({round(len(order) * step / steps) for step in range(steps + 1)})
    inwards = sorted(numbers, key=lambda number: -abs(number - len(order) / 2))
    tried: dict[int, float] = {}
    for number in inwards:
        if tried and enough():
            break
        tried[number] = measure(_changed(base, order[:number], place))
    best = min(tried, key=lambda number: tried[number])
    return Swept(_changed(base, order[:best], place), tried[best], tried)


def _changed(base: Choice, kernels: Sequence[str], place: Dependents) -> dict[str, Dependents]:
    return {**base, **dict.fromkeys(kernels, place)}


def by_gain(
    kernels: Sequence[str],
    base: Choice,
    place: Dependents,
    measure: Measure,
    *,
    enough: Callable[[], bool] = lambda: False,
) -> list[str]:
    """`kernels` by what each gains when it alone changes from `base` to `place`, the largest first: an order for `sweep`.

    The base is measured anew for every kernel. Those that `enough` leaves no time for come last, as they were.
    """
    ratios: dict[str, float] = {}
    for kernel in kernels:
        if enough():
            break
        before = measure(base)
        ratios[kernel] = measure(_changed(base, [kernel], place)) / before
    return sorted(kernels, key=lambda kernel: ratios.get(kernel, float("inf")))
