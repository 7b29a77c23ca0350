"""Do the L2's two halves isolate tenants on SMs of different halves? And colors, by side of the chip or across?

    PYTHONPATH=src python3 benchmarks/gpu/sides.py -o OUT [--map MAP.json]

A victim on 32 SMs of one half passes over 8 or 24 MiB, beside aggressors on others of its half, on the other half, on both;
in all colors, in the halves that tenants get, and in colors by side of the chip (the victim near its own, then far). OUT
gets `sides.json`, about 30 s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from missile.bench.isolation.lab import ColoredUnits
from missile.bench.isolation.plan import chip_halves, halves_of
from missile.bench.isolation.record import header_of
from missile.coloring.pool import ColoredPool
from missile.files import write_whole
from missile.gpu import open_gpu
from missile.gpu.interface import Access, Gpu, Traffic
from missile.probe import ChannelMap, map_for

MIB = 1 << 20
VICTIM_SMS = 32
VICTIM_BYTES = (8 * MIB, 24 * MIB)
AGGRESSOR_BYTES = (16 * MIB, 256 * MIB)
ACCESSES = (
    (Access.READ, Access.READ),
    (Access.READ, Access.READ_WRITE),
    (Access.READ, Access.WRITE),
    (Access.READ_WRITE, Access.READ_WRITE),
)
PAGES = 560
REPEATS = 8


def spread(sms: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of `sms`, evenly."""
    return tuple(int(sms[i * len(sms) // count]) for i in range(count))


def sides(channel_map: ChannelMap) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """SMs of the victim, all of one half, and of each aggressor, by a name."""
    sms, half = np.array(channel_map.topology.sms), np.array(channel_map.topology.sm_half)
    near, far = sms[half == 0].tolist(), sms[half == 1].tolist()
    victim = spread(near, VICTIM_SMS)
    rest = [sm for sm in near if sm not in victim]
    some = min(34, len(rest), len(far))
    both = [*rest, *far]
    return victim, {
        f"same {some}": spread(rest, some),
        f"other {some}": spread(far, some),
        f"other {len(far)}": tuple(far),
        f"both {len(far)}": spread(both, len(far)),
        f"both {len(both)}": tuple(both),
    }


def schemes(channel_map: ChannelMap) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
    every = range(len(channel_map.colors))
    found: dict[str, tuple[Sequence[int], Sequence[int]]] = {"none": (every, every), "pair": halves_of(channel_map)}
    by_side = chip_halves(channel_map)
    if by_side is not None:
        # The victim's SMs are those of half 0; a slice's half is the one that it is near to.
        first_is_near = channel_map.topology.slice_half[channel_map.colors[0][0]] == 0
        near, far = by_side if first_is_near else by_side[::-1]
        found |= {"geo near": (near, far), "geo far": (far, near)}
    return found


def measure(gpu: Gpu, channel_map: ChannelMap, units: ColoredUnits) -> list[dict[str, Any]]:
    victim, aggressors = sides(channel_map)
    rows: list[dict[str, Any]] = []
    for scheme, (mine, theirs) in schemes(channel_map).items():
        for nbytes in VICTIM_BYTES:
            passes = max(1, 32 * MIB // nbytes)
            ours = units.units(mine, nbytes, victim=True)
            for other in AGGRESSOR_BYTES:
                others = units.units(theirs, other, victim=False)
                for access, their_access in ACCESSES:
                    side = Traffic(ours, victim, access)
                    solo = median(gpu.measure_contention(side, None, repeats=REPEATS, passes=passes).victim_ns)
                    for name, sms in aggressors.items():
                        load = Traffic(others, sms, their_access)
                        alone = gpu.measure_contention(None, load, repeats=1)
                        beside = gpu.measure_contention(side, load, repeats=REPEATS, passes=passes)
                        rows.append(
                            {
                                "scheme": scheme,
                                "vb": nbytes,
                                "ab": other,
                                "va": str(access),
                                "aa": str(their_access),
                                "agg": name,
                                "solo_us": solo / passes / 1e3,
                                "slow": median(beside.victim_ns) / solo,
                                "agg_alone": alone.aggressor_bytes_per_s / 1e9,
                                "agg_beside": beside.aggressor_bytes_per_s / 1e9,
                            }
                        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("missile-out/sides"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--map", type=Path, default=None)
    options = parser.parse_args()
    with open_gpu(options.device) as gpu:
        channel_map = map_for(gpu, known=options.map, pages=512)
        if channel_map.topology.step == 0.0:
            raise SystemExit("This chip shows no halves.")
        with ColoredPool(gpu, PAGES) as pool:
            rows = measure(gpu, channel_map, ColoredUnits(gpu, channel_map, pool))
        sizes = np.bincount(channel_map.topology.sm_half).tolist()
        result = {**header_of(gpu), "sms_by_half": sizes, "colors": [len(color) for color in channel_map.colors]}
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps(result)[:-1]
    write_whole(options.out / "sides.json", f'{head},\n "rows": [\n  {lines}\n ]}}\n')
    for row in rows:
        print(
            f"{row['scheme']:9} {row['vb'] // MIB:3} {row['ab'] // MIB:4} {row['va']:>10} {row['aa']:>10} {row['agg']:9} "
            f"solo {row['solo_us']:7.1f} us x{row['slow']:.2f}, "
            f"aggressor {row['agg_alone']:.0f} to {row['agg_beside']:.0f} GB/s"
        )


if __name__ == "__main__":
    main()
