"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from missile.files import write_whole


def test_content_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_whole(path, "é")
    assert path.read_bytes() == "é".encode()
    write_whole(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_an_interruption_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_whole(path, "old")

    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
