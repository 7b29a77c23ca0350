"""Requests' copies through the completely fair scheduler of the link, in place of copies on the lanes' own streams."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
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

__all__ = ["ScheduledCopies", "link_options", "share_of"]

_CHUNKS: Final = (MIB, 2 * MIB, 4 * MIB, 16 * MIB)
_REPEATS: Final = 2

_measured: WeakKeyDictionary[Gpu, EngineOptions] = WeakKeyDictionary()


def link_options(gpu: Gpu) -> EngineOptions:
    """The copy engine's options for the GPU's link: measured when first asked for (a fifth of a second), then remembered."""
    if (options := _measured.get(gpu)) is None:
        options = _measured[gpu] = choose_options(measure_link(gpu, chunks=_CHUNKS, repeats=_REPEATS))
    return options


def share_of(tenant: Tenant) -> Share:
    """The tenant's entitlement to the link: its weight, and its class."""
    return Share(weight=tenant.weight, latency_sensitive=tenant.latency_sensitive)


class ScheduledCopies(StreamedCopies):
    """The copies of one run's tenants, with an engine of their own.

    A direction in which no tenant copies more at once than a chunk beside latency-sensitive tenants is left to the streams:
    scheduling could not make anybody's wait shorter, and its way through the host costs an output tens of microseconds.
    """

    def __init__(self, gpu: Gpu, tenants: Sequence[LoadedTenant]) -> None:
        """After an error nothing is held."""
        options = link_options(gpu)
        longest = {
            Direction.H2D: max((b.nbytes for t in tenants for b in t.inputs), default=0),
            Direction.D2H: max((b.nbytes for t in tenants for b in t.outputs), default=0),
        }
        scheduled = [direction for direction, nbytes in longest.items() if nbytes > options.granularity.short]
        with ExitStack() as undo:
            engine = CopyEngine(gpu, options)
            undo.callback(engine.close)
            super().__init__(gpu, engine, scheduled)
            undo.callback(super().close)
            for loaded in tenants:
                self.admit(loaded.tenant.name, share_of(loaded.tenant))
            self._resources = undo.pop_all()

    def close(self) -> None:
        """Idempotent. Ends the copies that are left; a lost GPU has lost them already."""
        with suppress(GpuError):
            self._resources.close()
