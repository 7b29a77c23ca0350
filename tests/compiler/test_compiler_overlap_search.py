"""The search for places, on models of a chain whose best choice is known."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, product
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from missile.compiler.overlap_search import Choice, by_gain, descend, sweep, uniform
from missile.compiler.ptx.overlap import Dependents

START, LATE, NEVER = Dependents.START, Dependents.LATE, Dependents.NEVER
Costs = dict[str, dict[Dependents, float]]
costs = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.fixed_dictionaries({place: st.floats(1e3, 1e5) for place in Dependents}),
    min_size=1,
    max_size=6,
)


def chain(found: Costs, noise: float = 0.0, seed: int = 0) -> object:
    """Kernels that each make the next launch late by something that depends on their own place alone."""
    random = Random(seed)

    def measure(choice: Choice) -> float:
        return sum(own[choice[kernel]] for kernel, own in found.items()) * (1 + random.uniform(-noise, noise))

    return measure


@given(costs)
def test_a_chain_of_independent_kernels_gets_its_best_places(found: Costs) -> None:
    measure = chain(found)
    result = descend(list(found), measure, noise=0.0)  # type: ignore[arg-type]
    best = sum(min(own.values()) for own in found.values())
    assert abs(measure(result.choice) - best) <= 1e-9 * best  # type: ignore[operator]
    assert result.complete
    assert result.measured <= 3 + 2 * 3 * len(found)


@given(costs, st.floats(0.001, 0.05))
def test_nothing_is_changed_for_a_gain_within_the_noise(found: Costs, noise: float) -> None:
    """What the search leaves is no slower than the best uniform choice, nor is any kernel far from its best."""
    measure = chain(found)
    result = descend(list(found), measure, noise=noise)  # type: ignore[arg-type]
    assert result.choice.keys() == found.keys()
    assert measure(result.choice) <= min(result.uniform_ns.values()) * (1 + 1e-9)  # type: ignore[operator]
    best = sum(min(own.values()) for own in found.values())
    bound = best + noise * len(found) * min(result.uniform_ns.values())
    assert measure(result.choice) <= bound * (1 + 1e-9)  # type: ignore[operator]


def test_a_measurement_with_noise_below_the_bound_does_not_mislead() -> None:
    """Four kernels that gain by START, six that lose by it, by 1% of the time each; noise of 0.2%."""
    found = {f"k{i}": {START: 900.0 if i < 4 else 1100.0, LATE: 1000.0, NEVER: 1050.0} for i in range(10)}
    for seed in range(20):
        result = descend(list(found), chain(found, 0.002, seed), noise=0.005)  # type: ignore[arg-type]
        assert result.choice == {kernel: START if int(kernel[1:]) < 4 else LATE for kernel in found}


def test_kernels_that_act_on_each_other_end_where_no_single_change_helps() -> None:
    def measure(choice: Choice) -> float:
        alike = choice["a"] is choice["b"]
        return 1000.0 - 100.0 * (choice["a"] is START) + (0.0 if alike else 50.0)

    result = descend(["b", "a"], measure, noise=0.001)
    assert result.choice == {"a": START, "b": START}
    for kernel, place in product("ab", Dependents):
        assert measure({**result.choice, kernel: place}) >= measure(result.choice)


def test_a_search_without_time_left_has_the_best_uniform_choice() -> None:
    found = {"a": {START: 2.0, LATE: 3.0, NEVER: 1.0}, "b": {START: 2.0, LATE: 1.0, NEVER: 2.5}}
    result = descend(list(found), chain(found), enough=lambda: True)  # type: ignore[arg-type]
    assert not result.complete
    assert result.choice == uniform(list(found), NEVER)
    assert result.measured == 3


def test_effects_say_what_each_kernel_makes() -> None:
    found = {"a": {START: 50.0, LATE: 100.0, NEVER: 100.0}, "b": {START: 120.0, LATE: 100.0, NEVER: 100.0}}
    result = descend(["a", "b"], chain(found), noise=0.0)  # type: ignore[arg-type]
    assert result.uniform_ns == {START: 170.0, LATE: 200.0, NEVER: 200.0}
    assert result.effects["a"] == {LATE: 220 / 170, NEVER: 200 / 150}  # the second was tried when b had changed
    assert result.effects["b"] == {LATE: 150 / 170, START: 170 / 150, NEVER: 1.0}
    assert result.choice["a"] is START
    assert result.choice["b"] is not START


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 8))
def test_a_sweep_finds_how_many_as_finely_as_it_looks(count: int, best: int, steps: int) -> None:
    kernels = [f"k{index}" for index in range(count)]

    def measure(choice: Choice) -> float:
        return 100.0 + abs(sum(place is START for place in choice.values()) - best)

    swept = sweep(uniform(kernels, LATE), kernels, START, measure, steps=steps)
    changed = [kernel for kernel in kernels if swept.choice[kernel] is START]
    assert changed == kernels[: len(changed)]
    assert {0, count} <= swept.tried.keys()
    assert abs(len(changed) - min(best, count)) <= count / steps / 2 + 1
    assert swept.ns == min(swept.tried.values())


def test_a_sweep_that_must_end_early_has_seen_both_ends_first() -> None:
    asked: list[int] = []

    def measure(choice: Mapping[str, Dependents]) -> float:
        asked.append(sum(place is START for place in choice.values()))
        return float(len(asked))

    swept = sweep(uniform("abcdefgh", LATE), "abcdefgh", START, measure, enough=lambda: len(asked) >= 2)
    assert sorted(asked) == [0, 8]
    assert swept.ns == 1.0


@given(costs, st.integers(0, 6))
def test_an_order_by_gain_has_the_largest_first_and_ends_in_time(found: Costs, looked: int) -> None:
    left = [looked]

    def enough() -> bool:
        left[0] -= 1
        return left[0] < 0

    order = by_gain(list(found), uniform(list(found), LATE), START, chain(found), enough=enough)  # type: ignore[arg-type]
    assert sorted(order) == sorted(found)
    seen = [kernel for kernel in order if kernel in list(found)[:looked]]
    assert order[: len(seen)] == seen
    gains = [found[kernel][LATE] - found[kernel][START] for kernel in seen]
    assert all(gain >= after - 1e-3 for gain, after in pairwise(gains))
