"""Which models' weights lie where in a fixed budget of device memory, and who has to go. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from missile.errors import MisuseError, OutOfMemoryError

__all__ = ["Extents", "Placed"]


@dataclass(slots=True)
class _Extent:
    name: str
    offset: int
    nbytes: int
    used_at: int
    users: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a model was placed, bytes from the start of the budget, and which models it has displaced."""

    offset: int
    evicted: tuple[str, ...]


class Extents:
    """A budget of `capacity` bytes in which whole models are placed, each in one extent aligned to `alignment`.

    Who has to go is the set that was used longest ago: of all places where a model could go, the one whose most recently
    used occupant is oldest. Extents with users are never displaced.
    """

    def __init__(self, capacity: int, *, alignment: int = 512) -> None:
        if capacity <= 0 or alignment <= 0:
            raise MisuseError(f"A swap budget of {capacity} bytes makes no sense.")
        self.capacity = capacity
        self._alignment = alignment
        self._clock = 0
        self._extents: list[_Extent] = []  # by offset
        self._last: dict[str, int] = {}  # where a model was before: its launches still fit there

    def __contains__(self, name: str) -> bool:
        return any(extent.name == name for extent in self._extents)

    def offset(self, name: str) -> int:
        return self._find(name).offset

    def resident(self) -> tuple[str, ...]:
        """Names, by offset."""
        return tuple(extent.name for extent in self._extents)

    def acquire(self, name: str) -> None:
        """The model is in use from now on, once more; it counts as just used."""
        extent = self._find(name)
        extent.users += 1
        extent.used_at = self._tick()

    def release(self, name: str) -> None:
        extent = self._find(name)
        if not extent.users:
            raise MisuseError(f"Model {name!r} was released more often than acquired.")
        extent.users -= 1
        extent.used_at = self._tick()

    def drop(self, name: str) -> None:
        """Forget a model that nobody uses; nothing when it is not there."""
        if name in self:
            extent = self._find(name)
            if extent.users:
                raise MisuseError(f"Model {name!r} is in use and can't be dropped.")
            self._extents.remove(extent)

    def place(self, name: str, nbytes: int) -> Placed:
        """Make room for a model that is not resident, displacing what must go. It has no user yet.

        MisuseError: it is resident, or larger than the whole budget. OutOfMemoryError: what is in use leaves no room;
        nothing has changed then.
        """
        if name in self:
            raise MisuseError(f"Model {name!r} is resident already.")
        if not 0 < nbytes <= self.capacity:
            raise MisuseError(
                f"Model {name!r} has {nbytes} bytes of weights and the swap budget is {self.capacity} bytes."
            )
        best: tuple[int, int, int, list[_Extent]] | None = None
        for offset in self._candidates(name):
            end = offset + nbytes
            if end > self.capacity:
                continue
            victims = [extent for extent in self._extents if extent.offset < end and offset < extent.end]
            if any(victim.users for victim in victims):
                continue
            newest = max((victim.used_at for victim in victims), default=-1)
            key = (newest, 0 if offset == self._last.get(name) else 1, sum(victim.nbytes for victim in victims))
            if best is None or key < best[:3]:
                best = (*key, victims)
                chosen = offset
        if best is None:
            busy = ", ".join(repr(extent.name) for extent in self._extents if extent.users)
            raise OutOfMemoryError(
                f"No room to swap in model {name!r} ({nbytes} bytes of {self.capacity}) while {busy} are in use.",
                requested=nbytes,
                tenant=name,
            )
        for victim in best[3]:
            self._extents.remove(victim)
        self._extents.append(_Extent(name, chosen, nbytes, self._tick()))
        self._extents.sort(key=lambda extent: extent.offset)
        self._last[name] = chosen
        return Placed(chosen, tuple(victim.name for victim in best[3]))

    def _candidates(self, name: str) -> Iterator[int]:
        """Every place worth trying: where it was, the start, each extent's place and each extent's end."""
        if name in self._last:
            yield self._last[name]
        yield 0
        for extent in self._extents:
            yield extent.offset
            yield -(-extent.end // self._alignment) * self._alignment

    def _find(self, name: str) -> _Extent:
        for extent in self._extents:
            if extent.name == name:
                return extent
        raise MisuseError(f"Model {name!r} is not resident; resident: {', '.join(self.resident()) or 'none'}.")

    def _tick(self) -> int:
        self._clock += 1
        return self._clock
