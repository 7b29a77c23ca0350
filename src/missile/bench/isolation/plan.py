"""What the isolation micro-benchmark measures: color sets of a victim and an aggressor, and the cells of the plan. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from missile.coloring.halves import find_halves
from missile.errors import MisuseError
from missile.gpu.interface import Access
from missile.probe.channel_map import ChannelMap

__all__ = ["FULL", "QUICK", "Cell", "MicroPlan", "Scheme", "cells_of", "chip_halves", "halves_of", "schemes_of"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Scheme:
    """Who has which colors of a channel map. name: for people, unique in a plan."""

    name: str
    victim: tuple[int, ...]
    aggressor: tuple[int, ...]

    @property
    def disjoint(self) -> bool:
        return not set(self.victim) & set(self.aggressor)


@dataclass(frozen=True, slots=True)
class MicroPlan:
    """working_sets: the victim's, bytes. aggressor_bytes: what the aggressor passes over. splits: the victim's share of the
    SMs; the aggressor has all others. The first split with the first of `aggressor_bytes` runs everything, the other
    splits and sizes only `few_sets`, read by the victim.
    """

    working_sets: tuple[int, ...]
    few_sets: tuple[int, ...] = ()
    victim_accesses: tuple[Access, ...] = (Access.READ, Access.READ_WRITE)
    aggressor_accesses: tuple[Access, ...] = tuple(Access)
    aggressor_bytes: tuple[int, ...] = (256 * MIB,)
    splits: tuple[float, ...] = (32 / 132,)
    repeats: int = 11

    def __post_init__(self) -> None:
        if not self.working_sets or min(*self.working_sets, *self.few_sets, *self.aggressor_bytes) < 4096:
            raise MisuseError("An isolation benchmark needs working sets of at least 4096 bytes.")
        if not self.splits or not all(0 < share < 1 for share in self.splits):
            raise MisuseError("The victim's share of the SMs lies between 0 and 1.")
        if self.repeats < 1:
            raise MisuseError("An isolation benchmark needs at least one repeat.")


FULL = MicroPlan(
    working_sets=tuple(mib * MIB for mib in (2, 8, 24, 48, 80, 256, 1024)),
    few_sets=tuple(mib * MIB for mib in (8, 48, 256)),
    aggressor_bytes=(256 * MIB, 16 * MIB),
    splits=(32 / 132, 16 / 132, 64 / 132),
)
QUICK = MicroPlan(
    working_sets=tuple(mib * MIB for mib in (2, 8, 24)),
    victim_accesses=(Access.READ,),
    aggressor_bytes=(64 * MIB,),
    repeats=5,
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement. aggressor_access None: the victim alone; victim_access None: the aggressor alone.

    victim_sms, aggressor_sms: SMs of each side. victim_bytes, aggressor_bytes: what each passes over, 0 for one not there.
    """

    scheme: str
    victim_sms: int
    aggressor_sms: int
    victim_bytes: int
    aggressor_bytes: int
    victim_access: Access | None
    aggressor_access: Access | None

    @property
    def victim_alone(self) -> Cell:
        """The cell that this one's slowdown is against."""
        return replace(self, aggressor_bytes=0, aggressor_access=None)

    @property
    def aggressor_alone(self) -> Cell:
        """The cell that says what the aggressor moves with the same colors when nobody else is there."""
        return replace(self, victim_bytes=0, victim_access=None)


def schemes_of(channel_map: ChannelMap) -> tuple[Scheme, ...]:
    """The color sets that are compared: all colors for both; halves, and both on the same half; the least shares.

    The halves are those that tenants get (`coloring.halves`); where every color stands in one half of the chip, the chip's
    halves are compared, too. MisuseError for a map with fewer than two colors: there is nothing to keep apart.
    """
    count = len(channel_map.colors)
    every = tuple(range(count))
    one, other = halves_of(channel_map)
    found = [
        Scheme("none", every, every),
        Scheme(f"{len(one)}/{count} + {len(other)}/{count}", one, other),
        Scheme(f"{len(other)}/{count} + {len(one)}/{count} swapped", other, one),
        Scheme(f"same {len(one)}/{count}", one, one),
    ]
    near = chip_halves(channel_map)
    if near is not None and near[0] != one:
        found += [
            Scheme(f"{len(near[0])}/{count} + {len(near[1])}/{count} by side", *near),
            Scheme(f"{len(near[1])}/{count} + {len(near[0])}/{count} by side, swapped", near[1], near[0]),
        ]
    for few in (1, 2):
        if 2 * few < count:
            found += [Scheme(f"{few}/{count} + {count - few}/{count}", every[:few], every[few:])]
    return tuple(found)


def halves_of(channel_map: ChannelMap) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The two halves of all colors that two tenants get. MisuseError for a map with one color only."""
    halves = find_halves(channel_map)
    if halves is None:
        raise MisuseError("This channel map has one color: there are no disjoint sets of colors to compare.")
    return halves.sets


def chip_halves(channel_map: ChannelMap) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Colors by the half of the chip that they stand in, color 0 in the first; None where one is in both, or all in one."""
    half = channel_map.topology.slice_half
    sides = [{half[slice_] for slice_ in color} for color in channel_map.colors]
    if any(len(side) != 1 or -1 in side for side in sides):
        return None
    first = tuple(color for color, side in enumerate(sides) if side == sides[0])
    rest = tuple(color for color in range(len(sides)) if color not in first)
    return (first, rest) if rest else None


def cells_of(plan: MicroPlan, schemes: Sequence[Scheme], sms: int) -> Iterator[Cell]:
    """Every measurement of `plan` on a GPU of `sms` SMs.

    All schemes of one working set stand beside each other: what drifts, drifts for all of them.
    """
    for number, share in enumerate(plan.splits):
        ours = min(max(round(share * sms), 1), sms - 1)
        theirs = sms - ours
        for place, other in enumerate(plan.aggressor_bytes):
            whole = number == place == 0
            accesses = plan.victim_accesses if whole else plan.victim_accesses[:1]
            if number and place:
                continue
            for scheme in schemes:
                for access in plan.aggressor_accesses:
                    yield Cell(scheme.name, ours, theirs, 0, other, None, access)
            for nbytes in plan.working_sets if whole else plan.few_sets:
                for mine in accesses:
                    for scheme in schemes:
                        if place == 0:
                            yield Cell(scheme.name, ours, theirs, nbytes, 0, mine, None)
                        for access in plan.aggressor_accesses:
                            yield Cell(scheme.name, ours, theirs, nbytes, other, mine, access)
