"""Watch isolation, or the lack of it: the LS tenant's latency alone, and beside a busy BE neighbour.

On the CPU device there is none, and the neighbour is felt; the server says so. Open the printed address in a browser, or run
`missile top ADDRESS`, to watch the same live.

python examples/serving/22_watch_isolation.py
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import tritonclient.http as http
from server import serving

SECONDS = 3.0


def inputs(array: np.ndarray) -> list[http.InferInput]:
    given = http.InferInput("input0", list(array.shape), "FP32")
    given.set_data_from_numpy(array)
    return [given]


def latencies_ms(address: str) -> np.ndarray:
    """Round trips of the LS tenant at about 50 requests/s."""
    image, found = inputs(np.zeros((1, 3, 64, 64), np.float32)), []
    with http.InferenceServerClient(address) as client:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            start = time.perf_counter()
            client.infer("classifier", image)
            found.append((time.perf_counter() - start) * 1000)
            time.sleep(0.02)
    return np.array(found)


def busy(address: str, stop: threading.Event) -> None:
    text = inputs(np.zeros((1, 1024), np.float32))
    with http.InferenceServerClient(address) as client:
        while not stop.is_set():
            client.infer("embedder", text)


with serving(Path(__file__).with_name("21_two_tenants.toml")) as address:
    print(f"http://{address['http']}")
    alone = latencies_ms(address["http"])
    stop = threading.Event()
    neighbours = [threading.Thread(target=busy, args=(address["http"], stop)) for _ in range(4)]
    for one in neighbours:
        one.start()
    beside = latencies_ms(address["http"])
    stop.set()
    for one in neighbours:
        one.join()

for name, values in (("alone", alone), ("beside BE", beside)):
    p50, p99 = np.percentile(values, [50, 99])
    print(f"{name:10} p50 {p50:6.2f} ms  p99 {p99:6.2f} ms  ({len(values)} requests)")
