"""Groups of slices on the chip at hand: taken over from another chip's map, and probed afresh; do they agree?

    PYTHONPATH=src python3 benchmarks/gpu/groups.py -o OUT --map MAP.json [--quick]

Both maps are asked about the same fresh pages: granules that one puts into one group the other must, too. OUT gets
`map.json` (taken over, for what runs next) and `groups.json` with all witnesses and what the tests took. --quick leaves the
probe of its own out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from missile.bench.isolation.plan import chip_halves
from missile.bench.isolation.record import header_of
from missile.coloring.halves import find_halves
from missile.files import write_whole
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.probe import ChannelMap, probe_gpu, read_map, verify, write_map
from missile.probe.pool import PagePool

PAGES = 512
COMPARED = 32


def described(found: ChannelMap) -> dict[str, Any]:
    halves = find_halves(found)
    return {
        "seconds": found.seconds,
        "groups": [len(group) for group in found.channels],
        "colors": [list(color) for color in found.colors],
        "sms_by_half": np.bincount(found.topology.sm_half).tolist(),
        "halves": halves.sets if halves else None,
        "residue": halves.residue if halves else None,
        "chip_halves": chip_halves(found),
        "witnesses": [
            {"name": w.name, "verdict": str(w.verdict), "says": w.says, "numbers": dict(w.numbers)}
            for w in found.witnesses
        ],
        "statistics": dict(found.statistics),
        "channels": [list(group) for group in found.channels],
    }


def differing(gpu: Gpu, one: ChannelMap, other: ChannelMap) -> dict[str, int]:
    """On fresh pages: granules, and those that the two maps put into different groups, whatever these are called."""
    with PagePool(gpu, COMPARED, spread=False, rng=np.random.default_rng(5)) as pool:
        said = []
        for found in (one, other):
            constants = found.classify(gpu, pool.addresses)
            assert (constants[:, 2] >= 0).all(), "a fresh page could not be classified"
            said.append(found.color_of_slice[found.page_slices(constants)].reshape(-1))
    meetings = np.zeros((len(one.colors), len(other.colors)), np.int64)
    np.add.at(meetings, (said[0], said[1]), 1)
    return {"granules": int(meetings.sum()), "differ": int(meetings.sum() - meetings.max(axis=1).sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("missile-out/groups"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--map", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    known = read_map(options.map)
    with open_gpu(options.device) as gpu:
        result: dict[str, Any] = {**header_of(gpu), "known": known.uuid}
        clock = time.perf_counter()
        taken = probe_gpu(gpu, pages=PAGES, known=known)
        write_map(taken, options.out / "map.json")
        result["taken over"] = described(taken) | {"wall_seconds": round(time.perf_counter() - clock, 3)}
        for round_ in range(3):
            tested = verify(gpu, taken, seed=round_)
            says = {w.name: f"{w.verdict}: {w.says}" for w in tested.witnesses}
            result[f"verified {round_}"] = {"seconds": tested.seconds, "witnesses": says}
        write_whole(options.out / "groups.json", json.dumps(result, indent=1) + "\n")
        if not options.quick:
            afresh = probe_gpu(gpu, pages=PAGES, interference=False, seed=1)
            result["afresh"] = described(afresh)
            result["compared"] = differing(gpu, taken, afresh)
    write_whole(options.out / "groups.json", json.dumps(result, indent=1) + "\n")
    for name in ("taken over", "afresh"):
        if name in result:
            row = result[name]
            print(name, row["groups"], "SMs", row["sms_by_half"], "halves", row["halves"], f"{row['seconds']} s")
            for witness in row["witnesses"]:
                print("  ", witness["name"], witness["verdict"], witness["says"])
    print(
        "verified",
        [result[f"verified {i}"]["seconds"] for i in range(3)],
        result["verified 0"]["witnesses"]["channels"],
    )
    print("compared", result.get("compared"))


if __name__ == "__main__":
    main()
