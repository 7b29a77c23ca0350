"""Colored memory for tenants: a pool of pages, classified against the channel map and shared out by sets of colors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from missile.coloring.pool import ColoredPool, TenantMemory
from missile.coloring.shape import Form
from missile.coloring.shares import Demand, Share, plan_shares
from missile.errors import MisuseError, OutOfMemoryError
from missile.gpu.interface import Gpu
from missile.probe.channel_map import ChannelMap

__all__ = ["ColoredTenants", "Coloring", "rounds"]

_ATTEMPTS = 4  # to guess how many pages are enough


@dataclass(frozen=True, slots=True, eq=False)
class Coloring:
    """Which colors the tenants' memory has.

    channel_map: of the GPU that they run on (`missile.probe.map_for` has one in about a second where it was probed before).
    sets: colors by tenant. Two tenants have the same set, and then pages of their own, or sets without a common color. A
    tenant that is not named has plain memory, in all colors. form: of translation; None for what `plan_shares` takes.
    """

    channel_map: ChannelMap
    sets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    form: Form | None = None

    def check(self, tenants: Iterable[str], gpu: Gpu) -> None:
        """MisuseError for a map of another GPU, a set of a tenant that is not there, and sets that overlap."""
        self.channel_map.check(gpu.info)
        known = list(tenants)
        for name in self.sets:
            if name not in known:
                raise MisuseError(f"There are colors for tenant {name!r}; the tenants are {', '.join(known)}.")
        rounds([Demand(name, tuple(colors), 1) for name, colors in self.sets.items()])


def rounds(demands: Sequence[Demand]) -> list[list[Demand]]:
    """Demands in groups of disjoint sets: those of one group can have the same pages, those of different groups can't.

    The largest of each set come first together, so that little of a page is left over. MisuseError for sets that overlap
    without being the same.
    """
    by_set: dict[tuple[int, ...], list[Demand]] = {}
    owner: dict[int, Demand] = {}
    for demand in demands:
        colors = tuple(sorted(demand.colors))
        for color in colors:
            other = owner.setdefault(color, demand)
            if tuple(sorted(other.colors)) != colors:
                raise MisuseError(
                    f"Tenants {other.tenant!r} and {demand.tenant!r} both have color {color}, but not the same set of "
                    f"colors; sets are the same or have nothing in common."
                )
        by_set.setdefault(colors, []).append(demand)
    queues = [sorted(group, key=lambda d: -d.nbytes) for group in by_set.values()]
    most = max(map(len, queues), default=0)
    return [[queue[turn] for queue in queues if turn < len(queue)] for turn in range(most)]


class ColoredTenants:
    """A pool on `gpu` and the memory of every tenant that fits. Owns both until `close`; models in it are closed before.

    memories: by tenant. errors: why a tenant has none. seconds are the caller's to measure: making it takes about 0.3 s for
    1000 pages on an H200, of which classifying is most.
    """

    def __init__(
        self, gpu: Gpu, coloring: Coloring, demands: Sequence[Demand], quotas: Mapping[str, int] | None = None
    ) -> None:
        """demands: what each tenant needs, in the colors of its set. quotas: bytes that a tenant may hold at most.

        MisuseError for sets that overlap; UnsupportedError where the form asked for does not fit the map.
        """
        self.memories: dict[str, TenantMemory] = {}
        self.errors: dict[str, OutOfMemoryError] = {}
        self._gpu, self._coloring = gpu, coloring
        self._pool: ColoredPool | None = None
        self._constants = np.empty((0, 3), np.int64)
        try:
            for group in rounds(demands):
                self._attach(self._shares(group), quotas or {})
        except BaseException:
            self.close()
            raise

    @property
    def pages(self) -> int:
        return 0 if self._pool is None else self._pool.page_count

    def close(self) -> None:
        """Give all memory back. Idempotent. The caller has made sure that no work uses it."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.close()

    def __enter__(self) -> ColoredTenants:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _attach(self, shares: Sequence[Share], quotas: Mapping[str, int]) -> None:
        for share in shares:
            assert self._pool is not None  # it has the pages of the share
            self.memories[share.tenant] = self._pool.attach(share, quota=quotas.get(share.tenant))

    def _shares(self, group: Sequence[Demand]) -> tuple[Share, ...]:
        """Shares in pages that no other group has; tenants that don't fit are left out."""
        first = self.pages
        wanted = max(self._pages_for(demand, demand.nbytes) for demand in group) + 1
        left = list(group)
        for attempt in range(_ATTEMPTS):
            if not left:
                return ()
            missing = self._grow(first + wanted)
            try:
                return self._plan(left, first)
            except OutOfMemoryError as error:
                short = next(demand for demand in left if demand.tenant == error.tenant)
                if missing is not None or attempt == _ATTEMPTS - 1:
                    self.errors[short.tenant] = missing or error
                    left.remove(short)
                wanted += self._pages_for(short, max(error.requested - error.available, 1)) + 1
        return self._plan(left, first) if left else ()

    def _plan(self, group: Sequence[Demand], first: int) -> tuple[Share, ...]:
        constants = self._constants.copy()
        constants[:first] = -1  # pages of other groups
        return plan_shares(self._coloring.channel_map, constants, group, form=self._coloring.form)

    def _grow(self, count: int) -> OutOfMemoryError | None:
        """Have `count` pages, classified; or why the GPU has no more."""
        fresh = count - self.pages
        if fresh <= 0:
            return None
        try:
            if self._pool is None:
                self._pool = ColoredPool(self._gpu, count)
            else:
                self._pool.grow(fresh)
        except OutOfMemoryError as error:
            return error
        measured = self._coloring.channel_map.classify(self._gpu, self._pool.addresses[-fresh:])
        self._constants = np.concatenate([self._constants, measured])
        return None

    def _pages_for(self, demand: Demand, nbytes: int) -> int:
        """Pages that hold `nbytes` in the demand's colors, if pages are as the map has them on average."""
        channel_map = self._coloring.channel_map
        slices = sum(len(channel_map.colors[color]) for color in demand.colors if color < len(channel_map.colors))
        return -(-nbytes * channel_map.slices // (channel_map.page_bytes * max(slices, 1)))
