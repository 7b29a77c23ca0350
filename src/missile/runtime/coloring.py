"""Colored memory for tenants: a pool of pages, classified against the channel map and shared out by sets of colors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

import numpy as np

from missile.coloring.pool import ColoredPool, TenantMemory
from missile.coloring.shape import Escape, Form
from missile.coloring.shares import Demand, Share, plan_shares
from missile.errors import MisuseError, OutOfMemoryError
from missile.gpu.interface import Gpu
from missile.probe.channel_map import ChannelMap

__all__ = ["ColoredTenants", "Coloring"]

_ATTEMPTS = 4  # to guess how many pages are enough


@dataclass(frozen=True, slots=True, eq=False)
class Coloring:
    """Which colors the tenants' memory has.

    channel_map: of the GPU that they run on (`missile.probe.map_for` has one in about a second where it was probed before).
    sets: colors by tenant; those of two tenants are the same, or have none in common. A tenant that is not named has plain
    memory, in all colors. form: of translation; None for what `plan_shares` takes. escape: what becomes of an access
    outside a tenant's memory; counting takes wider code, which is slower.
    """

    channel_map: ChannelMap
    sets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    form: Form | None = None
    escape: Escape = Escape.GUARD

    def check(self, tenants: Iterable[str], gpu: Gpu) -> None:
        """MisuseError for a map of another GPU, and for a set of a tenant that is not there."""
        self.channel_map.check(gpu.info)
        known = list(tenants)
        for name in self.sets:
            if name not in known:
                raise MisuseError(f"There are colors for tenant {name!r}; the tenants are {', '.join(known)}.")


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
            for share in self._shares(list(demands)):
                self._attach(share, quotas or {})
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

    def _attach(self, share: Share, quotas: Mapping[str, int]) -> None:
        assert self._pool is not None  # it has the pages of the share
        self.memories[share.tenant] = self._pool.attach(share, quota=quotas.get(share.tenant))

    def _shares(self, left: list[Demand]) -> tuple[Share, ...]:
        """Shares for `left`, in a pool that grows as long as it has to and can; tenants that don't fit are taken off it."""
        wanted = self._pages_for(left)
        attempts = 0
        while left:
            full = self._grow(wanted)
            try:
                coloring = self._coloring
                return plan_shares(
                    coloring.channel_map, self._constants, left, form=coloring.form, escape=coloring.escape
                )
            except OutOfMemoryError as error:
                short = next(demand for demand in left if demand.tenant == error.tenant)
                attempts += 1
                if full is not None or attempts == _ATTEMPTS:
                    self.errors[short.tenant] = full or error
                    left.remove(short)
                    attempts = 0
                else:
                    missing = max(error.requested - error.available, 1)
                    wanted += self._pages_for([replace(short, nbytes=missing)])
        return ()

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

    def _pages_for(self, demands: Iterable[Demand]) -> int:
        """Pages that hold `demands`, if all pages are as the map has them on average, and one for the guard frames."""
        channel_map = self._coloring.channel_map
        pages: dict[frozenset[int], int] = {}
        for demand in demands:
            own = frozenset(demand.colors)
            slices = sum(len(channel_map.colors[color]) for color in own if color < len(channel_map.colors))
            needed = -(-demand.nbytes * channel_map.slices // (channel_map.page_bytes * max(slices, 1)))
            pages[own] = pages.get(own, 0) + needed + 1
        return max(pages.values(), default=0)
