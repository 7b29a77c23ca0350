"""The client of the serving benchmarks: raw HTTP over loopback, one thread, requests on a schedule or in a closed loop.

It waits in `select`, whose timeouts are exact to microseconds, and never spins: on a small machine the server needs the
processor. Each answer's `Server-Timing` says what the request cost inside the server.
"""

from __future__ import annotations

import json
import re
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from missile.statistics import nearest_rank

__all__ = ["Flow", "drive", "http_request", "summary", "tensor"]

PARTS = ("front", "queue", "copy", "execute")
_TIMING = re.compile(rb"(front|queue|copy|execute);dur=([0-9.]+)")
_LENGTH = re.compile(rb"content-length: (\d+)")
_LATE_S = 10.0  # how long answers may take once the last request was due


@dataclass
class Flow:
    """One kind of request. due: when each leaves, seconds from the start, whether or not answers have come; empty: a
    closed loop with one request outstanding on each connection.

    client_ms: from when a request was due to its whole answer read. parts: what the server says of the same requests.
    answers: of each, when it was due (s from the start), what it took (ms) and whether it was a good one. quiet: refusals
    are expected, and not shown.
    """

    name: str
    request: bytes
    due: Sequence[float] = ()
    connections: int = 8
    client_ms: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    answers: list[tuple[float, float, bool]] = field(default_factory=list)
    errors: int = 0
    sent: int = 0
    quiet: bool = False

    def result(self, warm: float = 0.1) -> dict[str, object]:
        """Percentiles, ms, without the first `warm` of the requests. outside: the client's time less the server's parts: the
        loopback interface, waking each other, the client itself.
        """
        skip = int(len(self.client_ms) * warm)
        client = np.array(self.client_ms[skip:])
        inside = {part: np.array(values[skip:]) for part, values in self.parts.items()}
        found: dict[str, object] = {"answered": len(self.client_ms), "errors": self.errors, "client": summary(client)}
        found.update({part: summary(values) for part, values in inside.items()})
        found["outside"] = summary(client - sum(inside.values()))
        return found


class _Connection:
    def __init__(self, flow: Flow, address: tuple[str, int], start: float = 0.0) -> None:
        self.flow = flow
        self.start = start
        self._address = address
        self._connect()
        self.waiting: deque[float] = deque()
        self.since: float | None = None
        self.received = bytearray()

    def _connect(self) -> None:
        self.socket = socket.create_connection(self._address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, due: float) -> None:
        self.waiting.append(due)
        if self.since is None:
            self._next()

    def _next(self) -> None:
        self.since = self.waiting.popleft() if self.waiting else None
        if self.since is not None:
            self.flow.sent += 1
            self.socket.sendall(self.flow.request)

    def receive(self) -> bool:
        """Read what is there; True when an answer is whole."""
        data = self.socket.recv(1 << 18)
        if not data:
            if self.since is not None:
                raise SystemExit(f"{self.flow.name}: the server hung up.")
            self.socket.close()  # servers end connections on which nothing comes
            self._connect()
            return False
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self.received[:end])
        length = _LENGTH.search(head)
        if len(self.received) < end + 4 + int(length[1] if length else 0):
            return False
        took = (time.perf_counter() - (self.since or 0.0)) * 1000.0
        good = head.startswith(b"HTTP/1.1 200")
        self.flow.answers.append(((self.since or 0.0) - self.start, took, good))
        if good:
            self.flow.client_ms.append(took)
            for name, value in _TIMING.findall(head):
                self.flow.parts[name.decode()].append(float(value))
        else:
            self.flow.errors += 1
            if self.flow.errors == 1 and not self.flow.quiet:
                print(self.flow.name, bytes(self.received[:600]).decode(errors="replace"), file=sys.stderr)
        self.received.clear()
        self._next()
        return True


def drive(flows: Sequence[Flow], address: tuple[str, int], seconds: float) -> float:
    """Run the flows side by side; returns how long it took, s. Closed loops stop asking after `seconds`."""
    start = time.perf_counter() + 0.05
    groups = [(flow, [_Connection(flow, address, start) for _ in range(flow.connections)]) for flow in flows]
    by_socket = {c.socket.fileno(): c for _, connections in groups for c in connections}
    schedule = sorted((start + due, number, index) for number, f in enumerate(flows) for index, due in enumerate(f.due))
    pending = deque(schedule)
    end = start + seconds
    for flow, connections in groups:
        if not len(flow.due):
            for connection in connections:
                connection.send(time.perf_counter())
    give_up = end + _LATE_S
    while True:
        now = time.perf_counter()
        while pending and pending[0][0] <= now:
            due, number, index = pending.popleft()
            connections = groups[number][1]
            free = next((c for c in connections if c.since is None), connections[index % len(connections)])
            free.send(due)
        busy = [c for c in by_socket.values() if c.since is not None]
        if now >= give_up or (not pending and not busy):
            break
        wait = (pending[0][0] if pending else give_up) - time.perf_counter()
        for descriptor in select.select(list(by_socket), [], [], max(0.0, wait))[0]:
            connection = by_socket.pop(descriptor)
            done = connection.receive()
            by_socket[connection.socket.fileno()] = connection
            if done and not len(connection.flow.due) and time.perf_counter() < end:
                connection.send(time.perf_counter())
    took = time.perf_counter() - start
    for connection in by_socket.values():
        connection.socket.close()
    return took


def summary(values: Iterable[float]) -> dict[str, float]:
    """Percentiles by nearest rank, as everywhere in Missile; NaN where there is nothing."""
    found = sorted(values)
    shares = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p99.9_ms": 0.999, "max_ms": 1.0}
    return {
        name: round(float(found[nearest_rank(len(found), share)]), 4) if found else float("nan")
        for name, share in shares.items()
    }


def http_request(model: str, head: dict[str, object], tail: bytes = b"") -> bytes:
    body = json.dumps(head).encode()
    lines = [f"POST /v2/models/{model}/infer HTTP/1.1", "Host: localhost", f"Content-Length: {len(body) + len(tail)}"]
    if tail:
        lines.append(f"Inference-Header-Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body + tail


def tensor(name: str, shape: list[int], datatype: str = "FP32", **more: object) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": shape, **more}
