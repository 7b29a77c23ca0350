"""The REST side: which path means what, who may ask for it, and what comes back."""

from __future__ import annotations

from importlib import resources
from typing import Any
from urllib.parse import unquote, urlsplit

import orjson

from missile.serving.access import Access, Principal, Role
from missile.serving.gateway import Result
from missile.serving.metrics import Metrics
from missile.serving.protocol.http1 import HttpRequest, HttpResponse
from missile.serving.protocol.request import bind, invalid
from missile.serving.protocol.rest import HEADER_LENGTH, InferDecoder, encode_infer, inflate, parse_object
from missile.serving.protocol.trace import trace_context
from missile.serving.refusal import Reason, Refusal
from missile.serving.regions import Region
from missile.serving.services import Services
from missile.serving.state import snapshot

__all__ = ["HttpApi"]

_PATHS = 4096
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
_BODY_TYPES = {"", "application/json", "application/octet-stream", "application/x-www-form-urlencoded"}
_VIEW_HEADERS = (
    ("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
     "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
)  # fmt: skip


def _json(value: Any, status: int = 200) -> HttpResponse:
    return HttpResponse(status, [orjson.dumps(value)])


class HttpApi:
    """`handle` answers one request; it raises a Refusal for everything that gets no result."""

    def __init__(self, services: Services, metrics: Metrics) -> None:
        self._services = services
        self._metrics = metrics
        self._loopback = services.config.loopback
        self._decoder = InferDecoder(services.config.limits.tensors)
        self._paths: dict[bytes, list[str]] = {}  # targets seen, taken apart
        self._view = resources.files("missile.serving.static").joinpath("view.html").read_bytes()

    async def handle(self, request: HttpRequest) -> HttpResponse:
        try:
            response = await self._route(request)
        except Refusal as refusal:
            if refusal.reason is not Reason.CANCELLED:
                self._metrics.count_refusal(refusal.reason.label)
            raise
        return response

    async def _route(self, request: HttpRequest) -> HttpResponse:
        headers = request.headers
        if self._loopback:
            self._check_local(headers)
        parts = self._paths.get(request.target)
        if parts is None:
            parts = _split(request.target)
            if len(self._paths) < _PATHS:
                self._paths[request.target] = parts
        if parts[:1] == ["v2"]:
            return await self._v2(request, parts[1:])
        if parts in ([], ["view"]):
            _method(request, "GET", "HEAD")
            return HttpResponse(200, [self._view], "text/html; charset=utf-8", _VIEW_HEADERS)
        principal = self._services.access.principal(headers.get("authorization"))
        if parts == ["metrics"]:
            _method(request, "GET")
            Access.require(principal, Role.READ)
            if principal.tenants:
                raise Refusal(Reason.FORBIDDEN, "The metrics cover all models; this token is for some of them.")
            return HttpResponse(200, [self._metrics.text()], "text/plain; version=1.0.0; charset=utf-8")
        if parts == ["missile", "state"]:
            _method(request, "GET")
            Access.require(principal, Role.READ)
            return _json(snapshot(self._services, principal))
        if parts == ["missile", "reload"]:
            _method(request, "POST")
            Access.require(principal, Role.ADMIN)
            return _json(await self._services.reload())
        raise Refusal(Reason.NOT_FOUND, f"There is nothing at {'/' + '/'.join(parts)!r:.120}.")

    def _check_local(self, headers: dict[str, str]) -> None:
        """Web pages must not reach a loopback server through the browser of whoever runs it."""
        host = headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name and name != self._services.config.host and name not in _LOCAL_HOSTS:
            raise Refusal(Reason.FORBIDDEN, "This server answers to local names only.")
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != host:
            raise Refusal(Reason.FORBIDDEN, "Requests from other web pages are refused.")

    # --- /v2

    async def _v2(self, request: HttpRequest, parts: list[str]) -> HttpResponse:
        services = self._services
        if parts[:1] == ["health"] and len(parts) == 2:
            _method(request, "GET", "HEAD")
            if parts[1] == "live":
                return _json({"live": True})
            if parts[1] == "ready":
                return _json({"ready": services.ready}, 200 if services.ready else 503)
        principal = services.access.principal(request.headers.get("authorization"))
        match parts:
            case []:
                _method(request, "GET")
                return _json(services.server_metadata())
            case ["models", "stats"]:
                _method(request, "GET")
                Access.require(principal, Role.READ)
                return _json(services.statistics(principal))
            case ["models", name, "versions", version, *rest]:
                return await self._model(request, principal, name, version, rest)
            case ["models", name, *rest]:
                return await self._model(request, principal, name, "", rest)
            case ["repository", "index"]:
                _method(request, "POST")
                Access.require(principal, Role.READ)
                wanted = parse_object(self._body(request)).get("ready", False)
                return _json(services.repository_index(principal, only_ready=wanted is True))
            case ["repository", "models", name, ("load" | "unload") as action]:
                _method(request, "POST")
                Access.require(principal, Role.ADMIN, name)
                parameters = parse_object(self._body(request)).get("parameters")
                if action == "load":
                    await services.repository_load(name, parameters if isinstance(parameters, dict) else {})
                else:
                    await services.repository_unload(name)
                return _json({})
            case ["systemsharedmemory", *rest]:
                return self._shared_memory(request, principal, rest)
            case ["cudasharedmemory", "status"] | ["cudasharedmemory", "region", _, "status"]:
                return _json([])
            case ["cudasharedmemory", *_] | ["trace", "setting"] | ["logging"]:
                raise Refusal(Reason.UNSUPPORTED, f"{parts[0]} is not supported by this server.")
        raise Refusal(Reason.NOT_FOUND, f"There is nothing at {'/v2/' + '/'.join(parts)!r:.120}.")

    async def _model(
        self, request: HttpRequest, principal: Principal, name: str, version: str, rest: list[str]
    ) -> HttpResponse:
        services = self._services
        if rest == ["infer"]:
            _method(request, "POST")
            Access.require(principal, Role.INFER, name)
            return await self._infer(request, principal, name, version)
        _method(request, "GET")
        Access.require(principal, Role.READ, name)
        match rest:
            case []:
                return _json(services.model_metadata(name, version))
            case ["ready"]:
                ready = services.model_ready(name, version)
                return _json({"name": name, "ready": ready}, 200 if ready else 503)
            case ["config"]:
                return _json(services.model_config(name, version))
            case ["stats"]:
                return _json(services.statistics(principal, name, version))
        raise Refusal(Reason.NOT_FOUND, f"Model {name!r:.80} has nothing at {'/'.join(rest)!r:.80}.")

    async def _infer(self, request: HttpRequest, principal: Principal, name: str, version: str) -> HttpResponse:
        services = self._services
        services.check_open()
        tenant = services.registry.find(name, version)
        asked = self._decoder.decode(self._body(request), request.headers.get(HEADER_LENGTH))
        inference, outputs = bind(asked, tenant, services.regions, principal, request.arrival_ns, request.head_ns)
        headers = trace_context(request.headers)
        with await services.gateway.infer(inference) as result:
            await result.deliver([(index, place) for index, _, place in outputs if place is not None])
            signature = inference.deployment.signature
            parts, head = encode_infer(asked, name, tenant.config.version, signature, inference.batch, outputs, result)
            parts = [bytes(part) for part in parts]
            headers.append(("server-timing", _server_timing(result)))
        if head is None:
            return HttpResponse(200, parts, headers=headers)
        headers.append((HEADER_LENGTH, str(head)))
        return HttpResponse(200, parts, "application/octet-stream", headers)

    def _body(self, request: HttpRequest) -> memoryview:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in _BODY_TYPES:
            raise Refusal(
                Reason.CONTENT_TYPE,
                f"Content type {kind!r:.60} is not supported; send application/json or application/octet-stream.",
            )
        encoding = request.headers.get("content-encoding", "").strip().lower()
        return inflate(request.body, encoding, self._services.config.limits.body_mib << 20)

    # --- shared memory

    def _shared_memory(self, request: HttpRequest, principal: Principal, rest: list[str]) -> HttpResponse:
        regions = self._services.regions
        name = ""
        if rest[:1] == ["region"] and len(rest) >= 3:
            name, rest = rest[1], rest[2:]
        match rest:
            case ["status"]:
                _method(request, "GET")
                Access.require(principal, Role.INFER)
                return _json([_region(region) for region in regions.status(principal, name)])
            case ["register"] if name:
                _method(request, "POST")
                Access.require(principal, Role.INFER)
                asked = parse_object(self._body(request))
                key, offset, nbytes = asked.get("key"), asked.get("offset", 0), asked.get("byte_size")
                if not isinstance(key, str) or type(offset) is not int or type(nbytes) is not int:
                    raise invalid(
                        "Registering shared memory needs 'key' (a string), 'offset' and 'byte_size' (numbers)."
                    )
                regions.register(principal, name, key, offset, nbytes)
                return _json({})
            case ["unregister"]:
                _method(request, "POST")
                Access.require(principal, Role.INFER)
                regions.unregister(principal, name)
                return _json({})
        raise Refusal(Reason.NOT_FOUND, "There is no such shared memory request.")


def _split(target: bytes) -> list[str]:
    """The parts of a target's path, unquoted; empty ones are left out, so that `/v2` and `/v2/` are the same."""
    path = target.partition(b"?")[0].decode("latin-1")
    if not path.startswith("/"):
        path = urlsplit(path).path
    return [unquote(part) for part in path.split("/") if part]


def _region(region: Region) -> dict[str, Any]:
    return {"name": region.name, "key": region.key, "offset": region.offset, "byte_size": region.nbytes}


def _method(request: HttpRequest, *allowed: str) -> None:
    if request.method not in allowed:
        raise Refusal(Reason.METHOD, f"This path takes {' and '.join(allowed)}, not {request.method:.20}.")


def _server_timing(result: Result) -> str:
    """Where the time went, ms, in the standard header's form."""
    answer = result.answer
    return (
        f"front;dur={result.front_ns() / 1e6:.3f}, queue;dur={answer.queue_ns / 1e6:.3f}, "
        f"copy;dur={(answer.copy_in_ns + answer.copy_out_ns) / 1e6:.3f}, execute;dur={answer.execute_ns / 1e6:.3f}"
    )
