"""What happens when things go wrong: overload, a dead engine, stuck clients, clients that leave, reloads, shutdown."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from serving_harness import SERVER
from test_serving_errors import ask

LIMITED = """
[[tenant]]
name = "sleeper"
model = "serving_models:sleeper"
class = "LS"
slo_ms = 100
quota = {queue = 5}

[[tenant]]
name = "trouble"
model = "serving_models:trouble"
class = "BE"
"""


def body(*values: float) -> dict[str, Any]:
    return {"inputs": [{"name": "input0", "datatype": "FP32", "shape": [1, len(values)], "data": list(values)}]}


def infer(running: Any, model: str, *values: float, **more: Any) -> tuple[int, Any]:
    return ask(running, f"/v2/models/{model}/infer", {**body(*values), **more})


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.02)


def ready(running: Any) -> bool:
    return bool(ask(running, "/v2/health/ready", method="GET")[0] == 200)


def test_overload_is_shed_by_rule_and_passes(launch: Any) -> None:
    """Ten times more than 50/s for two seconds: at most five wait, the rest is refused at once; then all is well."""
    running = launch(LIMITED)
    outcomes: list[tuple[int, float]] = []

    def one(_: int) -> None:
        start = time.monotonic()
        status, answer = infer(running, "sleeper", 1, 2, 3, 4)
        outcomes.append((status, time.monotonic() - start))
        assert status == 200 or answer["error"].startswith("Model 'sleeper' has 5 requests waiting")

    with ThreadPoolExecutor(25) as pool:
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            list(pool.map(one, range(25)))
    statuses = [status for status, _ in outcomes]
    assert set(statuses) == {200, 503}
    assert statuses.count(503) > statuses.count(200)
    assert max(took for status, took in outcomes if status == 200) < 2.0
    time.sleep(0.2)
    start = time.monotonic()
    assert infer(running, "sleeper", 1, 2, 3, 4)[0] == 200
    assert time.monotonic() - start < 1.0
    measures = running.server.services.registry.find("sleeper").measures
    assert measures.refused["overloaded"] == statuses.count(503)


def test_a_predicted_wait_beyond_the_rule_is_refused(launch: Any) -> None:
    running = launch(LIMITED.replace("quota = {queue = 5}", "quota = {queue = 100, wait_ms = 50.0}"))
    assert infer(running, "sleeper", 1, 2, 3, 4)[0] == 200  # from it the service time is known
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: infer(running, "sleeper", 1, 2, 3, 4), range(12)))
    refused = [answer["error"] for status, answer in answers if status == 503]
    assert 0 < len(refused) < 12
    assert all("more than the 50 ms it accepts" in error for error in refused)


def test_rate_limits_are_per_tenant(launch: Any) -> None:
    running = launch(LIMITED.replace("quota = {queue = 5}", "quota = {requests_per_s = 0.5, burst = 2}"))
    assert [infer(running, "sleeper", 1, 2, 3, 4)[0] for _ in range(3)] == [200, 200, 429]
    assert infer(running, "trouble", 2, 2, 3, 4)[0] == 200


def test_engine_death_is_a_clear_error_and_passes(launch: Any) -> None:
    running = launch(LIMITED)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(infer, running, "sleeper", 1, 2, 3, 4) for _ in range(3)]
        status, answer = infer(running, "trouble", 666, 2, 3, 4)
        others = [one.result() for one in waiting]
    assert (status, answer["error"]) == (
        503,
        "The engine stopped while it had this request; it is being started again.",
    )
    assert all(status in (200, 503) for status, _ in others)
    assert ask(running, "/v2/health/live", method="GET")[0] == 200
    wait_for(lambda: ready(running))
    assert infer(running, "trouble", 5, 2, 3, 4)[1]["outputs"][0]["data"] == [6, 3, 4, 5]
    assert running.server.services.supervisor.starts == 2
    assert running.server.services.gateway.arena_used == 0


@pytest.mark.slow
def test_a_killed_engine_comes_back(launch: Any) -> None:
    running = launch(LIMITED)
    for start in (2, 3):
        os.kill(running.server.services.supervisor.pid, signal.SIGKILL)
        wait_for(lambda start=start: running.server.services.supervisor.starts == start)
        wait_for(lambda: ready(running))
        assert infer(running, "trouble", 5, 2, 3, 4)[0] == 200


@pytest.mark.parametrize("tenant_class", ['"BE"', '"LS"\nslo_ms = 50'])
def test_a_batch_that_never_ends_is_ended(launch: Any, tenant_class: str) -> None:
    running = launch(
        f'[[tenant]]\nname = "stuck"\nmodel = "serving_models:stuck"\nclass = {tenant_class}\n',
        server=SERVER + "watchdog_seconds = 1.5\n",
    )
    start = time.monotonic()
    assert infer(running, "stuck", 7, 2, 3, 4)[0] == 503
    assert time.monotonic() - start < 10
    wait_for(lambda: ready(running))
    assert infer(running, "stuck", 1, 2, 3, 4)[0] == 200


def _socket(running: Any, data: bytes = b"") -> socket.socket:
    host, _, port = running.http.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(data)
    return connection


def test_slow_and_stuck_clients_hold_nobody(launch: Any) -> None:
    limits = "\n[server.limits]\nheader_seconds = 0.5\nbody_seconds = 0.5\nwrite_seconds = 0.5\n"
    running = launch(
        '[[tenant]]\nname = "big"\nmodel = "serving_models:identity"\nclass = "BE"\noptions = {size = 2000000}\n'
        '[[tenant]]\nname = "small"\nmodel = "serving_models:identity"\nclass = "LS"\nslo_ms = 50\n',
        server=SERVER + limits,
    )
    head = b"POST /v2/models/big/infer HTTP/1.1\r\nHost: localhost\r\n"
    slow_head = _socket(running, b"POST /v2/mod")
    slow_body = _socket(running, head + b"Content-Length: 1000\r\n\r\n{")
    request = json.dumps(
        {
            "inputs": [
                {
                    "name": "input0",
                    "datatype": "FP32",
                    "shape": [1, 2000000],
                    "parameters": {"binary_data_size": 8000000},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    never_reads = _socket(running)
    never_reads.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    never_reads.sendall(
        head
        + f"Inference-Header-Content-Length: {len(request)}\r\nContent-Length: {len(request) + 8000000}\r\n\r\n".encode()
        + request
        + bytes(8000000)
    )
    small = body(*range(16))
    for _ in range(20):
        start = time.monotonic()
        assert ask(running, "/v2/models/small/infer", small)[0] == 200
        assert time.monotonic() - start < 1.0
    assert slow_head.recv(100) == b""
    assert slow_body.recv(100) == b""
    http = running.server._http
    wait_for(lambda: not http.connections, 5.0)
    assert http.body_bytes == 0
    assert running.server.services.gateway.arena_used == 0
    for one in (slow_head, slow_body, never_reads):
        one.close()


def test_a_client_that_leaves_cancels_its_request(launch: Any) -> None:
    running = launch(LIMITED.replace("quota = {queue = 5}", ""))
    raw = json.dumps(body(1, 2, 3, 4)).encode()
    head = f"POST /v2/models/sleeper/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
    leaving = [_socket(running, head + raw) for _ in range(10)]
    measures = running.server.services.registry.find("sleeper").measures
    wait_for(lambda: running.server.services.gateway.pending >= 8)
    for one in leaving:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
    wait_for(lambda: running.server.services.gateway.pending == 0, 5.0)
    assert measures.refused["cancelled"] > 0
    assert measures.answered < 10
    assert running.server.services.gateway.arena_used == 0


def test_a_grpc_client_that_gives_up_cancels_its_request(launch: Any) -> None:
    import grpc
    from test_serving_errors import _request

    from missile.serving.protocol.grpc_schema import SERVICE

    running = launch(LIMITED.replace("quota = {queue = 5}", ""))
    raw = _request(model_name="sleeper").SerializeToString()
    with grpc.insecure_channel(running.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        calls = [call.future(raw) for _ in range(10)]
        wait_for(lambda: running.server.services.gateway.pending >= 8)
        for one in calls:
            one.cancel()
        wait_for(lambda: running.server.services.gateway.pending == 0, 5.0)
    assert running.server.services.registry.find("sleeper").measures.refused["cancelled"] > 0
    assert running.server.services.gateway.arena_used == 0


def test_deadlines_are_kept_while_others_run(launch: Any) -> None:
    running = launch(LIMITED.replace("quota = {queue = 5}", "timeout_ms = 70.0"))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: infer(running, "sleeper", 1, 2, 3, 4), range(12)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 504}
    assert infer(running, "sleeper", 1, 2, 3, 4)[0] == 200


def test_pipelined_requests_are_answered_in_order(served: Any) -> None:
    requests = b""
    for value in range(6):
        raw = json.dumps({**body(value, 0, 0, 0), "id": str(value)}).encode()
        requests += (
            f"POST /v2/models/finite/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        )
        requests += raw
    with _socket(served, requests) as connection:
        received = b""
        while received.count(b'"id"') < 6:
            received += connection.recv(65536)
    order = [received.index(f'"id":"{value}"'.encode()) for value in range(6)]
    assert order == sorted(order)


def test_chunked_bodies(served: Any) -> None:
    raw = json.dumps(body(1, 2, 3, 4)).encode()
    chunks = (
        b"".join(b"%x\r\n%s\r\n" % (len(raw[i : i + 7]), raw[i : i + 7]) for i in range(0, len(raw), 7)) + b"0\r\n\r\n"
    )
    head = b"POST /v2/models/finite/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with _socket(served, head + chunks) as connection:
        assert b" 200 OK" in connection.recv(65536)


# --- reload


RELOADED = """
[[tenant]]
name = "a"
model = "serving_models:identity"
class = "LS"
slo_ms = 50
options = {size = 4}
"""


def test_reload_adds_tunes_replaces_and_removes_without_dropping(launch: Any) -> None:
    running = launch(RELOADED)
    stop = threading.Event()
    failures: list[Any] = []
    done = [0]

    def load() -> None:
        while not stop.is_set():
            status, answer = infer(running, "a", 1, 2, 3, 4)
            done[0] += 1
            if status != 200:
                failures.append(answer)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    text = running.path.read_text()

    def reload(tenants: str) -> Any:
        running.path.write_text(SERVER + tenants)
        return ask(running, "/missile/reload", b"")

    added = RELOADED + '[[tenant]]\nname = "b"\nmodel = "serving_models:trouble"\nclass = "BE"\n'
    assert reload(added)[1]["added"] == ["b"]
    assert infer(running, "b", 2, 2, 3, 4)[0] == 200
    assert reload(added.replace("slo_ms = 50", "slo_ms = 80"))[1]["tuned"] == ["a"]
    assert running.server.services.registry.find("a").measures.slo_ns == 80_000_000
    assert reload(added.replace("identity", "trouble").replace("options = {size = 4}", ""))[1]["replaced"] == ["a"]
    wait_for(lambda: infer(running, "a", 5, 5, 5, 5)[1]["outputs"][0]["data"] == [6, 6, 6, 6])
    assert reload(RELOADED)[1]["removed"] == ["b"]
    assert infer(running, "b", 2, 2, 3, 4)[0] == 404
    status, answer = reload("[[tenant]]\nname = 3")
    assert status == 400
    assert answer["error"].startswith("The configuration was not reloaded: ")
    assert reload(RELOADED + '[[tenant]]\nname = "bad"\nmodel = "serving_models:absent"\nclass = "BE"\n')[1][
        "failed"
    ] == ["bad"]
    assert infer(running, "bad", 1) == (
        503,
        {"error": "Model 'bad' could not be loaded: Tenant 'bad': module 'serving_models' has no 'absent'."},
    )
    before = done[0]
    wait_for(lambda: done[0] > before + 10)
    stop.set()
    for thread in threads:
        thread.join()
    # Values of 1 make the `trouble` model fail by design; nothing else may.
    assert [f for f in failures if "no ones, please" not in f["error"]] == []
    running.path.write_text(text)


def test_unload_and_load(launch: Any) -> None:
    running = launch(RELOADED, server=SERVER + "repository_control = true\n")
    assert ask(running, "/v2/repository/models/a/unload", b"")[0] == 200
    assert infer(running, "a", 1, 2, 3, 4) == (503, {"error": "Model 'a' was unloaded."})
    index = ask(running, "/v2/repository/index", b"")[1]
    assert index == [{"name": "a", "version": "1", "state": "UNAVAILABLE", "reason": "was unloaded"}]
    assert ask(running, "/v2/repository/models/a/load", {"parameters": {"config": "{}"}})[0] == 501
    assert ask(running, "/v2/repository/models/a/load", b"")[0] == 200
    assert infer(running, "a", 1, 2, 3, 4)[0] == 200
    assert ask(running, "/v2/repository/models/absent/load", b"")[0] == 404


def test_stopping_finishes_what_runs(launch: Any) -> None:
    running = launch(LIMITED.replace("quota = {queue = 5}", ""))
    with ThreadPoolExecutor(10) as pool:
        waiting = [pool.submit(infer, running, "sleeper", 1, 2, 3, 4) for _ in range(10)]
        wait_for(lambda: running.server.services.gateway.pending >= 8)
        running.loop.call_soon_threadsafe(running.server.request_stop)
        statuses = [one.result()[0] for one in waiting]
    assert statuses.count(200) >= 8
    assert set(statuses) <= {200, 503}


# --- models of one's own


def test_an_exported_program(launch: Any, tmp_path: Any) -> None:
    import serving_models

    torch.manual_seed(7)
    module = serving_models.ConvNet().eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(module, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    fixed = torch.export.export(module, (torch.zeros(2, 3, 32, 32),))
    torch.export.save(fixed, tmp_path / "fixed.pt2")
    (tmp_path / "broken.pt2").write_bytes(b"nonsense")
    tenants = '[[tenant]]\nname = "net"\nmodel = "net.pt2"\nclass = "BE"\nbatch = {max = 8}\n'
    tenants += '[[tenant]]\nname = "fixed"\nmodel = "fixed.pt2"\nclass = "BE"\nbatch = {max = 2}\n'
    tenants += '[[tenant]]\nname = "broken"\nmodel = "broken.pt2"\nclass = "BE"\n'
    running = launch(tenants)
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(image)).numpy()
    for name in ("net", "fixed"):
        metadata = ask(running, f"/v2/models/{name}", method="GET")[1]
        tensor = {"name": metadata["inputs"][0]["name"], "datatype": "FP32", "shape": list(image.shape)}
        status, answer = ask(
            running, f"/v2/models/{name}/infer", {"inputs": [{**tensor, "data": image.ravel().tolist()}]}
        )
        assert status == 200, answer
        np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (2, 10)), expected, rtol=1e-5, atol=1e-6)
    status, answer = ask(running, "/v2/models/broken", method="GET")
    assert status == 503
    assert "is not a torch.export archive" in answer["error"]


def test_inputs_named_by_the_configuration(launch: Any) -> None:
    running = launch(
        '[[tenant]]\nname = "d"\nmodel = "serving_models:doubler"\nclass = "BE"\nbatched = false\noutputs = ["twice"]\n'
        '[[tenant.input]]\nname = "x"\ndatatype = "INT32"\nshape = [2, 2]\n'
    )
    inputs = [{"name": "x", "datatype": "INT32", "shape": [2, 2], "data": [[1, 2], [3, 4]]}]
    answer = ask(running, "/v2/models/d/infer", {"inputs": inputs})[1]
    assert answer["outputs"] == [{"name": "twice", "datatype": "INT32", "shape": [2, 2], "data": [2, 4, 6, 8]}]
    assert ask(running, "/v2/models/d", method="GET")[1]["inputs"][0]["shape"] == [2, 2]


# --- tokens and TLS on the wire


def test_tokens_on_the_wire(launch: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("READ", "INFER", "ADMIN"):
        monkeypatch.setenv(f"{role}_TOKEN", f"{role.lower()}-token-0123456789")
    tokens = 'tokens = [{role = "read", env = "READ_TOKEN"}, {role = "infer", env = "INFER_TOKEN", tenants = ["b"]}, '
    tokens += '{role = "admin", env = "ADMIN_TOKEN"}]\n'
    running = launch(RELOADED + RELOADED.replace('"a"', '"b"'), server=SERVER + tokens)

    def status(path: str, token: str, method: str = "GET", payload: Any = None) -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return ask(running, path, payload, method=method, **headers)[0]

    read, inferring, admin = (f"{role}-token-0123456789" for role in ("read", "infer", "admin"))
    assert status("/v2/health/ready", "") == 200
    for path in ("/v2", "/missile/state", "/v2/models/a"):
        assert status(path, "") == 401
        assert status(path, "wrong") == 401
        if path != "/v2/models/a":
            assert status(path, inferring) == 200
        assert status(path, read) == 200
    infer_a, infer_b = "/v2/models/a/infer", "/v2/models/b/infer"
    assert status(infer_a, read, "POST", body(1, 2, 3, 4)) == 403
    assert status(infer_a, inferring, "POST", body(1, 2, 3, 4)) == 403
    assert status(infer_b, inferring, "POST", body(1, 2, 3, 4)) == 200
    assert status(infer_a, admin, "POST", body(1, 2, 3, 4)) == 200
    assert status("/missile/reload", inferring, "POST") == 403
    assert status("/missile/reload", admin, "POST") == 200
    names = [
        t["name"]
        for t in ask(running, "/missile/state", method="GET", Authorization=f"Bearer {inferring}")[1]["tenants"]
    ]
    assert names == ["b"]

    import grpc
    from test_serving_errors import _request

    from missile.serving.protocol.grpc_schema import SERVICE

    with grpc.insecure_channel(running.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        request = _request(model_name="b").SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert call(request, metadata=(("authorization", f"Bearer {inferring}"),))
