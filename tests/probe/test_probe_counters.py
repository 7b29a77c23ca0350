from __future__ import annotations

import pytest

from missile.probe.counters import parse_report

REPORT = """==PROF== Connected to process 1
==PROF== Profiling "contention" - 0: 0%....100% - 1 pass
==PROF== Disconnected from process 1
"ID","Process ID","Kernel Name","lts__t_sectors_op_read.avg","lts__t_sectors_op_read.max","lts__t_sectors_op_read.sum"
"","","","sector","sector","sector"
"0","1","contention","25.50","1,020","2,040"
"1","1","contention","51.00","1,020","4,080"
"""


def test_a_report_gives_busy_instances_and_how_many_there_are() -> None:
    first, second = parse_report(REPORT)
    assert (first.busy, first.instances) == (pytest.approx(2.0), pytest.approx(80.0))
    assert (second.busy, second.instances) == (pytest.approx(4.0), pytest.approx(80.0))


@pytest.mark.parametrize("text", ["", "==ERROR== ERR_NVGPUCTRPERM - no permission\n"])
def test_no_table_is_no_count(text: str) -> None:
    assert parse_report(text) == []
