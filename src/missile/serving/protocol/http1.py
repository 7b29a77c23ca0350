"""A lean HTTP/1.1 server on asyncio, parsed by llhttp (httptools): bodies land in their final buffer straight from the
socket, which is what keeps a 600 KiB request cheap.

Every phase has a time limit, and one connection runs one request at a time, so a slow or stuck client holds nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import cast

import httptools
import orjson

from missile.serving.config import Limits
from missile.serving.protocol.buffers import BodyBuffers
from missile.serving.protocol.eager import Eager
from missile.serving.refusal import Reason, Refusal

__all__ = ["Handler", "HttpRequest", "HttpResponse", "HttpServer", "error_response"]

log = logging.getLogger("missile.http")

_READ = 64 * 1024
_MAX_HEAD = 32 * 1024
_MAX_HEADERS = 100
_SWEEP_S = 0.2  # between two looks for connections that are late


@dataclass(slots=True)
class HttpRequest:
    """headers: names in lower case. body: valid until the handler returns. arrival_ns: when the body was whole."""

    method: str
    target: bytes
    headers: dict[str, str]
    body: memoryview
    keep_alive: bool
    arrival_ns: int = 0
    head_ns: int = 0
    buffer: bytearray | None = None


@dataclass(slots=True)
class HttpResponse:
    status: int
    parts: Sequence[bytes | memoryview]
    content_type: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()
    after: Callable[[], None] | None = None  # called when the parts have been taken over


Handler = Callable[[HttpRequest], Awaitable[HttpResponse]]

_REASONS = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}


def error_response(refusal: Refusal) -> HttpResponse:
    headers = [("retry-after", str(max(1, round(refusal.retry_after_s))))] if refusal.retry_after_s else []
    if refusal.reason is Reason.UNAUTHENTICATED:
        headers.append(("www-authenticate", "Bearer"))
    return HttpResponse(refusal.reason.http, [orjson.dumps({"error": str(refusal)})], headers=headers)


class _Connection(asyncio.BufferedProtocol):
    """One client. It may send one request ahead; then reading stops until its answers are taken."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._limits = server.limits
        self._transport: asyncio.Transport | None = None
        self._head = bytearray(_READ)
        self._parser = httptools.HttpRequestParser(self)
        self._method = ""
        self._target = b""
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._length = 0
        self._chunked = False
        self._buffer: bytearray | None = None
        self._filled = 0
        self._claimed = 0
        self._straight = False  # the rest of the body bypasses the parser
        self._keep_alive = True
        self._paused = False
        self._queue: deque[HttpRequest] = deque()
        self._task: Eager | None = None
        self._deadline = (
            math.inf
        )  # on the loop's clock; the server looks now and then (a timer for each phase costs more)
        self._drained: asyncio.Future[None] | None = None
        self._refused: Refusal | None = None
        self._head_ns = 0

    # --- transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=1 << 20)
        self._server.connections.add(self)
        if len(self._server.connections) > self._limits.connections or self._server.closing:
            self._refuse(
                Refusal(Reason.OVERLOADED, "The server has as many connections as it takes.", retry_after_s=1.0)
            )
            return
        self._arm(self._limits.header_seconds)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._disarm()
        self._unclaim()
        self._transport = None
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._drained = self._server.loop.create_future()
        self._arm(self._limits.write_seconds)

    def resume_writing(self) -> None:
        self._disarm()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def eof_received(self) -> bool:
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._straight and self._buffer is not None:
            return memoryview(self._buffer)[self._filled : self._length]
        return memoryview(self._head)

    def buffer_updated(self, nbytes: int) -> None:
        if self._refused is not None:
            return
        if self._straight:
            self._filled += nbytes
            if self._filled == self._length:
                self._straight = False
                self._parser = httptools.HttpRequestParser(self)
                self.on_message_complete()
            return
        try:
            self._parser.feed_data(memoryview(self._head)[:nbytes])
        except httptools.HttpParserUpgrade:
            self._refuse(Refusal(Reason.INVALID, "This server does not change protocols."))
            return
        except httptools.HttpParserError:
            self._refuse(self._refused or Refusal(Reason.INVALID, "The request is not valid HTTP/1.1."))
            return
        if self._buffer is not None and not self._chunked and self._filled < self._length:
            self._straight = True

    # --- parser callbacks

    def on_message_begin(self) -> None:
        self._headers = {}
        self._target = b""
        self._head_bytes = 0
        self._length = self._filled = 0
        self._chunked = False
        self._buffer = None
        self._head_ns = time.monotonic_ns()
        if self._task is None:
            self._arm(self._limits.header_seconds)

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        if len(self._headers) > _MAX_HEADERS:
            self._stop(Refusal(Reason.TOO_LARGE, "The request has too many headers."))

    def on_headers_complete(self) -> None:
        self._keep_alive = self._parser.should_keep_alive()
        self._method = self._parser.get_method().decode("latin-1")
        headers = self._headers
        limit = self._limits.body_mib << 20
        if "transfer-encoding" in headers:
            self._chunked = True
            self._buffer = bytearray()
        elif length := headers.get("content-length"):
            if not length.isdecimal() or len(length) > 15 or int(length) > limit:
                self._stop(self._too_large())
            self._length = int(length)
            if self._length:
                self._claim(self._length)
                self._buffer = self._server.buffers.take(self._length)
        if headers.get("expect", "").lower() == "100-continue" and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._task is None:
            self._arm(self._limits.body_seconds)

    def on_body(self, body: bytes) -> None:
        buffer = self._buffer
        if buffer is None:
            return
        if self._chunked:
            if len(buffer) + len(body) > self._limits.body_mib << 20:
                self._stop(self._too_large())
            self._claim(len(body))
            buffer += body
            self._length = len(buffer)
        else:
            buffer[self._filled : self._filled + len(body)] = body
        self._filled += len(body)

    def on_message_complete(self) -> None:
        buffer = self._buffer
        body = memoryview(buffer)[: self._length] if buffer is not None else memoryview(b"")
        self._unclaim()
        self._buffer = None
        request = HttpRequest(
            self._method,
            self._target,
            self._headers,
            body,
            self._keep_alive,
            time.monotonic_ns(),
            self._head_ns,
            buffer,
        )
        self._queue.append(request)
        if self._task is None:
            self._disarm()
            task = Eager(self._serve())
            self._task = None if task.done else task
        else:
            self._pause()  # one ahead is enough; until then reading goes on, so that a client's going is noticed

    # --- serving

    async def _serve(self) -> None:
        """Answer what has come in, one after the other; then read on."""
        transport = self._transport
        try:
            while self._queue and transport is not None and not transport.is_closing():
                request = self._queue.popleft()
                response = await self._server.handle(request)
                keep_alive = request.keep_alive and not self._server.closing
                self._write(transport, request, response, keep_alive)
                if request.buffer is not None:
                    self._server.buffers.give(request.buffer)
                if self._drained is not None:
                    await self._drained
                if not keep_alive:
                    transport.close()
                    return
        finally:
            self._task = None
        if transport is not None and not transport.is_closing():
            if self._refused is not None:
                self._send_refusal()
                return
            if self._paused:
                self._paused = False
                transport.resume_reading()
            self._arm(self._limits.body_seconds if self._buffer is not None else self._limits.idle_seconds)

    @staticmethod
    def _write(transport: asyncio.Transport, request: HttpRequest, response: HttpResponse, keep_alive: bool) -> None:
        length = sum(len(part) for part in response.parts)
        lines = [
            f"HTTP/1.1 {response.status} {_REASONS.get(response.status, '')}\r\n"
            f"content-type: {response.content_type}\r\ncontent-length: {length}\r\n"
        ]
        lines.extend(f"{name}: {value}\r\n" for name, value in response.headers)
        lines.append("\r\n" if keep_alive else "connection: close\r\n\r\n")
        head = "".join(lines).encode("latin-1")
        parts = () if request.method == "HEAD" else response.parts
        data = b"".join((head, *parts))  # a copy: the transport may keep what it can't send at once
        if response.after is not None:
            response.after()
        if not transport.is_closing():
            transport.write(data)

    # --- limits

    def _pause(self) -> None:
        if self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _claim(self, nbytes: int) -> None:
        server = self._server
        if server.body_bytes + nbytes > self._limits.bodies_mib << 20:
            self._stop(Refusal(Reason.OVERLOADED, "The server is receiving as much as it takes.", retry_after_s=1.0))
        server.body_bytes += nbytes
        self._claimed += nbytes

    def _unclaim(self) -> None:
        self._server.body_bytes -= self._claimed
        self._claimed = 0

    def _count(self, nbytes: int) -> None:
        self._head_bytes += nbytes
        if self._head_bytes > _MAX_HEAD:
            self._stop(Refusal(Reason.TOO_LARGE, "The request's head is too large."))

    def _too_large(self) -> Refusal:
        return Refusal(
            Reason.TOO_LARGE, f"The body is larger than the {self._limits.body_mib} MiB that this server takes."
        )

    def _stop(self, refusal: Refusal) -> None:
        """Leave the parser; `buffer_updated` answers."""
        self._refused = refusal
        raise refusal

    def _refuse(self, refusal: Refusal) -> None:
        """Answer and hang up. While a request runs, its answer goes first."""
        self._refused = refusal
        self._disarm()
        self._pause()
        if self._task is None:
            self._send_refusal()

    def _send_refusal(self) -> None:
        if self._transport is not None and self._refused is not None:
            self._server.count_refusal(self._refused)
            request = HttpRequest("GET", b"", {}, memoryview(b""), keep_alive=False)
            self._write(self._transport, request, error_response(self._refused), keep_alive=False)
            self._transport.close()

    def _arm(self, seconds: float) -> None:
        self._deadline = self._server.loop.time() + seconds

    def _disarm(self) -> None:
        self._deadline = math.inf

    def end_if_late(self, now: float) -> None:
        """Hang up at once when the phase that the connection is in has lasted too long."""
        if now > self._deadline:
            self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def idle(self) -> bool:
        return self._task is None and self._buffer is None

    def hang_up(self) -> None:
        if self._transport is not None:
            self._transport.close()


