"""Bad requests: the right status over both protocols, and one clear sentence."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import time
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from missile.serving.protocol.grpc_schema import METHODS, SERVICE, message

INPUT = {"name": "input0", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}


def ask(served: Any, path: str, body: Any = None, method: str = "POST", **headers: str) -> tuple[int, Any]:
    host, _, port = served.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    raw = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
    connection.request(method, path, raw, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text)


def infer(served: Any, body: Any, model: str = "finite", **headers: str) -> tuple[int, str]:
    status, answer = ask(served, f"/v2/models/{model}/infer", body, **headers)
    return status, answer.get("error", "")


def one(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{k: v for k, v in {**INPUT, **changes}.items() if v is not None}]}


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "The request is not valid JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b"[" * 5000, 400, "not valid JSON"),
        ({}, 400, "'inputs' must be a list"),
        ({"inputs": []}, 400, "takes 1 input.s. .'input0'., not 0"),
        ({"inputs": [INPUT] * 65}, 400, "at most 64"),
        (one(name="x"), 400, "Input 'input0' is missing"),
        (one(name=3), 400, "An input needs a 'name'"),
        (one(datatype="INT32"), 400, "must be FP32, not 'INT32'"),
        (one(datatype="BYTES"), 400, "must be FP32, not 'BYTES'"),
        (one(shape=[4]), 400, r"must have shape \[-1, 4\], not \[4\]"),
        (one(shape=[1, 5]), 400, r"must have shape \[-1, 4\], not \[1, 5\]"),
        (one(shape=[0, 4]), 400, "batch of 0; this model takes 1 to 4096"),
        (one(shape=[5000, 4]), 400, "batch of 5000"),
        (one(shape=[-1, 4]), 400, "needs a 'shape'"),
        (one(shape=[1, True]), 400, "needs a 'shape'"),
        (one(shape="1,4"), 400, "needs a 'shape'"),
        (one(data=[1, 2, 3]), 400, "needs 4 values for its shape; 3 were given"),
        (one(data=[1, 2, 3, "4"]), 400, "must be numbers"),
        (one(data={}), 400, "must be a list"),
        (one(data=None), 400, "exactly one of"),
        (one(parameters={"binary_data_size": 16}), 400, "exactly one of"),
        (one(data=None, parameters={"binary_data_size": 16}), 400, "claims 16 bytes of binary data, but the body ends"),
        (one(data=None, parameters={"binary_data_size": -1}), 400, "must be a number of bytes"),
        (
            one(data=None, parameters={"shared_memory_region": "r", "shared_memory_byte_size": 16}),
            400,
            "no shared memory",
        ),
        (one(data=None, parameters={"shared_memory_region": "r"}), 400, "must be a number of bytes"),
        (one(parameters={"x": {"deep": 1}}), 400, "must be an object of strings, numbers and booleans"),
        (one(data=[1, 2, 3, 1e39]), 400, "beyond FP32"),
        ({**one(), "id": 7}, 400, "id must be a string"),
        ({**one(), "id": "x" * 300}, 400, "longer than 256"),
        (
            {**one(), "outputs": [{"name": "nope"}]},
            400,
            "Output 'nope' is unknown or asked for twice; .* gives 'output0'",
        ),
        ({**one(), "outputs": [{"name": "output0"}] * 2}, 400, "asked for twice"),
        ({**one(), "outputs": [{"name": "output0", "parameters": {"classification": 3}}]}, 501, "classification"),
        ({**one(), "parameters": {"timeout": -5}}, 400, "'timeout' must be a whole number"),
        ({**one(), "parameters": {"priority": 1.5}}, 400, "'priority' must be a whole number"),
    ],
)
def test_bad_bodies(served: Any, body: Any, status: int, sentence: str) -> None:
    import re

    got, error = infer(served, body)
    assert got == status
    assert re.search(sentence, error), error
    assert "\n" not in error


def test_bad_places_and_methods(served: Any) -> None:
    assert ask(served, "/v2/models/absent/infer", one())[0] == 404
    assert ask(served, "/v2/models/mixer/versions/9", method="GET") == (
        404,
        {"error": "Model 'mixer' has no version '9'; it has '1'."},
    )
    assert ask(served, "/v3", method="GET")[0] == 404
    assert ask(served, "/v2/models/mixer/nothing", method="GET")[0] == 404
    assert ask(served, "/v2/models/mixer/infer", method="GET")[0] == 405
    assert ask(served, "/v2/models/%2e%2e%2f%2e%2e%2fetc/infer", one())[0] == 404
    assert ask(served, "/v2/trace/setting", method="GET")[0] == 501
    assert ask(served, "/v2/cudasharedmemory/region/x/register", {})[0] == 501


def test_content_types_and_codings(served: Any) -> None:
    assert infer(served, one(), content_type="text/xml")[0] == 415
    assert infer(served, one(), content_encoding="br")[0] == 415
    assert infer(served, one(), content_encoding="gzip") == (400, "The body is not valid gzip data.")
    assert infer(served, one(), Inference_Header_Content_Length="99999")[0] == 400
    assert infer(served, one(), Inference_Header_Content_Length="x")[0] == 400


def test_a_body_that_inflates_beyond_the_limit(served: Any) -> None:
    import zlib

    bomb = zlib.compress(bytes(65 << 20), 9)
    assert len(bomb) < 1 << 20
    assert infer(served, bomb, content_encoding="deflate")[0] == 413


def test_a_body_that_is_announced_too_large_is_not_read(served: Any) -> None:
    with _raw(
        served, b"POST /v2/models/mixer/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
    ) as s:
        assert b" 413 " in s.recv(4096)


def test_other_names_and_other_pages_are_refused(served: Any) -> None:
    """A web page that rebinds its name to 127.0.0.1, or posts across origins, gets nothing."""
    assert ask(served, "/v2", method="GET", Host="evil.example")[0] == 403
    assert ask(served, "/missile/reload", b"", Origin="http://evil.example")[0] == 403
    assert ask(served, "/v2", method="GET", Host="localhost")[0] == 200


def test_not_finite_where_finite_was_promised(served: Any) -> None:
    import struct

    raw = struct.pack("<4f", 1, float("nan"), 2, 3)
    head = json.dumps(one(data=None, parameters={"binary_data_size": 16})).encode()
    status, error = infer(served, head + raw, Inference_Header_Content_Length=str(len(head)))
    assert (status, error) == (400, "Input 'input0' holds NaN or infinity, and this model takes finite values only.")
    body = {"inputs": [{**INPUT, "shape": [1, 5], "datatype": "INT64", "data": [0, 1, 2, 3, 10**9]}]}
    status, error = infer(served, body, model="embedding")
    assert status == 500
    assert error.startswith("The model of tenant 'embedding' failed: IndexError")


def test_trace_context_comes_back(served: Any) -> None:
    host, _, port = served.http.rpartition(":")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for sent, expected in ((parent, parent), ("nonsense", None)):
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("POST", "/v2/models/finite/infer", json.dumps(one()), {"traceparent": sent})
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("traceparent")) == (200, expected)
        assert "execute;dur=" in answer.getheader("server-timing", "")
        connection.close()


def test_the_parts_of_a_request_do_not_overlap(served: Any) -> None:
    """What the front end does before the engine has the request counts once: 16,384 numbers take a while to read."""
    host, _, port = served.http.rpartition(":")
    body = json.dumps(one(shape=[4096, 4], data=[0.123456789] * 16384)).encode()
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    for _ in range(3):
        begun = time.perf_counter()
        connection.request("POST", "/v2/models/finite/infer", body)
        answer = connection.getresponse()
        took_ms = 1000 * (time.perf_counter() - begun)
        answer.read()
        assert answer.status == 200
        timing = answer.getheader("server-timing", "")
        parts = {name: float(value) for name, _, value in (part.partition(";dur=") for part in timing.split(", "))}
        assert set(parts) == {"front", "queue", "copy", "execute"}
        assert sum(parts.values()) <= took_ms + 0.005  # rounded to microseconds
    connection.close()


# --- gRPC


def _call(served: Any, method: str, request: bytes, timeout: float = 20.0) -> Any:
    with grpc.insecure_channel(served.grpc) as channel:
        return channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout=timeout)


def _request(**changes: Any) -> Any:
    request = message("ModelInferRequest")(model_name="finite")
    tensor = request.inputs.add(name="input0", datatype="FP32", shape=[1, 4])
    tensor.contents.fp32_contents.extend([1, 2, 3, 4])
    for key, value in changes.items():
        setattr(request, key, value)
    return request


def test_typed_contents_are_taken(served: Any) -> None:
    raw = _call(served, "ModelInfer", _request().SerializeToString())
    answer = message("ModelInferResponse").FromString(raw)
    assert len(answer.raw_output_contents[0]) == 16


def _unused_raw(request: Any) -> None:
    request.raw_input_contents.append(b"1234")


def _bad_shape(request: Any) -> None:
    request.inputs[0].shape[1] = -7


def _bytes_tensor(request: Any) -> None:
    request.inputs[0].datatype = "BYTES"


def _unknown(request: Any) -> None:
    request.model_name = "absent"


def _expired(request: Any) -> None:
    request.parameters["timeout"].int64_param = 1


def _too_many(request: Any) -> None:
    for _ in range(70):
        request.outputs.add(name="output0")


@pytest.mark.parametrize(
    ("change", "code", "sentence"),
    [
        (_unused_raw, "INVALID_ARGUMENT", "both contents and raw contents"),
        (_bad_shape, "INVALID_ARGUMENT", "must have shape"),
        (_bytes_tensor, "INVALID_ARGUMENT", "needs raw_input_contents"),
        (_unknown, "NOT_FOUND", "There is no model 'absent'."),
        (_expired, "DEADLINE_EXCEEDED", "deadline passed"),
        (_too_many, "INVALID_ARGUMENT", "more tensors"),
    ],
)
def test_bad_grpc_requests(served: Any, change: Any, code: str, sentence: str) -> None:
    request = _request()
    change(request)
    with pytest.raises(grpc.RpcError) as caught:
        _call(served, "ModelInfer", request.SerializeToString())
    assert caught.value.code().name == code
    assert sentence in caught.value.details()


# --- fuzzing: whatever comes, a clear refusal and no crash


def _raw(served: Any, data: bytes) -> socket.socket:
    host, _, port = served.http.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(data)
    return connection


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["FP32", "input0"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "id", "binary_data_size"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=JSON)
def test_any_json_is_answered_with_a_sentence(served: Any, body: Any) -> None:
    status, error = infer(served, json.dumps(body).encode())
    assert status in (400, 501)
    assert error.endswith(".")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), method=st.sampled_from(sorted(set(METHODS) - {"ModelStreamInfer"})))
def test_any_bytes_over_grpc(served: Any, data: bytes, method: str) -> None:
    code, details = _outcome(served, method, data)
    assert code in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "PERMISSION_DENIED"), (code, details)


def _outcome(served: Any, method: str, data: bytes) -> tuple[str, str]:
    try:
        _call(served, method, data)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


GOOD_HEAD = json.dumps(one(data=None, parameters={"binary_data_size": 16})).encode()
GOOD = (
    b"POST /v2/models/finite/infer HTTP/1.1\r\nHost: localhost\r\nInference-Header-Content-Length: "
    + str(len(GOOD_HEAD)).encode()
    + b"\r\nContent-Length: "
    + str(len(GOOD_HEAD) + 16).encode()
    + b"\r\nConnection: close\r\n\r\n"
    + GOOD_HEAD
    + bytes(16)
)


def _mutated(good: bytes, chance: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(chance.randint(1, 6)):
        if not data:
            break
        at = chance.randrange(len(data))
        kind = chance.randrange(4)
        if kind == 0:
            data[at] = chance.randrange(256)
        elif kind == 1:
            del data[at : at + chance.randint(1, 20)]
        elif kind == 2:
            data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
        else:
            data[at:at] = data[at : at + chance.randint(1, 40)]
    return bytes(data)


def _answer(served: Any, data: bytes) -> bytes:
    """The status line, or b"" when the server hung up or still waits for more."""
    with _raw(served, data) as connection:
        connection.shutdown(socket.SHUT_WR)
        try:
            return connection.recv(65536).split(b"\r\n", 1)[0]
        except ConnectionError:
            return b""


def _fuzz(served: Any, count: int, seed: int) -> None:
    """Binary heads and data, as bytes on a socket."""
    chance = random.Random(seed)
    for index in range(count):
        status = _answer(served, _mutated(GOOD, chance))
        # A mutation may leave the request valid. 500 would be ours, and there must be none.
        assert status == b"" or status.split(b" ")[1][:1] in (b"2", b"4") or b" 501 " in status, (index, status)


def _fuzz_json(served: Any, count: int, seed: int) -> None:
    """JSON bodies of which one or a few entries are something else, over connections that stay."""
    chance = random.Random(seed)
    connection = http.client.HTTPConnection(served.http, timeout=10)
    for index in range(count):
        body = json.loads(json.dumps(one()))
        for _ in range(chance.randint(1, 3)):
            _spoil(body, chance)
        connection.request("POST", "/v2/models/finite/infer", json.dumps(body))
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status in (200, 400, 501), (index, answer.status, body)
        assert answer.status == 200 or json.loads(text)["error"].endswith("."), (body, text)
    connection.close()


def _spoil(value: Any, chance: random.Random) -> None:
    """Change, drop or add one entry somewhere in a JSON object or list."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = chance.choice(keys)
        if not isinstance(value[key], (dict, list)) or not value[key] or chance.random() < 0.3:
            break
        value = value[key]
    strange = (
        None,
        True,
        -1,
        2**63,
        1e308,
        0.5,
        "",
        "FP64",
        "x" * 500,
        [],
        {},
        [[]],
        [1, [2]],
        {"a": {}},
        "NaN",
        [None] * 9,
    )
    if chance.random() < 0.2:
        del value[key]
    else:
        value[key] = chance.choice(strange)


