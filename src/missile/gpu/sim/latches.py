"""Latches of the simulated GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from missile.errors import MisuseError
from missile.gpu.interface import Latch

if TYPE_CHECKING:
    from missile.gpu.sim.streams import SimStream

__all__ = ["Await", "Raise", "SimLatch", "own_latch"]


class SimLatch:
    """A number, and who waits for it to become how much. `Gpu.create_latch` makes it."""

    def __init__(self) -> None:
        self._value = 0
        self._waiters: list[tuple[int, Callable[[float], None]]] = []

    @property
    def address(self) -> int:
        return 0

    def reached(self, value: int) -> bool:
        return self._value >= value

    def when(self, value: int, waiter: Callable[[float], None]) -> None:
        self._waiters.append((value, waiter))

    def set(self, value: int, now: float) -> None:
        self._value = value
        due = [waiter for wanted, waiter in self._waiters if wanted <= value]
        self._waiters = [(wanted, waiter) for wanted, waiter in self._waiters if wanted > value]
        for waiter in due:
            waiter(now)

    def close(self) -> None:
        self._waiters.clear()


class Await:
    """Step of a stream: go on when the latch has been raised so far."""

    __slots__ = ("_latch", "_value")

    def __init__(self, latch: SimLatch, value: int) -> None:
        self._latch = latch
        self._value = value

    def begin(self, stream: SimStream, now: float) -> bool:
        if self._latch.reached(self._value):
            return True
        self._latch.when(self._value, stream.complete)
        return False


class Raise:
    """Step of a stream: raise the latch."""

    __slots__ = ("_latch", "_value")

    def __init__(self, latch: SimLatch, value: int) -> None:
        self._latch = latch
        self._value = value

    def begin(self, stream: SimStream, now: float) -> bool:
        stream.engine.timeline.changes += 1
        self._latch.set(self._value, now)
        return True


def own_latch(latch: Latch) -> SimLatch:
    """`latch`, if it is a simulated GPU's."""
    if not isinstance(latch, SimLatch):
        raise MisuseError("The latch belongs to another GPU.")
    return latch
