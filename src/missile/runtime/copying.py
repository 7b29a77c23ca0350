"""Requests' copies through the completely fair scheduler of the link, in place of copies on the lanes' own streams."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Final
from weakref import WeakKeyDictionary

from missile.errors import GpuError
from missile.gpu.interface import Gpu
from missile.pcie.engine import CopyEngine, EngineOptions
from missile.pcie.link import choose_options, measure_link
from missile.pcie.streamed import StreamedCopies
from missile.pcie.ticket import Direction
from missile.pcie.weights import MIB, Share
from missile.runtime.loading import LoadedTenant
from missile.runtime.tenant import Tenant

__all__ = ["LONG", "ScheduledCopies", "link_options", "longest_copy", "scheduled_directions", "share_of"]

_CHUNKS: Final = (MIB, 2 * MIB, 4 * MIB, 16 * MIB)
_REPEATS: Final = 3  # the median of two is their mean: one disturbed repeat would count

LONG: Final = MIB
"""A copy of so many bytes holds others up for about 20 us, and may."""

_measured: WeakKeyDictionary[Gpu, EngineOptions] = WeakKeyDictionary()


def link_options(gpu: Gpu) -> EngineOptions:
    """The copy engine's options for the GPU's link: measured when first asked for (a fifth of a second), then remembered."""
    if (options := _measured.get(gpu)) is None:
        options = _measured[gpu] = choose_options(measure_link(gpu, chunks=_CHUNKS, repeats=_REPEATS))
    return options


def share_of(tenant: Tenant) -> Share:
    """The tenant's entitlement to the link: its weight there, and its class."""
    weight = tenant.weight if tenant.copy_weight is None else tenant.copy_weight
    return Share(weight=weight, latency_sensitive=tenant.latency_sensitive)


class ScheduledCopies(StreamedCopies):
    """The copies of one run's tenants, with an engine of their own; in directions in which somebody's copies are long.

    Where nobody copies more at once than others would wait for anyway, scheduling could not make a wait shorter, and its way
    through the host costs an output tens of microseconds: such a direction is left to the streams. So are short copies
    elsewhere while no long one is under way.
    """

    def __init__(self, gpu: Gpu, tenants: Sequence[LoadedTenant]) -> None:
        """After an error nothing is held."""
        scheduled = scheduled_directions(tenants)
        with ExitStack() as undo:
            # Requests' memory is pinned: no staging.
            engine = CopyEngine(gpu, replace(link_options(gpu), staging_slots=0))
            undo.callback(engine.close)
            super().__init__(gpu, engine, scheduled, stays=LONG)
            undo.callback(super().close)
            for loaded in tenants:
                self.admit(loaded.tenant.name, share_of(loaded.tenant))
            self._resources = undo.pop_all()

    @classmethod
    def where_needed(cls, gpu: Gpu, tenants: Sequence[LoadedTenant]) -> ScheduledCopies | None:
        """None where every direction would be left to the streams."""
        return cls(gpu, tenants) if scheduled_directions(tenants) else None

    def close(self) -> None:
        """Idempotent. Ends the copies that are left; a lost GPU has lost them already."""
        with suppress(GpuError):
            self._resources.close()


def longest_copy(tenants: Sequence[LoadedTenant], direction: Direction) -> int:
    """Bytes of the longest copy of any request, weights that wait on the host included."""
    sides = (t.inputs if direction is Direction.H2D else t.outputs for t in tenants)
    longest = max((buffer.nbytes for side in sides for buffer in side), default=0)
    if direction is Direction.H2D:
        longest = max([longest, *(part.nbytes for t in tenants if t.weights is not None for part in t.weights.parts)])
    return longest


def scheduled_directions(tenants: Sequence[LoadedTenant]) -> tuple[Direction, ...]:
    """Those in which somebody copies more than `LONG` at once."""
    return tuple(direction for direction in Direction if longest_copy(tenants, direction) > LONG)
