"""What a client can't reach: other paths, other clients' memory, and the log."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import grpc
import pytest
from serving_harness import SERVER
from test_serving_errors import _request, ask, infer, one

from missile.serving.protocol.grpc_schema import SERVICE

REGISTER = "/v2/systemsharedmemory/region/{}/register"


@pytest.fixture
def region() -> Any:
    """An object of 4,096 bytes under /dev/shm, by name."""
    path = Path("/dev/shm") / f"missile-test-security-{os.getpid()}"
    path.write_bytes(struct.pack("<4f", 1, 2, 3, 4).ljust(4096, b"\0"))
    yield path
    path.unlink()


@pytest.mark.parametrize(
    "key", ["../etc/passwd", "/../etc/passwd", "a/b", "..", ".", "", "//etc/passwd", "a\0b", "/dev/shm/x", ".hidden"]
)
def test_keys_lead_nowhere_else(served: Any, key: str) -> None:
    status, answer = ask(served, REGISTER.format("away"), {"key": key, "byte_size": 16})
    assert status == 400
    assert "a key of letters" in answer["error"]


def test_links_and_folders_are_not_opened(served: Any, region: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4096))
    link, folder = region.with_name(region.name + "-link"), region.with_name(region.name + "-folder")
    link.symlink_to(secret)
    folder.mkdir()
    try:
        for path in (link, folder):
            status, answer = ask(served, REGISTER.format("away"), {"key": path.name, "byte_size": 16})
            assert status == 400, answer
    finally:
        link.unlink()
        folder.rmdir()


def test_regions_and_outputs_are_their_owners_alone(launch: Any, region: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients with tokens of their own: neither reads, lists, replaces nor removes the other's region."""
    for name in ("ONE", "TWO"):
        monkeypatch.setenv(f"{name}_TOKEN", f"{name.lower()}-token-0123456789")
    tokens = 'tokens = [{role = "infer", env = "ONE_TOKEN"}, {role = "infer", env = "TWO_TOKEN"}]\n'
    text = '[[tenant]]\nname = "finite"\nmodel = "serving_models:identity"\nclass = "BE"\noptions = {size = 4}\n'
    running = launch(text, server=SERVER + tokens)
    mine, theirs = ({"Authorization": f"Bearer {name}-token-0123456789"} for name in ("one", "two"))
    registered = {"key": region.name, "byte_size": 16}
    assert ask(running, REGISTER.format("r"), registered, **mine)[0] == 200
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 16}
    request = one(data=None, parameters=place)
    assert infer(running, request, **mine)[0] == 200
    status, error = infer(running, request, **theirs)
    assert (status, "no shared memory region 'r'" in error) == (400, True), error
    listed = "/v2/systemsharedmemory/status"
    assert [r["name"] for r in ask(running, listed, method="GET", **mine)[1]] == ["r"]
    assert ask(running, listed, method="GET", **theirs)[1] == []
    assert ask(running, "/v2/systemsharedmemory/unregister", {}, **theirs)[0] == 200
    assert infer(running, request, **mine)[0] == 200
    outputs = [{"name": "output0", "parameters": place}]
    before = region.read_bytes()
    assert infer(running, {**one(data=[9, 9, 9, 9]), "outputs": outputs}, **theirs)[0] == 400
    assert region.read_bytes() == before


def test_logs_hold_no_payloads(launch: Any, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    """Neither what is asked, nor what is answered, nor what was wrong with it."""
    caplog.set_level("DEBUG")
    running = launch(
        '[[tenant]]\nname = "embedding"\nmodel = "serving_models:embedding"\nclass = "BE"\n'
        '[[tenant]]\nname = "finite"\nmodel = "serving_models:identity"\nclass = "BE"\noptions = {size = 4}\n'
    )
    assert infer(running, one(data=[73519.25, 2, 3, 4]))[0] == 200
    assert infer(running, one(data=["73519.25", 2, 3, 4]))[0] == 400
    assert infer(running, b'{"inputs": 73519.25')[0] == 400
    far = one(shape=[1, 5], datatype="INT64", data=[0, 1, 2, 3, 73519])
    assert infer(running, far, model="embedding")[0] == 500
    with grpc.insecure_channel(running.grpc) as channel:
        request = _request()
        request.inputs[0].ClearField("contents")
        request.raw_input_contents.append(struct.pack("<4f", 73519.25, 1, 2, 3))
        channel.unary_unary(f"/{SERVICE}/ModelInfer")(request.SerializeToString(), timeout=20)
    written = capfd.readouterr()
    everything = written.out + written.err + caplog.text
    assert "tenant finite is ready" in everything
    assert "73519" not in everything


def test_both_spellings_of_the_root_answer(served: Any) -> None:
    assert ask(served, "/v2", method="GET") == ask(served, "/v2/", method="GET")
    assert ask(served, "/v2/", method="GET")[0] == 200
    status, answer = ask(served, "/v2/models/finite/", method="GET")
    assert (status, answer["name"]) == (200, "finite")


def test_trace_context_comes_back_over_grpc(served: Any) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with grpc.insecure_channel(served.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for sent, expected in ((parent, parent), ("nonsense", None)):
            metadata = (("traceparent", sent), ("tracestate", "a=b"))
            _, answered = call.with_call(_request().SerializeToString(), metadata=metadata, timeout=20)
            back = dict(answered.trailing_metadata())
            assert back.get("traceparent") == expected
            assert back.get("tracestate") == (expected and "a=b")
