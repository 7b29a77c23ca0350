"""What `ncu` profiles for `missile.probe.counters`: reads of predicted sets, one contention kernel for each.

Run as `python -m missile.probe.counting MAP.json DEVICE '{"sets": [[slice, ...], ...], "sms": [...]}'`. An empty set
reads one unit once: what a kernel costs without the traffic that is asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from missile.gpu import open_gpu
from missile.gpu.interface import Traffic
from missile.probe.contention import SliceMemory
from missile.probe.map_file import read_map
from missile.probe.pool import PagePool

__all__ = ["main"]

_PAGES = 64
_UNITS = 512  # per slice
_ENTRIES = 1 << 17  # units read in one pass: what the kernel reads for itself is little beside them
_PASSES = 8


def main(arguments: list[str]) -> None:
    """See the module."""
    channel_map = read_map(Path(arguments[0]))
    wanted = json.loads(arguments[2])
    rng = np.random.default_rng(0)
    with open_gpu(arguments[1]) as gpu, PagePool(gpu, _PAGES, spread=False, rng=rng) as pool:
        memory = SliceMemory(channel_map, pool.addresses, channel_map.classify(gpu, pool.addresses), rng)
        for slices in wanted["sets"]:
            # The same number of units from every slice: a sum over a maximum then counts slices.
            units = [memory.units([slice_], _UNITS, victim=False) for slice_ in slices]
            addresses = np.concatenate(units) if units else memory.units([0], 1, victim=False)
            if units:
                addresses = np.resize(rng.permutation(addresses), _ENTRIES // len(addresses) * len(addresses))
            traffic = Traffic(addresses, tuple(wanted["sms"]))
            gpu.measure_contention(traffic, repeats=1, passes=_PASSES if units else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
