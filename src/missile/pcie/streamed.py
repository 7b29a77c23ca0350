"""The engine's copies put into streams: they stand in a stream's order as its own would, and go when it is their turn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from missile.errors import GpuError
from missile.gpu.interface import Event, Gpu, HostBuffer, Latch, Stream
from missile.pcie.engine import CopyEngine
from missile.pcie.ticket import CopyState, CopyTicket, Direction, Span
from missile.pcie.weights import Share

__all__ = ["StreamedCopies"]

_LOOK_NS: Final = 100_000


class StreamedCopies:
    """`to_device` and `to_host` in place of `Stream.copy_to_device` and `copy_to_host`, for tenants with shares of the link.

    Only copies in the directions `scheduled` go through the engine, the others stay in their stream: where nobody's copies
    are long, first come first served is as fair, and it is faster. Later work of the stream waits for a scheduled copy on
    the GPU, by a latch: the host gives it its kernels at once, whenever the copy will go.
    stays: copies of at most so many bytes stay in their stream while nobody's copy goes through the engine, or could, also
    those that the stream is not ready for yet. A flood that begins meanwhile may hold them up, once; but a request behind
    another one of its tenant does not wait for the host to see that one's end.
    Owns its latches and events, not the engine; belongs to the engine's thread, which waits through `wait`.
    """

    def __init__(
        self, gpu: Gpu, engine: CopyEngine, scheduled: Collection[Direction] = tuple(Direction), *, stays: int = 0
    ) -> None:
        self._gpu = gpu
        self._scheduled = frozenset(scheduled)
        self._stays = stays
        self._engine = engine
        self._latches: dict[tuple[str, Direction], tuple[Latch, int]] = {}
        self._marks: list[Event] = []
        self._error: GpuError | None = None

    def admit(self, tenant: str, share: Share) -> None:
        """Register a tenant with the engine. MisuseError as `CopyEngine.admit`."""
        self._engine.admit(tenant, share)
        for direction in Direction:
            self._latches[tenant, direction] = (self._gpu.create_latch(), 0)

    def to_device(
        self, tenant: str, stream: Stream, address: int, source: HostBuffer, *, after: Event | None = None
    ) -> CopyTicket | None:
        """Copy all of `source` to `address`; what `stream` is given from now on comes behind it.

        A short copy that finds the link idle stays in `stream`, like one in a direction that is not scheduled: None comes
        back. after: what a scheduled copy must wait for (None: nothing;
        work that `stream` has already is not waited for).
        """
        if Direction.H2D not in self._scheduled:
            stream.copy_to_device(address, source)
            return None
        if self._stay(Direction.H2D, source.nbytes) or (
            # It starts now: there is nothing to schedule, and no latch to wait for.
            (after is None or after.done()) and self._engine.would_start(Direction.H2D, source.nbytes)
        ):
            stream.copy_to_device(address, source)
            self._engine.account(tenant, Direction.H2D, source.nbytes)
            return None
        raises = self._next(tenant, Direction.H2D)
        span = Span(address, source.nbytes)
        ticket = self._engine.to_device(tenant, span, source, after=after, raises=raises)
        return self._stand_in(stream, ticket, raises)

    def bring(
        self,
        tenant: str,
        address: int,
        source: HostBuffer,
        offset: int,
        nbytes: int,
        *,
        after: Event | None,
        raises: tuple[Latch, int],
    ) -> CopyTicket:
        """Copy `source.array[offset:][:nbytes]` to `address + offset`, in no stream's order: whoever needs it waits for
        `raises`. after: what must have ended before (None: nothing). What is asked for later comes behind it."""
        ticket = self._engine.to_device(
            tenant,
            Span(address + offset, nbytes),
            source,
            source_offset=offset,
            nbytes=nbytes,
            after=after,
            raises=raises,
        )
        ticket.add_done_callback(self._note)
        return ticket

    def schedules(self, direction: Direction, nbytes: int) -> bool:
        """Whether a copy of so many bytes may go through the engine even while nobody else copies."""
        return direction in self._scheduled and nbytes > self._stays

    def hand_over(self) -> None:
        """Give the link's scheduler what was asked for; without it, the next `wait` does."""
        self._engine.step()

    def to_host(self, tenant: str, stream: Stream, target: HostBuffer, address: int) -> CopyTicket | None:
        """Copy what is at `address` when `stream` has done its work so far to all of `target`, before its later work."""
        if Direction.D2H not in self._scheduled:
            stream.copy_to_host(target, address)
            return None
        if self._stay(Direction.D2H, target.nbytes):
            stream.copy_to_host(target, address)
            self._engine.account(tenant, Direction.D2H, target.nbytes)
            return None
        raises = self._next(tenant, Direction.D2H)
        mark = self._marks.pop() if self._marks else self._gpu.create_event(timing=False)
        stream.record(mark)
        ticket = self._engine.to_host(tenant, target, Span(address, target.nbytes), after=mark, raises=raises)
        ticket.add_done_callback(lambda _: self._marks.append(mark))
        return self._stand_in(stream, ticket, raises)

    def wait(self, events: Sequence[Event], deadline_ns: int) -> None:
        """As `Gpu.wait`, with the copies going on; may return early. Raises the error of a copy that has failed."""
        if not self._engine.busy and self._error is None:
            self._gpu.wait(events, deadline_ns)
            return
        due = self._engine.step()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        until = deadline_ns if due is None else min(deadline_ns, due)
        self._gpu.wait([*events, *self._engine.events()], until)

    def drain(self, deadline_ns: int) -> None:
        """Let all copies that were asked for go, wanted or not, until `deadline_ns`: no stream waits for one then, whatever
        went wrong. Errors of copies are dropped; that the GPU is lost is raised."""
        while self._engine.busy and (now := self._gpu.now_ns()) < deadline_ns:
            due = self._engine.step()
            self._gpu.wait(self._engine.events(), min(deadline_ns, now + _LOOK_NS if due is None else due))
        self._error = None

    def close(self) -> None:
        """The caller has made sure that no stream waits for a copy."""
        for latch, _ in self._latches.values():
            latch.close()
        for mark in self._marks:
            mark.close()
        self._latches.clear()
        self._marks.clear()

    def _stay(self, direction: Direction, nbytes: int) -> bool:
        return nbytes <= self._stays and not self._engine.underway(direction)

    def _next(self, tenant: str, direction: Direction) -> tuple[Latch, int]:
        latch, value = self._latches[tenant, direction]
        self._latches[tenant, direction] = (latch, value + 1)
        return latch, value + 1

    def _stand_in(self, stream: Stream, ticket: CopyTicket, raises: tuple[Latch, int]) -> CopyTicket:
        stream.wait_latch(*raises)
        ticket.add_done_callback(self._note)
        self._engine.step()  # it may be its turn at once
        return ticket

    def _note(self, ticket: CopyTicket) -> None:
        if ticket.state is CopyState.FAILED and isinstance(ticket.error, GpuError):
            ticket.error.tenant = ticket.error.tenant or ticket.tenant
            self._error = ticket.error