@dataclass(slots=True)
class HttpServer:
    """Listens with `start`; `stop` lets running requests end. on_refusal: told of what never reached the handler."""

    handler: Handler
    limits: Limits
    on_refusal: Callable[[Refusal], None] | None = None
    connections: set[_Connection] = field(default_factory=set)
    body_bytes: int = 0
    buffers: BodyBuffers = field(default_factory=BodyBuffers)
    closing: bool = False
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _server: asyncio.Server | None = None
    _sweeper: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int, context: ssl.SSLContext | None = None) -> int:
        """The port it listens on. OSError when it can't."""
        self._server = await self.loop.create_server(lambda: _Connection(self), host, port, ssl=context, backlog=1024)
        self._sweep()
        return int(self._server.sockets[0].getsockname()[1])

    async def handle(self, request: HttpRequest) -> HttpResponse:
        try:
            return await self.handler(request)
        except Refusal as refusal:
            return error_response(refusal)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("a request failed unexpectedly")
            return error_response(Refusal(Reason.FAILED, "The server failed on this request; its log says why."))

    def _sweep(self) -> None:
        """End connections that are late, and look again soon."""
        now = self.loop.time()
        for connection in list(self.connections):
            connection.end_if_late(now)
        self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)

    def count_refusal(self, refusal: Refusal) -> None:
        if self.on_refusal is not None:
            self.on_refusal(refusal)

    async def stop(self, patience_s: float) -> None:
        """Stop listening, wait for running requests for at most `patience_s`, hang up."""
        self.closing = True
        if self._server is not None:
            self._server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        give_up = time.monotonic() + patience_s
        while True:
            for connection in [c for c in self.connections if c.idle]:
                connection.hang_up()
            if not self.connections or time.monotonic() > give_up:
                break
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            with contextlib.suppress(Exception):
                connection.abort()
