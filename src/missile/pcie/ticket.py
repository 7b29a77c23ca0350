"""A copy that was asked for: what its owner holds, and where it ends."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Protocol

from missile.errors import MissileError, MisuseError
from missile.gpu.interface import Event, Stream

__all__ = ["CopyState", "CopyTicket", "DeviceSpan", "Direction", "Span"]


class Direction(enum.StrEnum):
    H2D = "h2d"
    D2H = "d2h"


class DeviceSpan(Protocol):
    """Device memory that copies may touch: a DeviceBuffer, an AddressRange, or a `Span` of one."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Span:
    """`nbytes` of device memory from `address`, inside something that somebody else owns."""

    address: int
    nbytes: int


class CopyState(enum.StrEnum):
    QUEUED = "queued"
    COPYING = "copying"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        return self in _FINISHED


_FINISHED = frozenset({CopyState.DONE, CopyState.FAILED, CopyState.CANCELLED})


class CopyTicket:
    """One copy on its way. Times in ns on the GPU's clock, -1 while unknown.

    `cancel`, `add_done_callback`, `future` and reading the attributes are safe from any thread; callbacks run on the
    thread that drives the engine and must be short. `gate` belongs to that thread.
    """

    __slots__ = (
        "_callbacks",
        "_event",
        "_on_issued",
        "cancel_requested",
        "copied",
        "direction",
        "error",
        "finished_ns",
        "issued_ns",
        "nbytes",
        "on_cancel",
        "state",
        "submitted_ns",
        "tenant",
    )

    def __init__(self, tenant: str, direction: Direction, nbytes: int, submitted_ns: int) -> None:
        self.tenant = tenant
        self.direction = direction
        self.nbytes = nbytes
        self.submitted_ns = submitted_ns
        self.issued_ns = -1  # when its first chunk was given to the GPU
        self.finished_ns = -1  # when the engine saw its end
        self.copied = 0  # bytes known to have arrived
        self.state = CopyState.QUEUED
        self.error: MissileError | None = None
        self.cancel_requested = False
        self.on_cancel: Callable[[], None] | None = None  # how the engine hears of it
        self._event: Event | None = None
        self._callbacks: deque[Callable[[CopyTicket], None]] = deque()
        self._on_issued: Callable[[CopyTicket], None] | None = None

    @property
    def done(self) -> bool:
        """Finished, in whichever way."""
        return self.state.finished

    @property
    def issued(self) -> bool:
        """Its last chunk has been given to the GPU, or it is done: `gate` works from here on."""
        return self._event is not None or self.state is CopyState.DONE

    def gate(self, stream: Stream) -> None:
        """Make later work of `stream` wait for this copy on the device. MisuseError unless it is `issued`."""
        if self._event is not None:
            stream.wait(self._event)
        elif self.state is not CopyState.DONE:
            raise MisuseError(f"A stream can't wait for a copy of tenant {self.tenant!r} that is {self.state.value}.")

    def cancel(self) -> None:
        """Ask for it to be dropped. Chunks that the GPU already has still arrive; a finished copy stays as it is."""
        self.cancel_requested = True
        if self.on_cancel is not None:
            self.on_cancel()

    def when_issued(self, callback: Callable[[CopyTicket], None]) -> None:
        """Call once when it is `issued`, or over without. Engine thread only; at most one."""
        if self.issued or self.done:
            callback(self)
        else:
            self._on_issued = callback

    def add_done_callback(self, callback: Callable[[CopyTicket], None]) -> None:
        """Call exactly once when it is done; at once when it is already."""
        self._callbacks.append(callback)
        if self.done:
            self._run_callbacks()

    def future(self) -> Future[CopyTicket]:
        """A future of this ticket: its result when done, its error when failed, CancelledError when cancelled."""
        future: Future[CopyTicket] = Future()
        future.set_running_or_notify_cancel()

        def settle(ticket: CopyTicket) -> None:
            if ticket.error is not None:
                future.set_exception(ticket.error)
            elif ticket.state is CopyState.CANCELLED:
                future.set_exception(CancelledError())
            else:
                future.set_result(ticket)

        self.add_done_callback(settle)
        return future

    # --- for the engine

    def mark_issued(self, event: Event) -> None:
        self._event = event
        self._tell_issued()

    def finish(self, state: CopyState, now_ns: int, error: MissileError | None = None) -> None:
        self._event = None
        self.error = error
        self.finished_ns = now_ns
        self.state = state
        self._tell_issued()
        self._run_callbacks()

    def _tell_issued(self) -> None:
        if self._on_issued is not None:
            callback, self._on_issued = self._on_issued, None
            callback(self)

    def _run_callbacks(self) -> None:
        while True:
            try:
                callback = self._callbacks.popleft()
            except IndexError:
                return
            callback(self)
