"""The table of placements: what is noted is found again, by the code and not by where it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from missile.coloring.shape import Form
from missile.compiler.placements import PlacementTable, digest
from missile.compiler.ptx.rewrite import USUAL, Placement
from missile.errors import MisuseError

CODE = """.version 8.7
.visible .entry k()
{
\t.loc\t1 {line} 3
\tret;
}
\t.file\t1 "{file}"
\t.section\t.debug_abbrev
\t{{
\t.b8 {line}
\t}}
""".replace("()\n{\n", "()\n{{\n").replace("ret;\n}\n", "ret;\n}}\n")


def _code(line: int = 1, file: str = "a.py") -> str:
    return CODE.format(line=line, file=file)


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = PlacementTable("NVIDIA H200")
    table.note(Form.PAIR, _code(), Placement.ACCESS)
    table.note(Form.SHADOW, _code(), Placement.DEFINITION)
    table.note(Form.SHADOW, _code(), None)
    table.note(Form.STEP, _code(), Placement.EARLY)
    table.note_shadowed(Form.PAIR, _code(), True)
    table.note_shadowed(Form.IN_PAGE, _code(), True)
    table.note_shadowed(Form.IN_PAGE, _code(), False)
    table.save(tmp_path)
    again = PlacementTable.load("NVIDIA H200", tmp_path)
    assert again.find(Form.PAIR, _code()) is Placement.ACCESS
    assert again.find(Form.SHADOW, _code()) is USUAL is Placement.WINDOWS
    assert again.find(Form.STEP, _code()) is Placement.EARLY
    assert again.find(Form.PAIR, _code().replace("ret", "exit")) is USUAL
    assert again.is_shadowed(Form.PAIR, _code())
    assert not again.is_shadowed(Form.IN_PAGE, _code())


def test_files_and_lines_make_no_difference() -> None:
    assert digest(_code(5, "/elsewhere/b.py")) == digest(_code())


def test_no_table_is_an_empty_one_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert PlacementTable.load("NVIDIA L4", tmp_path).best == {}
    (tmp_path / "NVIDIA_L4.json").write_text('{"format": 1, "gpu": "NVIDIA L4", "placements": {"pair": {"x": "up"}}}')
    with pytest.raises(MisuseError, match=r"NVIDIA_L4\.json can't be read"):
        PlacementTable.load("NVIDIA L4", tmp_path)
