"""REST bodies: JSON, with tensors in it or behind it (the binary tensor data extension)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import orjson

from missile.serving.gateway import Result
from missile.serving.protocol.request import GivenInput, InferRequest, WantedOutput, invalid, to_numbers
from missile.serving.refusal import Reason, Refusal
from missile.serving.regions import RegionSlice
from missile.serving.tensors import DATATYPES, ModelSignature

__all__ = ["HEADER_LENGTH", "InferDecoder", "encode_infer", "inflate", "parse_object"]

HEADER_LENGTH = "inference-header-content-length"
_SCALARS = (str, int, float, bool)
_KEPT_BYTES = 4096  # longer heads are read each time
_KEPT_HEADS = 256


def inflate(body: memoryview, encoding: str, limit: int) -> memoryview:
    """Undo `gzip` or `deflate`. TOO_LARGE as soon as more than `limit` bytes come out; CONTENT_TYPE for other codings."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refusal(Reason.CONTENT_TYPE, f"Content encoding {encoding!r:.40} is not supported; gzip and deflate are.")
    worker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        inflated = worker.decompress(body, limit + 1)
    except zlib.error:
        raise invalid(f"The body is not valid {encoding} data.") from None
    if len(inflated) > limit:
        raise Refusal(Reason.TOO_LARGE, f"The body is larger than the {limit} bytes that this server takes.")
    if not worker.eof:
        raise invalid(f"The body is not valid {encoding} data: it ends early.")
    return memoryview(inflated)


def parse_object(body: memoryview | bytes, what: str = "The body") -> dict[str, Any]:
    """A JSON object; an empty body counts as an empty one."""
    if not len(body):
        return {}
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"{what} is not valid JSON: {error!s:.100}.") from None
    if not isinstance(value, dict):
        raise invalid(f"{what} must be a JSON object.")
    return value


class InferDecoder:
    """Reads infer requests. Only forms are checked here; `bind` checks them against the model.

    Clients send the same JSON again and again when tensors come behind it or by shared memory, so what was read of such a
    head is kept, by its bytes.
    """

    def __init__(self, max_tensors: int) -> None:
        self._max_tensors = max_tensors
        self._known: dict[bytes, tuple[InferRequest, tuple[int, ...]]] = {}

    def decode(self, body: memoryview, header_length: str | None) -> InferRequest:
        """header_length: the header of that name (`HEADER_LENGTH`), None when there was none."""
        size = len(body)
        if header_length is not None:
            if not header_length.isdecimal() or len(header_length) > 12 or int(header_length) > size:
                raise invalid("Inference-Header-Content-Length must be a number of bytes within the body.")
            size = int(header_length)
        head = bytes(body[:size]) if size <= _KEPT_BYTES else b""
        found = self._known.get(head)
        if found is None:
            found = self._read(body[:size])
            if head and not any(one.numbers is not None for one in found[0].inputs):
                if len(self._known) >= _KEPT_HEADS:
                    self._known.clear()
                self._known[head] = found
        request, sizes = found
        return request if not sizes and size == len(body) else _with_tail(request, sizes, body[size:])

    def _read(self, head: memoryview) -> tuple[InferRequest, tuple[int, ...]]:
        """The request without its binary data, and how many bytes of them each input has (-1: none)."""
        raw = parse_object(head, "The request")
        inputs, sizes = [], []
        for entry in _entries(raw, "inputs", self._max_tensors, required=True):
            given, nbytes = _input(entry)
            inputs.append(given)
            sizes.append(nbytes)
        parameters = _parameters(raw, "the request")
        binary = parameters.get("binary_data_output")
        outputs = [_output(entry, binary) for entry in _entries(raw, "outputs", self._max_tensors)]
        request_id = raw.get("id", "")
        if not isinstance(request_id, str):
            raise invalid("The request's id must be a string.")
        request = InferRequest(inputs, outputs, request_id, parameters)
        return request, tuple(sizes) if any(nbytes >= 0 for nbytes in sizes) else ()


def _with_tail(request: InferRequest, sizes: tuple[int, ...], tail: memoryview) -> InferRequest:
    """`request` with the binary data behind the JSON handed out in order."""
    used = 0
    inputs = list(request.inputs)
    for index, nbytes in enumerate(sizes):
        if nbytes < 0:
            continue
        given = inputs[index]
        if nbytes > len(tail) - used:
            raise invalid(f"Input {given.name!r} claims {nbytes} bytes of binary data, but the body ends before.")
        inputs[index] = GivenInput(given.name, given.datatype, given.shape, tail[used : used + nbytes])
        used += nbytes
    if used != len(tail):
        raise invalid(f"The body has {len(tail) - used} bytes of binary data that no input claims.")
    return InferRequest(inputs, request.outputs, request.id, request.parameters)


