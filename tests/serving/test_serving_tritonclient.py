"""Unmodified tritonclient against a served model: what comes back equals eager PyTorch."""

from __future__ import annotations

import asyncio
import os
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import serving_models
import torch
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http
import tritonclient.http.aio as http_aio
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

CLIENTS = {"http": http, "grpc": grpc}


def _inputs(module: Any, **arrays: np.ndarray) -> list[Any]:
    found = []
    for name, array in arrays.items():
        one = module.InferInput(name, list(array.shape), {"float32": "FP32", "int64": "INT64"}[str(array.dtype)])
        one.set_data_from_numpy(array)
        found.append(one)
    return found


def _eager(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    module, _ = serving_models.mixer(1)
    with torch.inference_mode():
        return {k: v.numpy() for k, v in module(torch.from_numpy(x), torch.from_numpy(y)).items()}


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, served: Any) -> Any:
    module = CLIENTS[request.param]
    with module.InferenceServerClient(getattr(served, request.param)) as one:
        one.module = module
        one.kind = request.param
        yield one


@pytest.fixture
def xy() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((3, 8)).astype(np.float32), rng.standard_normal((3, 8)).astype(np.float32)


def test_outputs_equal_eager(client: Any, xy: Any) -> None:
    result = client.infer("mixer", _inputs(client.module, input0=xy[0], input1=xy[1]), request_id="r-1")
    for name, expected in _eager(*xy).items():
        np.testing.assert_array_equal(result.as_numpy(name), expected)
    response = result.get_response()
    assert (response["id"] if client.kind == "http" else response.id) == "r-1"


def test_json_tensors_equal_eager(served: Any, xy: Any) -> None:
    inputs = []
    for name, array in zip(("input0", "input1"), xy, strict=True):
        one = http.InferInput(name, list(array.shape), "FP32")
        one.set_data_from_numpy(array, binary_data=False)
        inputs.append(one)
    outputs = [http.InferRequestedOutput("projected", binary_data=False)]
    with http.InferenceServerClient(served.http) as client:
        result = client.infer("mixer", inputs, outputs=outputs)
    np.testing.assert_array_equal(result.as_numpy("projected"), _eager(*xy)["projected"])
    assert result.as_numpy("sum") is None


def test_asynchronous_clients(served: Any, xy: Any) -> None:
    async def run() -> list[Any]:
        results = []
        async with (
            http_aio.InferenceServerClient(served.http) as one,
            grpc_aio.InferenceServerClient(served.grpc) as two,
        ):
            results.append(await one.infer("mixer", _inputs(http, input0=xy[0], input1=xy[1])))
            results.append(await two.infer("mixer", _inputs(grpc, input0=xy[0], input1=xy[1])))
        return results

    for result in asyncio.run(run()):
        np.testing.assert_array_equal(result.as_numpy("sum"), _eager(*xy)["sum"])


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed_requests(served: Any, xy: Any, compression: str) -> None:
    with http.InferenceServerClient(served.http) as client:
        inputs = _inputs(http, input0=xy[0], input1=xy[1])
        result = client.infer("mixer", inputs, request_compression_algorithm=compression)
    np.testing.assert_array_equal(result.as_numpy("sum"), _eager(*xy)["sum"])


def _all_at_once(client: Any, model: str, arrays: list[np.ndarray]) -> list[Any]:
    """Results, or the errors that came instead, of requests that are under way together."""
    found: list[Any] = [None] * len(arrays)
    done = threading.Semaphore(0)

    def keep(index: int, result: Any, error: Any) -> None:
        found[index] = error or result
        done.release()

    for index, array in enumerate(arrays):
        client.async_infer(model, _inputs(grpc, input0=array), callback=partial(keep, index))
    for _ in arrays:
        assert done.acquire(timeout=30)
    return found


def test_be_requests_are_merged_and_still_right(served: Any) -> None:
    rng = np.random.default_rng(4)
    images = [rng.standard_normal((1, 3, 32, 32)).astype(np.float32) for _ in range(8)]
    with http.InferenceServerClient(served.http) as one, grpc.InferenceServerClient(served.grpc) as client:
        before = one.get_inference_statistics("convnet")["model_stats"][0]
        outputs = _all_at_once(client, "convnet", images)
        after = one.get_inference_statistics("convnet")["model_stats"][0]
    module, _ = serving_models.convnet(1)
    with torch.inference_mode():
        for image, output in zip(images, outputs, strict=True):
            np.testing.assert_allclose(
                output.as_numpy("output0"), module(torch.from_numpy(image)).numpy(), rtol=1e-5, atol=1e-6
            )
    assert after["inference_count"] - before["inference_count"] == 8
    assert after["execution_count"] - before["execution_count"] < 8
    assert max(entry["batch_size"] for entry in after["batch_stats"]) > 1


