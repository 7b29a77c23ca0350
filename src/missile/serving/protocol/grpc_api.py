"""The gRPC side: the protocol's service on grpc.aio, answering from the same services as REST."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from missile.errors import MisuseError
from missile.serving.access import Access, Principal, Role
from missile.serving.config import ServerConfig
from missile.serving.metrics import Metrics
from missile.serving.protocol.grpc_schema import METHODS, SERVICE, message
from missile.serving.protocol.request import GivenInput, InferRequest, WantedOutput, bind, invalid
from missile.serving.protocol.trace import trace_context
from missile.serving.refusal import Reason, Refusal
from missile.serving.services import Services

__all__ = ["GrpcApi", "start_grpc"]

log = logging.getLogger("missile.grpc")

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_PIPELINED = 16  # requests of one stream that run at once

_InferRequest = message("ModelInferRequest")
_InferResponse = message("ModelInferResponse")
_StreamResponse = message("ModelStreamInferResponse")


def _parameters(given: Any) -> dict[str, Any]:
    found = {}
    for key, value in given.items():
        choice = value.WhichOneof("parameter_choice")
        if choice is not None:
            found[key] = getattr(value, choice)
    return found


def _region(parameters: dict[str, Any], name: str) -> tuple[str, int, int] | None:
    region = parameters.get("shared_memory_region")
    if region is None:
        return None
    offset, nbytes = parameters.get("shared_memory_offset", 0), parameters.get("shared_memory_byte_size")
    if not isinstance(region, str) or type(offset) is not int or type(nbytes) is not int:
        raise invalid(f"The shared memory parameters of {name!r:.80} are a region, a byte size and an offset.")
    return region, offset, nbytes


def decode_infer(request: Any, max_tensors: int) -> InferRequest:
    """Read a ModelInferRequest. Only forms are checked here; `bind` checks it against the model."""
    if max(len(request.inputs), len(request.outputs)) > max_tensors:
        raise invalid(f"The request has more tensors than the {max_tensors} that this server takes.")
    raws = list(request.raw_input_contents)
    next_raw = 0
    inputs = []
    for tensor in request.inputs:
        region = _region(_parameters(tensor.parameters), tensor.name) if tensor.parameters else None
        raw = numbers = None
        if region is None and raws:
            if next_raw == len(raws):
                raise invalid(f"raw_input_contents holds {len(raws)} tensors, too few for the inputs.")
            raw = raws[next_raw]
            next_raw += 1
            if tensor.HasField("contents"):
                raise invalid(f"Input {tensor.name!r:.80} has both contents and raw contents.")
        elif region is None:
            contents = _CONTENTS.get(tensor.datatype)
            if contents is None:
                raise invalid(f"Input {tensor.name!r:.80} of type {tensor.datatype!r:.40} needs raw_input_contents.")
            numbers = list(getattr(tensor.contents, contents))
        inputs.append(GivenInput(tensor.name, tensor.datatype, tuple(tensor.shape), raw, numbers, region))
    if next_raw != len(raws):
        raise invalid(f"raw_input_contents holds {len(raws)} tensors, but {next_raw} inputs take theirs from it.")
    outputs = []
    for wanted in request.outputs:
        parameters = _parameters(wanted.parameters)
        if parameters.get("classification"):
            raise Refusal(Reason.UNSUPPORTED, "The classification extension is not supported.")
        outputs.append(WantedOutput(wanted.name, True, _region(parameters, wanted.name)))
    return InferRequest(inputs, outputs, request.id, _parameters(request.parameters))


class GrpcApi:
    """One coroutine per method, named like it; each takes the request and who asks, and returns the response."""

    def __init__(self, services: Services, metrics: Metrics) -> None:
        self._services = services
        self._metrics = metrics

    def handlers(self) -> Any:
        """What a grpc.aio server is given."""
        found = {}
        for name, (request, response, stream) in METHODS.items():
            make = grpc.stream_stream_rpc_method_handler if stream else grpc.unary_unary_rpc_method_handler
            # Bytes come in unparsed: what can't be parsed is the client's mistake, and gRPC would call it UNKNOWN.
            found[name] = make(
                self._stream if stream else self._unary(getattr(self, name), message(request)),
                response_serializer=message(response).SerializeToString,
            )
        return grpc.method_handlers_generic_handler(SERVICE, found)

    def _unary(
        self, method: Callable[[Any, Principal, int, Any], Awaitable[Any]], kind: Any
    ) -> Callable[[bytes, Any], Awaitable[Any]]:
        open_to_all = method.__name__ in ("ServerLive", "ServerReady")

        async def answer(raw: bytes, context: Any) -> Any:
            arrival = time.monotonic_ns()
            try:
                who = Principal("", Role.READ) if open_to_all else self._who(context)
                return await method(_parsed(kind, raw), who, arrival, context)
            except Refusal as refusal:
                self._metrics.count_refusal(refusal.reason.label)
                await context.abort(grpc.StatusCode[refusal.reason.grpc], str(refusal))
            except (asyncio.CancelledError, grpc.RpcError, grpc.aio.AbortError):
                raise
            except Exception:
                log.exception("a request failed unexpectedly")
                await context.abort(grpc.StatusCode.INTERNAL, "The server failed on this request; its log says why.")

        return answer

    def _who(self, context: Any) -> Principal:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        if trace := trace_context(metadata):
            context.set_trailing_metadata(tuple(trace))
        return self._services.access.principal(metadata.get("authorization"))

    # --- inference

    async def ModelInfer(self, request: Any, who: Principal, arrival: int, context: Any) -> Any:  # noqa: N802
        Access.require(who, Role.INFER, request.model_name)
        services = self._services
        services.check_open()
        tenant = services.registry.find(request.model_name, request.model_version)
        asked = decode_infer(request, services.config.limits.tensors)
        inference, outputs = bind(asked, tenant, services.regions, who, arrival)
        response = _InferResponse(model_name=tenant.name, model_version=tenant.config.version, id=asked.id)
        signature = inference.deployment.signature
        with await services.gateway.infer(inference) as result:
            await result.deliver([(index, place) for index, _, place in outputs if place is not None])
            for index, _, place in outputs:
                tensor = signature.outputs[index]
                entry = response.outputs.add(
                    name=tensor.name, datatype=tensor.datatype, shape=signature.shape(tensor, inference.batch)
                )
                if place is None:
                    response.raw_output_contents.append(bytes(result.output(index)))
                else:
                    entry.parameters["shared_memory_region"].string_param = place.region.name
                    entry.parameters["shared_memory_byte_size"].int64_param = place.nbytes
                    entry.parameters["shared_memory_offset"].int64_param = place.offset
        return response

    async def _stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Requests of a stream run side by side, at most `_PIPELINED`; answers come in their order."""
        try:
            who = self._who(context)
        except Refusal as refusal:
            await context.abort(grpc.StatusCode[refusal.reason.grpc], str(refusal))
            return
        running: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(_PIPELINED)

        async def read() -> None:
            try:
                async for request in requests:
                    await running.put(asyncio.create_task(self._streamed(request, who, context)))
            finally:
                await running.put(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await running.get()) is not None:
                yield await task
        finally:
            reader.cancel()
            while not running.empty():
                if (task := running.get_nowait()) is not None:
                    task.cancel()

    async def _streamed(self, raw: bytes, who: Principal, context: Any) -> Any:
        request = _InferRequest()
        try:
            request = _parsed(_InferRequest, raw)
            return _StreamResponse(infer_response=await self.ModelInfer(request, who, time.monotonic_ns(), context))
        except Refusal as refusal:
            self._metrics.count_refusal(refusal.reason.label)
            return _StreamResponse(error_message=str(refusal), infer_response=_InferResponse(id=request.id))

    # --- health and metadata

    async def ServerLive(self, *_: Any) -> Any:  # noqa: N802
        return message("ServerLiveResponse")(live=True)

    async def ServerReady(self, *_: Any) -> Any:  # noqa: N802
        return message("ServerReadyResponse")(ready=self._services.ready)

    async def ModelReady(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        Access.require(who, Role.READ, request.name)
        return message("ModelReadyResponse")(ready=self._services.model_ready(request.name, request.version))

    async def ServerMetadata(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        return message("ServerMetadataResponse")(**self._services.server_metadata())

    async def ModelMetadata(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        Access.require(who, Role.READ, request.name)
        return _filled("ModelMetadataResponse", self._services.model_metadata(request.name, request.version))

    async def ModelConfig(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        Access.require(who, Role.READ, request.name)
        return _filled("ModelConfigResponse", {"config": self._services.model_config(request.name, request.version)})

    async def ModelStatistics(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        Access.require(who, Role.READ, request.name or None)
        return _filled("ModelStatisticsResponse", self._services.statistics(who, request.name, request.version))

    # --- repository and shared memory

    async def RepositoryIndex(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        Access.require(who, Role.READ)
        return _filled(
            "RepositoryIndexResponse", {"models": self._services.repository_index(who, only_ready=request.ready)}
        )

    async def RepositoryModelLoad(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        Access.require(who, Role.ADMIN, request.model_name)
        await self._services.repository_load(request.model_name, dict(request.parameters))
        return message("RepositoryModelLoadResponse")()

    async def RepositoryModelUnload(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        Access.require(who, Role.ADMIN, request.model_name)
        await self._services.repository_unload(request.model_name)
        return message("RepositoryModelUnloadResponse")()

    async def SystemSharedMemoryStatus(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        Access.require(who, Role.INFER)
        response = message("SystemSharedMemoryStatusResponse")()
        for region in self._services.regions.status(who, request.name):
            entry = response.regions[region.name]
            entry.name, entry.key, entry.offset, entry.byte_size = region.name, region.key, region.offset, region.nbytes
        return response

    async def SystemSharedMemoryRegister(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        Access.require(who, Role.INFER)
        self._services.regions.register(who, request.name, request.key, request.offset, request.byte_size)
        return message("SystemSharedMemoryRegisterResponse")()

    async def SystemSharedMemoryUnregister(self, request: Any, who: Principal, *_: Any) -> Any:  # noqa: N802
        Access.require(who, Role.INFER)
        self._services.regions.unregister(who, request.name)
        return message("SystemSharedMemoryUnregisterResponse")()

    async def CudaSharedMemoryStatus(self, *_: Any) -> Any:  # noqa: N802
        return message("CudaSharedMemoryStatusResponse")()


def _parsed(kind: Any, raw: bytes) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise invalid(f"The request is not a valid {kind.DESCRIPTOR.name} message.") from None


def _filled(name: str, values: dict[str, Any]) -> Any:
    return json_format.ParseDict(values, message(name)())


async def start_grpc(api: GrpcApi, config: ServerConfig, folder: Path) -> tuple[Any, int]:
    """(a started server, the port it listens on). MisuseError when it can't listen there."""
    options: Iterable[tuple[str, Any]] = (
        ("grpc.max_receive_message_length", config.limits.body_mib << 20),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", 32 * 1024),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", int(config.limits.write_seconds * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    )
    server = grpc.aio.server(options=tuple(options), maximum_concurrent_rpcs=8 * config.limits.connections)
    server.add_generic_rpc_handlers((api.handlers(),))
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"{host}:{config.grpc_port}"
    try:
        if config.tls_certificate is not None and config.tls_key is not None:
            pair = ((folder / config.tls_key).read_bytes(), (folder / config.tls_certificate).read_bytes())
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(address)
    except (RuntimeError, OSError) as error:
        raise MisuseError(f"{address} can't be listened on by gRPC: {str(error).splitlines()[0]}.") from error
    await server.start()
    return server, int(port)
