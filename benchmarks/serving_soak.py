"""A long steady load on a served model: does memory stay level, and does anything get lost?

    python benchmarks/serving_soak.py --seconds 1800 -o benchmarks/results/serving-soak-NAME

Four connections keep asking (large and small tensors, now and then a malformed request, a new connection every 50
requests) at a moderate rate, while the resident memory of both processes is sampled every five seconds.
"""

from __future__ import annotations

import http.client
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from serving_load import CONFIG, MODELS, cases
from serving_setup import Setup, machine, parser, server_state, write_results

PAUSE_S = 0.02


def client(address: str, until: float, counts: dict[str, int], number: int) -> None:
    big = next(case for case in cases("none") if "600 KiB, binary" in case.name).request
    small = next(case for case in cases("none") if "64 B, JSON" in case.name).request
    chance = np.random.default_rng(number)
    while time.monotonic() < until:
        connection = http.client.HTTPConnection(address, timeout=20)
        for _ in range(50):
            kind = chance.choice(3, p=[0.2, 0.7, 0.1])
            raw = (big, small, small.replace(b'"FP32"', b'"FP3"'))[kind]
            head, _, body = raw.partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:] if not line.startswith("Content-Length"))
            connection.request("POST", lines[0].split()[1], body, headers)
            answer = connection.getresponse()
            answer.read()
            right = answer.status == (400 if kind == 2 else 200)
            counts["right" if right else "wrong"] += 1
            time.sleep(PAUSE_S)
        connection.close()


def run(setup: Setup, seconds: float) -> dict[str, object]:
    with setup.served(CONFIG, models=MODELS) as address:
        start = time.monotonic()
        counts = {"right": 0, "wrong": 0}
        arguments = ("{}:{}".format(*address), start + seconds, counts)
        threads = [threading.Thread(target=client, args=(*arguments, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        samples = []
        while any(thread.is_alive() for thread in threads):
            state = server_state(address)["server"]
            rss = [round(state[f"{name}_rss_bytes"] / 2**20, 2) for name in ("front_end", "engine")]
            samples.append([round(time.monotonic() - start, 1), *rss, state["engine_starts"]])
            time.sleep(5)
    table = np.array(samples)
    settled = table[table[:, 0] > 0.25 * table[-1, 0]]
    slopes = [float(np.polyfit(settled[:, 0] / 3600, settled[:, column], 1)[0]) for column in (1, 2)]
    return {
        **counts,
        "minutes": seconds / 60,
        "front_end_mib_per_hour": round(slopes[0], 2),
        "engine_mib_per_hour": round(slopes[1], 2),
        "samples": samples,
    }


def main() -> None:
    arguments = parser(__doc__, seconds=1800.0, of="the load").parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Setup(Path(folder), arguments.server_cores), arguments.seconds)
    print({key: value for key, value in found.items() if key != "samples"})
    write_results(arguments.output, {"machine": about, "note": arguments.note, **found})


if __name__ == "__main__":
    main()
