"""One copy inside the engine: how far it is, and what it holds."""

from __future__ import annotations

from collections import deque

from missile.errors import MissileError
from missile.gpu.interface import Event, HostBuffer, Latch
from missile.pcie.staging import Bytes, Piece
from missile.pcie.ticket import CopyState, CopyTicket

__all__ = ["Chunk", "Request"]


class Request:
    """The bytes [0, ticket.nbytes) between device address `device` and either `pinned` (from `offset`) or `pageable`.

    `issued`: bytes given to the GPU so far. `flying`: chunks of it that the GPU has. `pieces`: its filled or filling
    pinned pieces, in order. `landing`: pieces that the GPU is done with and the host is not. `raises`: a latch, and the
    value that it is raised to on the device behind the last chunk.
    """

    __slots__ = (
        "after",
        "device",
        "ending",
        "error",
        "flying",
        "issued",
        "landing",
        "offset",
        "pageable",
        "pieces",
        "pinned",
        "raises",
        "staged",
        "ticket",
    )

    def __init__(
        self,
        ticket: CopyTicket,
        device: int,
        *,
        pinned: HostBuffer | None = None,
        offset: int = 0,
        pageable: Bytes | None = None,
        after: Event | None = None,
        raises: tuple[Latch, int] | None = None,
    ) -> None:
        self.ticket = ticket
        self.device = device
        self.pinned = pinned
        self.offset = offset
        self.pageable = pageable
        self.after = after
        self.raises = raises
        self.issued = 0
        self.flying = 0
        self.staged = 0
        self.pieces: deque[Piece] = deque()
        self.landing = 0
        self.ending: CopyState | None = None  # how it is to end once nothing of it flies
        self.error: MissileError | None = None

    @property
    def remaining(self) -> int:
        return self.ticket.nbytes - self.issued

    @property
    def over(self) -> bool:
        """Nothing more of it will be issued."""
        return self.ending is not None or self.issued >= self.ticket.nbytes

    def end(self, state: CopyState, error: MissileError | None = None) -> None:
        """Issue nothing more. The first reason given counts."""
        if self.ending is None:
            self.ending = state
            self.error = error


class Chunk:
    """A part of a request that the GPU has. `eta_ns`: when it should have arrived, by the measured rate."""

    __slots__ = ("eta_ns", "event", "issued_ns", "nbytes", "piece", "request", "urgent")

    def __init__(
        self,
        request: Request,
        nbytes: int,
        event: Event,
        issued_ns: int,
        eta_ns: int,
        piece: Piece | None,
        urgent: bool,
    ) -> None:
        self.request = request
        self.nbytes = nbytes
        self.event = event
        self.issued_ns = issued_ns
        self.eta_ns = eta_ns
        self.piece = piece
        self.urgent = urgent