def _fuzz_grpc(served: Any, count: int, seed: int) -> None:
    """Messages of which bytes were changed, over one channel."""
    chance = random.Random(seed)
    good = _request().SerializeToString()
    with grpc.insecure_channel(served.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for index in range(count):
            raw = _mutated(good, chance)
            error = call.future(raw, timeout=10).exception()
            code = "OK" if error is None else error.code().name
            assert code in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"), (index, error)


def test_mutated_requests(served: Any) -> None:
    starts = served.server.services.supervisor.starts
    _fuzz(served, 1000, seed=1)
    _fuzz_json(served, 1000, seed=1)
    _fuzz_grpc(served, 500, seed=1)
    assert ask(served, "/v2/health/ready", method="GET")[0] == 200
    assert served.server.services.supervisor.starts == starts
    give_up = time.monotonic() + 5  # requests whose client hung up are given back when the engine has answered
    while served.server.services.gateway.arena_used and time.monotonic() < give_up:
        time.sleep(0.01)
    assert served.server.services.gateway.arena_used == 0


@pytest.mark.slow
def test_a_hundred_thousand_mutated_requests_leak_nothing(served: Any) -> None:
    from missile.serving.state import resident_bytes

    pid = served.server.services.supervisor.pid
    starts = served.server.services.supervisor.starts
    for fuzz in (_fuzz, _fuzz_json, _fuzz_grpc):
        fuzz(served, 2_000, 2)
    before = resident_bytes(pid), resident_bytes(os.getpid())
    _fuzz(served, 34_000, seed=3)
    _fuzz_json(served, 30_000, seed=3)
    _fuzz_grpc(served, 30_000, seed=3)
    after = resident_bytes(pid), resident_bytes(os.getpid())
    assert served.server.services.supervisor.starts == starts
    assert ask(served, "/v2/health/ready", method="GET")[0] == 200
    assert served.server.services.gateway.arena_used == 0
    for one_before, one_after in zip(before, after, strict=True):
        assert one_after - one_before < 32 << 20
