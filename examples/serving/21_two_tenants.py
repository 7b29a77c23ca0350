"""Two tenants with different promises: what each got, from the server's own account.

python examples/serving/21_two_tenants.py
"""

from __future__ import annotations

import json
import queue
import time
import urllib.request
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
from server import serving

SECONDS = 4.0


def inputs(array: np.ndarray) -> list[grpc.InferInput]:
    given = grpc.InferInput("input0", list(array.shape), "FP32")
    given.set_data_from_numpy(array)
    return [given]


image = inputs(np.zeros((1, 3, 64, 64), np.float32))
text = inputs(np.zeros((1, 1024), np.float32))

with (
    serving(Path(__file__).with_name("21_two_tenants.toml")) as address,
    grpc.InferenceServerClient(address["grpc"]) as client,
):
    done: queue.SimpleQueue[object] = queue.SimpleQueue()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        for _ in range(8):
            client.async_infer("embedder", text, callback=lambda result, error: done.put(error or result))
        client.infer("classifier", image)
        for _ in range(8):
            done.get()
    time.sleep(1.1)  # the account is closed every second
    with urllib.request.urlopen(f"http://{address['http']}/missile/state", timeout=10) as answer:
        state = json.load(answer)

print(f"{state['device']['name']}; isolation {state['device']['isolation']}")
for tenant in state["tenants"]:
    line = f"{tenant['name']:12} {tenant['class']}  p50 {tenant['p50_ms']:7.2f} ms  p99 {tenant['p99_ms']:7.2f} ms"
    if tenant["class"] == "LS":
        line += f"  SLO {tenant['slo_ms']:g} ms met by {tenant['attainment_5m']:.1%}"
    else:
        line += f"  {tenant['answered']} answers in batches of {tenant['mean_batch']}"
    print(line)
