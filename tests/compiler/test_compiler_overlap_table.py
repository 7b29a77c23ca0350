"""The table of places: what is kept of it, and what it answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.coloring.shape import Form
from missile.compiler.objective import Objective
from missile.compiler.overlap_table import PLAIN, OverlapTable, Tuned, memory_of
from missile.compiler.ptx.overlap import Dependents, Overlap
from missile.errors import MisuseError

PTX = ".version 8.0\n.target sm_90\n.visible .entry k() { ret; }\n"
notes = st.lists(
    st.tuples(
        st.sampled_from(Objective),
        st.sampled_from([PLAIN, *map(str, Form)]),
        st.text(max_size=3),
        st.sampled_from(Dependents),
    )
)


@given(notes)
def test_what_is_noted_is_found_again(tmp_path_factory: pytest.TempPathFactory, noted: list[tuple]) -> None:
    folder = tmp_path_factory.mktemp("tables")
    table = OverlapTable("NVIDIA H200")
    last = {}
    for objective, memory, text, place in noted:
        table.note(objective, memory, text, place)
        last[objective, memory, text] = place
    table.save(folder)
    again = OverlapTable.load("NVIDIA H200", folder)
    for (objective, memory, text), place in last.items():
        assert again.find(objective, memory, text) is place


def test_what_is_not_there_is_late() -> None:
    table = OverlapTable("another GPU")
    assert table.find(Objective.BESIDE, PLAIN, PTX) is Dependents.LATE
    assert table.overlap_for(Tuned(), PLAIN, PTX) == Overlap(Dependents.LATE)
    assert table.overlap_for(Overlap(Dependents.NEVER), PLAIN, PTX) == Overlap(Dependents.NEVER)


def test_objectives_and_memories_are_apart() -> None:
    table = OverlapTable("NVIDIA H200")
    table.note(Objective.ALONE, memory_of(Form.PAIR), PTX, Dependents.START)
    assert table.find(Objective.ALONE, memory_of(Form.PAIR), PTX) is Dependents.START
    assert table.find(Objective.ALONE, memory_of(None), PTX) is Dependents.LATE
    assert table.find(Objective.BESIDE, memory_of(Form.PAIR), PTX) is Dependents.LATE
    assert Tuned(Objective.ALONE).name != Tuned(Objective.BESIDE).name


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "gpu": "x", "places": {"soon": {}}}'])
def test_a_broken_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(MisuseError, match=r"table of overlapping launches .*x\.json can't be read"):
        OverlapTable.load("x", tmp_path)
    assert not OverlapTable.load("y", tmp_path).places