def _entries(raw: dict[str, Any], key: str, most: int, *, required: bool = False) -> list[dict[str, Any]]:
    entries = raw.get(key)
    if entries is None and not required:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise invalid(f"{key!r} must be a list of tensors.")
    if len(entries) > most:
        raise invalid(f"{key!r} has {len(entries)} tensors; this server takes at most {most}.")
    return entries


def _parameters(raw: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = raw.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict) or not all(isinstance(v, _SCALARS) for v in parameters.values()):
        raise invalid(f"The parameters of {where} must be an object of strings, numbers and booleans.")
    return parameters


def _text(entry: dict[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise invalid(f"{where} needs a {key!r} (a string).")
    return value


def _size(parameters: dict[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = parameters.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise invalid(f"{key!r} of {name!r} must be a number of bytes.")
    return value


def _region(parameters: dict[str, Any], name: str) -> tuple[str, int, int] | None:
    region = parameters.get("shared_memory_region")
    if region is None:
        return None
    if not isinstance(region, str):
        raise invalid(f"'shared_memory_region' of {name!r} must be a string.")
    return (
        region,
        _size(parameters, "shared_memory_offset", name, 0),
        _size(parameters, "shared_memory_byte_size", name),
    )


def _input(entry: dict[str, Any]) -> tuple[GivenInput, int]:
    """An input, and how many bytes of binary data it claims (-1: none)."""
    name = _text(entry, "name", "An input")
    datatype = _text(entry, "datatype", f"Input {name!r:.80}")
    shape = entry.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > 64
        or not all(type(size) is int and 0 <= size < 2**31 for size in shape)
    ):
        raise invalid(f"Input {name!r:.80} needs a 'shape' (a list of whole numbers).")
    parameters = _parameters(entry, f"input {name!r:.80}")
    region = _region(parameters, name)
    binary = _size(parameters, "binary_data_size", name) if "binary_data_size" in parameters else -1
    numbers = entry.get("data")
    if numbers is not None and not isinstance(numbers, list):
        raise invalid(f"The data of input {name!r:.80} must be a list.")
    if (binary >= 0) + (numbers is not None) + (region is not None) != 1:
        raise invalid(f"Input {name!r:.80} needs exactly one of 'data', 'binary_data_size' and 'shared_memory_region'.")
    return GivenInput(name, datatype, tuple(shape), None, numbers, region), binary


def _output(entry: dict[str, Any], binary: Any) -> WantedOutput:
    name = _text(entry, "name", "An output")
    parameters = _parameters(entry, f"output {name!r:.80}")
    if parameters.get("classification"):
        raise Refusal(Reason.UNSUPPORTED, "The classification extension is not supported.")
    choice = parameters.get("binary_data", binary)
    if choice is not None and not isinstance(choice, bool):
        raise invalid(f"'binary_data' of output {name!r:.80} must be a boolean.")
    return WantedOutput(name, choice, _region(parameters, name))


def encode_infer(
    request: InferRequest,
    model: str,
    version: str,
    signature: ModelSignature,
    batch: int,
    outputs: Sequence[tuple[int, WantedOutput, RegionSlice | None]],
    result: Result,
) -> tuple[list[bytes | memoryview], int | None]:
    """(the parts of the body, length of its JSON when binary data follow it). Parts may be views of `result`.

    Outputs that have a place in shared memory are described only; `Result.deliver` writes them.
    """
    every = bool(request.parameters.get("binary_data_output", False))
    tail: list[bytes | memoryview] = []
    described = []
    for index, wanted, place in outputs:
        tensor = signature.outputs[index]
        raw = result.output(index)
        entry: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(signature.shape(tensor, batch)),
        }
        if place is not None:
            entry["parameters"] = {
                "shared_memory_region": place.region.name,
                "shared_memory_offset": place.offset,
                "shared_memory_byte_size": place.nbytes,
            }
        elif every if wanted.binary is None else wanted.binary:
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            entry["data"] = to_numbers(raw, DATATYPES[tensor.datatype])
        described.append(entry)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id:
        answer["id"] = request.id
    head = orjson.dumps(answer)
    return [head, *tail], len(head) if tail else None
