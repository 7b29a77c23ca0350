from __future__ import annotations

from pathlib import Path

import pytest

from missile.probe import Verdict, counters, read_map
from missile.probe.counters import SectorCount, counter_witness, group_sets, parse_report

REPORT = """==PROF== Connected to process 1
==PROF== Profiling "contention" - 0: 0%....100% - 1 pass
==PROF== Disconnected from process 1
"ID","lts__t_sectors_op_read.avg","lts__t_sectors_op_read.max","lts__t_sectors_op_read.min","lts__t_sectors_op_read.sum"
"","sector","sector","sector","sector"
"0","25.50","1,020","3","2,040"
"1","51.00","1,020","0","4,080"
"""


def test_a_report_gives_busy_instances_and_how_many_there_are() -> None:
    first, second = parse_report(REPORT)
    assert (first.busy, first.instances) == (pytest.approx(2.0), pytest.approx(80.0))
    assert (first.least, second.least) == (3, 0)
    assert (second.busy, second.instances) == (pytest.approx(4.0), pytest.approx(80.0))


@pytest.mark.parametrize("text", ["", "==ERROR== ERR_NVGPUCTRPERM - no permission\n"])
def test_no_table_is_no_count(text: str) -> None:
    assert parse_report(text) == []


MAP = Path(__file__).parents[2] / "benchmarks" / "results" / "probe-h200" / "map1.json"


def test_sets_are_whole_groups_and_grow() -> None:
    sets = group_sets([[0, 1], [2], [3, 4, 5], [6]])
    assert sets == [(0, 1), (0, 1, 2), (0, 1, 2, 3, 4, 5, 6)]
    assert group_sets([[4, 2]]) == [(2, 4)]


# What an H200 counted (sectors read: sum, mean, least, most): nothing, groups of 16, 32, 46 and 94 slices.
FLOOR = SectorCount(6919, 73.61, 0, 385)


def counted(sizes: list[int], each: float) -> list[SectorCount]:
    return [FLOOR, *(SectorCount(size * each, size * each / 94, 1280, each * 1.03) for size in sizes)]


def test_as_many_busy_instances_as_slices_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    channel_map = read_map(MAP)
    sizes = [len(slices) for slices in group_sets(channel_map.channels)]
    monkeypatch.setattr(counters, "count_sectors", lambda *_: counted(sizes, 3.4e5))
    witness = counter_witness(channel_map, "cuda:0")
    assert witness.verdict is Verdict.AGREES
    assert witness.numbers["instances"] == pytest.approx(94)
    assert witness.numbers["least_of_mean_46"] < 0.01


def test_groups_that_share_instances_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    channel_map = read_map(MAP)
    sizes = [len(slices) for slices in group_sets(channel_map.channels)]
    # The second group lights up the first one's instances again.
    shared = counted([sizes[0], sizes[0], *sizes[2:]], 3.4e5)
    monkeypatch.setattr(counters, "count_sectors", lambda *_: shared)
    assert counter_witness(channel_map, "cuda:0").verdict is Verdict.DISAGREES
