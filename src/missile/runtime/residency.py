"""Residency "host": whose weights are on the device, and how kernels wait for those that are not there yet.

Every such tenant has one place in a budget of device memory (`SwapSpace`), for which its plan is made once. Places may
overlap: bringing one tenant's weights in displaces those of others. All of it is given to the GPU when the request is, in an
order in which everything waits only for what was given before, so that the host never comes back to it and nothing can lock
up: copies wait for the last work of those whom they displace, kernels for the copies of what they read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from missile.gpu.interface import Event, Gpu, Latch, Stream
from missile.pcie.streamed import StreamedCopies
from missile.pcie.ticket import CopyState, CopyTicket
from missile.runtime.host_weights import HostWeights

__all__ = ["ColdStart", "Residency"]


class ColdStart(NamedTuple):
    """From when the copies were asked for (what they displace may have run on) until all had arrived; ns, GPU's clock."""

    begun_ns: int
    arrived_ns: int


class Residency:
    """Of one run's tenants, by number. Owns streams, latches and events, until `close`. Everything starts cold."""

    def __init__(
        self, gpu: Gpu, names: Sequence[str], weights: Sequence[HostWeights | None], copies: StreamedCopies | None
    ) -> None:
        """weights: None for tenants whose weights are on the device anyway. copies: the way to the link; None: a stream for
        each tenant, as without a scheduler. After an error nothing is held."""
        self._gpu = gpu
        self._names = tuple(names)
        self._weights = tuple(weights)
        self._copies = copies
        self._there = [False] * len(self._weights)
        self._base = [0] * len(self._weights)  # of the latch: the value before the current copies' first
        self._gated = [0] * len(self._weights)  # parts that the tenant's work so far has waited for
        self._firsts = [[part.first for part in w.parts] if w else [] for w in self._weights]
        # Whose stay must end before each tenant's next copies: all who came since its own last ones, also those whom
        # somebody else has displaced already, whose place may not cover all of theirs.
        self._before: list[set[int]] = [set() for _ in self._weights]
        self._cold: list[list[ColdStart]] = [[] for _ in self._weights]
        self._arriving: list[
            tuple[int, int, Event]
        ] = []  # of plain copies: tenant, begun, and the event behind the last one
        self._under_way = [0] * len(self._weights)  # how often each tenant's weights are being copied in
        self._events: list[Event] = []
        self._marks: list[Event] = []
        with ExitStack() as undo:
            self._streams: dict[int, Stream] = {}
            self._latches: dict[int, Latch] = {}
            for tenant, found in enumerate(self._weights):
                if found is None:
                    continue
                self._streams[tenant] = gpu.create_stream()
                undo.callback(self._streams[tenant].close)
                self._latches[tenant] = gpu.create_latch()
                undo.callback(self._latches[tenant].close)
            self._resources = undo.pop_all()
        self._rivals = [
            tuple(other for other, w in enumerate(self._weights) if w and mine and other != tenant and mine.overlaps(w))
            for tenant, mine in enumerate(self._weights)
        ]

    def hosts(self, tenant: int) -> bool:
        """Whether the tenant's weights wait on the host."""
        return self._weights[tenant] is not None

    def has_rivals(self, tenant: int) -> bool:
        """Whether somebody else's weights would displace the tenant's."""
        return bool(self._rivals[tenant])

    def bring(self, tenant: int, tails: Sequence[Event | None]) -> None:
        """Have the tenant's weights copied in, unless they are there or on their way.

        tails: by tenant, the end of the last work that it was given.
        """
        weights = self._weights[tenant]
        if weights is None or self._there[tenant]:
            return
        begun = self._gpu.now_ns()
        stream, latch = self._streams[tenant], self._latches[tenant]
        waits = bool(self._before[tenant])
        for rival in self._before[tenant]:
            self._there[rival] = False
            if (tail := tails[rival]) is not None:
                stream.wait(tail)
            # A request that is not wholly with the GPU has not waited for all of its weights.
            stream.wait_latch(self._latches[rival], self._base[rival] + len(self._firsts[rival]))
        self._before[tenant].clear()
        for rival in self._rivals[tenant]:
            self._before[rival].add(tenant)
        self._base[tenant] += len(weights.parts)
        self._gated[tenant] = 0
        self._there[tenant] = True
        if self._copies is None:
            self._copy(tenant, weights, stream, latch, begun)
        else:
            self._schedule(tenant, weights, self._mark(stream) if waits else None, begun)

    def gate(self, tenant: int, stream: Stream, until: int) -> None:
        """Make later work of `stream` wait for the weights that the tenant's operations before number `until` read."""
        needed = bisect_left(self._firsts[tenant], until)
        if needed > self._gated[tenant]:
            self._gated[tenant] = needed
            stream.wait_latch(self._latches[tenant], self._base[tenant] + needed)

    def settled(self, tenant: int) -> bool:
        """Whether all later work of the tenant comes behind its last weights anyway."""
        return self._gated[tenant] == len(self._firsts[tenant])

    def arriving(self, tenant: int) -> bool:
        """Whether the tenant's weights are on their way: what it was given last waits for them, and for no SM."""
        if self._under_way[tenant] and self._copies is None:
            self._harvest()
        return self._under_way[tenant] > 0

    def cold_starts(self, tenant: int) -> tuple[ColdStart, ...]:
        """Those that are over, since `forget`."""
        self._harvest()
        return tuple(self._cold[tenant])

    def take_cold_starts(self, tenant: int) -> int:
        """How many were over since the last call or `forget`; they are no longer kept."""
        self._harvest()
        count = len(self._cold[tenant])
        self._cold[tenant].clear()
        return count

    def forget(self) -> None:
        """Count cold starts from now on. Everything has ended."""
        self._harvest()
        for cold in self._cold:
            cold.clear()

    def close(self) -> None:
        """Idempotent. Nothing waits for a copy any more. Cold starts that are over stay known."""
        self._harvest()
        for event in (*self._events, *self._marks, *(event for _, _, event in self._arriving)):
            event.close()
        self._events.clear()
        self._marks.clear()
        self._arriving.clear()
        self._resources.close()

    # --- the two ways

    def _copy(self, tenant: int, weights: HostWeights, stream: Stream, latch: Latch, begun: int) -> None:
        for index, part in enumerate(weights.parts):
            stream.copy_to_device(weights.address + part.offset, weights.image, nbytes=part.nbytes, offset=part.offset)
            stream.raise_latch(latch, self._value(tenant, index))
        self._harvest()
        event = self._events.pop() if self._events else self._gpu.create_event()
        stream.record(event)
        self._arriving.append((tenant, begun, event))
        self._under_way[tenant] += 1

    def _schedule(self, tenant: int, weights: HostWeights, after: Event | None, begun: int) -> None:
        assert self._copies is not None
        for index, part in enumerate(weights.parts):
            ticket = self._copies.bring(
                self._names[tenant],
                weights.address,
                weights.image,
                part.offset,
                part.nbytes,
                after=None if index else after,
                raises=(self._latches[tenant], self._value(tenant, index)),
            )
            if not index and after is not None:
                ticket.add_done_callback(partial(self._give_back, after))
        self._under_way[tenant] += 1
        ticket.add_done_callback(lambda ticket: self._arrived(tenant, begun, ticket))
        self._copies.hand_over()  # kernels are launched next, and the caller may be held up by the driver

    def _value(self, tenant: int, index: int) -> int:
        """What the tenant's latch is raised to behind part number `index`."""
        return self._base[tenant] + index + 1

    def _mark(self, stream: Stream) -> Event:
        mark = self._marks.pop() if self._marks else self._gpu.create_event(timing=False)
        stream.record(mark)
        return mark

    def _give_back(self, mark: Event, _: CopyTicket) -> None:
        self._marks.append(mark)

    def _arrived(self, tenant: int, begun: int, ticket: CopyTicket) -> None:
        self._under_way[tenant] -= 1
        if ticket.state is CopyState.DONE:
            self._cold[tenant].append(ColdStart(begun, ticket.finished_ns))

    def _harvest(self) -> None:
        """Note the plain copies that have ended."""
        still = []
        for tenant, begun, event in self._arriving:
            if event.done():
                self._cold[tenant].append(ColdStart(begun, event.time_ns()))
                self._events.append(event)
                self._under_way[tenant] -= 1
            else:
                still.append((tenant, begun, event))
        self._arriving = still
