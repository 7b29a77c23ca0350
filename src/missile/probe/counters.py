"""The witness of hardware counters: groups of slices that share nothing must light up L2 instances of their own.

`ncu` profiles a child process (`missile.probe.counting`) that reads predicted sets, one kernel launch for each. Sectors
read, summed over all L2 instances, over the most that one instance read, is the number of busy instances; over the
mean, it is how many there are. Only kernels of the child are profiled, and clocks are left as they are.

A latency class is no instance: on an H200 each lights up two, at half the load, and shares both with others of its group
(docs/design/channel-map.md). So whole groups are read: k slices in whole groups must light up k instances.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from missile.errors import UnsupportedError
from missile.probe.channel_map import ChannelMap, Verdict, Witness
from missile.probe.map_file import write_map

__all__ = ["SectorCount", "count_sectors", "counter_witness", "find_ncu", "group_sets", "parse_report", "with_counters"]

METRIC = "lts__t_sectors_op_read"
_ROLLUPS = ("sum", "avg", "min", "max")
_KERNEL = "contention"
_TIMEOUT_S = 240
_TOLERANCE = 0.15  # of the predicted number of busy instances
_PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute")


@dataclass(frozen=True, slots=True)
class SectorCount:
    """Sectors of 32 bytes that the L2 instances read during one kernel: over all, mean, least and most of one instance."""

    total: float
    mean: float
    least: float
    most: float

    @property
    def instances(self) -> float:
        """How many instances there are."""
        return self.total / self.mean if self.mean else 0.0

    @property
    def busy(self) -> float:
        """How many instances the traffic lit up, when it was spread evenly over them."""
        return self.total / self.most if self.most else 0.0


def find_ncu() -> Path | None:
    """Where Nsight Compute's command line is, if anywhere."""
    on_path = shutil.which("ncu")
    if on_path:
        return Path(on_path)
    for place in map(Path, _PLACES):
        if place.is_file():
            return place
        found = sorted(place.glob("*/ncu")) if place.is_dir() else []
        if found:
            return found[-1]
    return None


def count_sectors(
    channel_map: ChannelMap, device: str, sets: Sequence[Sequence[int]], sms: Sequence[int]
) -> list[SectorCount]:
    """Sectors read while the SMs `sms` read addresses on each set of slices, in order. Runs a child under `ncu`.

    UnsupportedError, with ncu's last line, where it is not installed or may not read counters.
    """
    ncu = find_ncu()
    if ncu is None:
        raise UnsupportedError("Nsight Compute (ncu) is not installed, so hardware counters can't be read.")
    with tempfile.TemporaryDirectory(prefix="missile-") as directory:
        path = Path(directory) / "map.json"
        write_map(channel_map, path)
        wanted = json.dumps({"sets": [list(map(int, part)) for part in sets], "sms": list(map(int, sms))})
        metrics = ",".join(f"{METRIC}.{suffix}" for suffix in _ROLLUPS)
        profile = [str(ncu), "--clock-control", "none", "--target-processes", "all", "--csv", "--page", "raw"]
        profile += ["--kernel-name", _KERNEL, "--metrics", metrics]
        child = [sys.executable, "-m", "missile.probe.counting", str(path), device, wanted]
        try:
            run = subprocess.run([*profile, *child], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise UnsupportedError(f"ncu did not finish within {_TIMEOUT_S} s.") from None
    counts = parse_report(run.stdout)
    if run.returncode or len(counts) != len(sets):
        lines = [line for line in (run.stderr + run.stdout).splitlines() if line.strip()]
        raise UnsupportedError(f"ncu could not count sectors: {lines[-1] if lines else 'it said nothing'}")
    return counts


def parse_report(text: str) -> list[SectorCount]:
    """One count for each kernel of ncu's raw CSV page, in order; lines that are not of the table are skipped."""
    lines = text.splitlines()
    head = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return []
    counts = []
    for row in csv.DictReader(lines[head:]):
        if (row.get("ID") or "").isdecimal():
            values = [float(row[f"{METRIC}.{suffix}"].replace(",", "")) for suffix in _ROLLUPS]
            counts.append(SectorCount(*values))
    return counts


def counter_witness(channel_map: ChannelMap, device: str) -> Witness:
    """Read one group of slices, more of them, half and all, and compare the number of busy instances with the prediction.

    Groups are the map's channels, else its colors. SMs of one half read, so that a granule is served by one instance where
    the halves cache separately.
    """
    topology = channel_map.topology
    sms = [sm for sm, half in zip(topology.sms, topology.sm_half, strict=True) if half == topology.sm_half[0]]
    sets = group_sets(channel_map.channels or channel_map.colors)
    try:
        floor, *counts = count_sectors(channel_map, device, [(), *sets], sms)
    except UnsupportedError as error:
        return Witness("counters", Verdict.NOT_RUN, str(error))
    numbers = {"instances": counts[-1].instances, "floor_sectors": floor.total}
    agree = True
    for slices, count in zip(sets, counts, strict=True):
        size = len(slices)
        numbers |= {
            f"busy_{size}": count.busy,
            f"least_of_mean_{size}": count.least / count.mean if count.mean else 0.0,
        }
        agree &= abs(count.busy - size) <= max(1.0, _TOLERANCE * size)
    listed = ", ".join(f"{len(slices)}: {numbers[f'busy_{len(slices)}']:.1f}" for slices in sets)
    return Witness(
        "counters",
        Verdict.AGREES if agree else Verdict.DISAGREES,
        f"Busy L2 instances by number of slices read, in whole groups: {listed}, of {counts[-1].instances:.0f}; without "
        f"any, {floor.total:.0f} sectors are read (noise floor).",
        numbers,
    )


def group_sets(groups: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Unions of 1, 2, half and all of `groups`, each of another size, ascending."""
    wanted = sorted({count for count in (1, 2, len(groups) // 2, len(groups)) if 1 <= count <= len(groups)})
    return [tuple(sorted(slice_ for group in groups[:count] for slice_ in group)) for count in wanted]


def with_counters(channel_map: ChannelMap, device: str) -> ChannelMap:
    """`channel_map` with the counters' verdict in place of the one that it has."""
    witness = counter_witness(channel_map, device)
    others = tuple(other for other in channel_map.witnesses if other.name != witness.name)
    return replace(channel_map, witnesses=(*others, witness))
