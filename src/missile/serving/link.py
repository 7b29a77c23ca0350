"""The link between the front end and the engine process: two rings, an arena for tensors, two doorbells, a control line.

All of it is anonymous (a memfd, event fds, a socket pair) and handed to the engine as inherited descriptors: no other
process can open it, and nothing is left behind when either side dies.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import socket
import struct
import threading
from enum import IntEnum
from typing import Any, NamedTuple, Self

from missile.serving.ring import Ring

__all__ = ["Answer", "Bell", "Call", "CallKind", "Control", "Link", "Outcome", "ring"]

RING_RECORDS = 8192
_PAGE = 4096
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which the mmap module does not name
_POPULATED = (
    64 << 20
)  # bytes whose pages are there from the start: a fault on each page of a request costs more than its copy


class CallKind(IntEnum):
    INFER = 1
    CANCEL = 2


class Outcome(IntEnum):
    DONE = 0
    FAILED = 1  # a sentence lies in the block
    EXPIRED = 2
    CANCELLED = 3
    UNLOADED = 4


class Call(NamedTuple):
    """Front end to engine. Times on the monotonic clock, ns; deadline 0: none. priority: lower goes first.

    arrival_ns: when it was put on the ring.
    """

    kind: int
    slot: int
    id: int
    batch: int
    offset: int
    priority: int
    arrival_ns: int
    deadline_ns: int


class Answer(NamedTuple):
    """Engine to front end. The four durations, ns, add up to what the engine spent on it. batch: items run together.

    first: 1 for one request of each batch, so that executions can be counted.
    """

    id: int
    outcome: int
    batch: int
    first: int
    queue_ns: int
    copy_in_ns: int
    execute_ns: int
    copy_out_ns: int
    done_ns: int


_CALL = struct.Struct("<IIQIQiqq")
_ANSWER = struct.Struct("<QIIIqqqqq")


class Control:
    """JSON messages over a socket that keeps their bounds; for loading, tuning and facts, never for requests."""

    LIMIT = 1 << 20

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.LIMIT)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> bool:
        """False when the other side is gone."""
        try:
            self._socket.send(json.dumps(message).encode())
        except OSError:
            return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the other side is gone. Blocks unless the socket is readable."""
        try:
            raw = self._socket.recv(self.LIMIT)
        except OSError:
            return None
        if not raw:
            return None
        message: dict[str, Any] = json.loads(raw)
        return message

    def pending(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        self._socket.close()


class Bell:
    """Wakes the other side, which waits on `descriptor`, an event fd; only when it has said that it wants to be woken.

    A wake-up costs a system call and, often, a switch to the other process, so a side that is awake is left alone. Both
    sides store one thing and then look at the other's (the waiter: armed, then its ring; the ringer: the ring, then
    armed), which is right only with a full barrier between the two: a lock's atomic instruction is one.
    """

    def __init__(self, descriptor: int, armed: memoryview) -> None:
        self.descriptor = descriptor
        self._armed = armed
        self._lock = threading.Lock()

    def _fence(self) -> None:
        self._lock.acquire()
        self._lock.release()

    def ring(self) -> None:
        """After pushing. Only one side rings."""
        self._fence()
        if self._armed[0]:
            self._armed[0] = 0
            ring(self.descriptor)

    def arm(self) -> None:
        """Ask to be woken by the next push. Look at the ring once more afterwards."""
        self._armed[0] = 1
        self._fence()

    def quiet(self) -> None:
        """Take the rings so far, and ask for none."""
        self._armed[0] = 0
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)
        self._armed.release()


def ring(descriptor: int) -> None:
    """Ring a plain event fd."""
    with contextlib.suppress(BlockingIOError):  # a full counter rings all the same
        os.eventfd_write(descriptor, 1)


class Link:
    """One side's view. The front end makes it with `create`, the engine with `attach` from `descriptors`."""

    def __init__(self, memory_fd: int, call_bell: int, answer_bell: int, control: socket.socket, nbytes: int) -> None:
        self.memory_fd = memory_fd
        self.control = Control(control)
        self._mapping = mmap.mmap(memory_fd, nbytes)
        with contextlib.suppress(OSError):  # an old kernel: the first requests fault the pages in
            self._mapping.madvise(_POPULATE_WRITE, 0, min(nbytes, _POPULATED))
        self._view = memoryview(self._mapping)
        calls = -(-Ring.nbytes(_CALL, RING_RECORDS) // _PAGE) * _PAGE
        answers = -(-Ring.nbytes(_ANSWER, RING_RECORDS) // _PAGE) * _PAGE
        self.calls = Ring(self._view[:calls], _CALL, RING_RECORDS)
        self.answers = Ring(self._view[calls : calls + answers], _ANSWER, RING_RECORDS)
        self.arena = self._view[calls + answers + _PAGE :]
        flags = self._view[calls + answers : calls + answers + _PAGE]
        self.call_bell = Bell(call_bell, flags[:8].cast("Q"))  # the engine waits on it
        self.answer_bell = Bell(answer_bell, flags[64:72].cast("Q"))  # the front end waits on it

    @classmethod
    def create(cls, arena_bytes: int) -> tuple[Self, socket.socket]:
        """The front end's side, and the control socket's other end, to be closed once the engine has it."""
        rings = sum(-(-Ring.nbytes(r, RING_RECORDS) // _PAGE) * _PAGE for r in (_CALL, _ANSWER))
        nbytes = rings + _PAGE + arena_bytes
        memory = os.memfd_create("missile-link", os.MFD_CLOEXEC)
        os.ftruncate(memory, nbytes)
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(memory, os.eventfd(0, flags), os.eventfd(0, flags), ours, nbytes), theirs

    @classmethod
    def attach(cls, memory_fd: int, call_bell: int, answer_bell: int, control_fd: int) -> Self:
        control = socket.socket(fileno=control_fd)
        return cls(memory_fd, call_bell, answer_bell, control, os.fstat(memory_fd).st_size)

    def close(self) -> None:
        """Idempotent. Views of the arena that are still held keep its memory until they go."""
        if self.memory_fd < 0:
            return
        self.control.close()
        os.close(self.memory_fd)
        self.call_bell.close()
        self.answer_bell.close()
        self.memory_fd = -1
        self.calls.close()
        self.answers.close()
        self.arena.release()
        with contextlib.suppress(BufferError):
            self._view.release()
            self._mapping.close()