def test_one_bad_request_of_a_merged_batch_fails_alone(served: Any) -> None:
    inputs = [np.full((1, 4), value, np.float32) for value in (0, 1, 2, 3)]
    with grpc.InferenceServerClient(served.grpc) as client:
        for array, result in zip(inputs, _all_at_once(client, "trouble", inputs), strict=True):
            if array[0, 0] == 1:
                assert "ValueError: no ones, please" in result.message()
                assert "second line" not in result.message()
            else:
                np.testing.assert_array_equal(result.as_numpy("output0"), array + 1)


def test_streaming_answers_in_order(served: Any) -> None:
    got: list[Any] = []
    with grpc.InferenceServerClient(served.grpc) as client:
        client.start_stream(lambda result, error: got.append((result, error)))
        for value in range(5):
            array = np.full((1, 8), value, np.float32)
            client.async_stream_infer("mixer", _inputs(grpc, input0=array, input1=array), request_id=str(value))
        client.async_stream_infer("absent", _inputs(grpc, input0=array), request_id="bad")
        client.stop_stream()
    assert [result.get_response().id for result, error in got if error is None] == ["0", "1", "2", "3", "4"]
    assert [str(error) for _, error in got if error is not None] == ["There is no model 'absent'."]


def test_metadata_and_health(client: Any, served: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mixer")
    assert client.is_model_ready("mixer", "1")
    more: dict[str, Any] = {"as_json": True} if client.kind == "grpc" else {}
    metadata = client.get_server_metadata(**more)
    assert metadata["name"] == "missile"
    assert {"binary_tensor_data", "system_shared_memory", "statistics"} <= set(metadata["extensions"])
    model = client.get_model_metadata("mixer", **more)
    assert [one["name"] for one in model["inputs"]] == ["input0", "input1"]
    assert [[int(size) for size in one["shape"]] for one in model["outputs"]] == [[-1, 8], [-1, 4]]
    config = client.get_model_config("mixer", **more)
    config = config.get("config", config)
    assert config["max_batch_size"] == 4
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert config["parameters"]["isolation"]["string_value"].startswith("none: this is the CPU device")
    index = client.get_model_repository_index(**more)
    models = index["models"] if client.kind == "grpc" else index
    assert {"mixer", "convnet"} <= {one["name"] for one in models}


def test_repository_control_is_off_unless_enabled(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="turned off"):
        client.unload_model("mixer")


@pytest.mark.parametrize(("model", "values"), [("big", 153600), ("huge", 600000)])  # the second is copied aside
def test_system_shared_memory_both_ways(client: Any, model: str, values: int) -> None:
    array = np.random.default_rng(5).standard_normal((1, values)).astype(np.float32)
    size = array.nbytes
    key = f"missile-test-{client.kind}"
    handle = shm.create_shared_memory_region("both", key, 2 * size)
    try:
        shm.set_shared_memory_region(handle, [array])
        client.register_system_shared_memory("both", key, 2 * size)
        given = client.module.InferInput("input0", list(array.shape), "FP32")
        given.set_shared_memory("both", size)
        wanted = client.module.InferRequestedOutput("output0")
        wanted.set_shared_memory("both", size, offset=size)
        client.infer(model, [given], outputs=[wanted])
        np.testing.assert_array_equal(
            shm.get_contents_as_numpy(handle, np.float32, list(array.shape), offset=size), array
        )
        status = client.get_system_shared_memory_status()
        regions = status if client.kind == "http" else status.regions.values()
        sizes = [one["byte_size"] if client.kind == "http" else one.byte_size for one in regions]
        assert sizes == [2 * size]
        given.set_shared_memory("both", size, offset=size + 4)
        with pytest.raises(InferenceServerException, match="do not lie in shared memory region 'both'"):
            client.infer(model, [given], outputs=[wanted])
        client.unregister_system_shared_memory("both")
        given.set_shared_memory("both", size)
        with pytest.raises(InferenceServerException, match="no shared memory region 'both'"):
            client.infer(model, [given])
    finally:
        client.unregister_system_shared_memory()
        shm.destroy_shared_memory_region(handle)


def test_a_region_that_was_cut_short_is_an_error_not_a_crash(served: Any) -> None:
    size = 153600 * 4
    handle = shm.create_shared_memory_region("cut", "missile-test-cut", size)
    with http.InferenceServerClient(served.http) as client:
        try:
            client.register_system_shared_memory("cut", "missile-test-cut", size)
            os.truncate("/dev/shm/missile-test-cut", 100)
            given = http.InferInput("input0", [1, 153600], "FP32")
            given.set_shared_memory("cut", size)
            with pytest.raises(InferenceServerException, match="shorter than it was registered"):
                client.infer("big", [given])
            assert client.is_server_ready()
        finally:
            client.unregister_system_shared_memory("cut")
            os.truncate("/dev/shm/missile-test-cut", size)
            shm.destroy_shared_memory_region(handle)


def test_timeouts_and_priorities_are_taken(client: Any, xy: Any) -> None:
    inputs = _inputs(client.module, input0=xy[0], input1=xy[1])
    result = client.infer("mixer", inputs, priority=2, timeout=5_000_000)
    assert result.as_numpy("sum").shape == (3, 8)
    with pytest.raises(InferenceServerException, match="deadline"):
        client.infer("mixer", inputs, timeout=1)
