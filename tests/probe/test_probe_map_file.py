from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from missile.cli import main
from missile.errors import MisuseError
from missile.gpu import open_gpu
from missile.probe import ChannelMap, probe_gpu, read_map, write_map
from missile.probe.map_file import to_json
from missile.probe.pictures import draw


@pytest.fixture(scope="module")
def found() -> ChannelMap:
    with open_gpu("sim:a2000") as gpu:
        return probe_gpu(gpu, pages=32, interference=False)


@pytest.fixture
def path(found: ChannelMap, tmp_path: Path) -> Path:
    write_map(found, tmp_path / "map.json")
    return tmp_path / "map.json"


def test_a_map_survives_the_file(found: ChannelMap, path: Path) -> None:
    again = read_map(path)
    assert to_json(again) == to_json(found) | {}
    assert (again.page_slices() == found.page_slices()).all()
    assert again.metric.sms == found.metric.sms


def test_the_file_has_the_promised_keys(path: Path) -> None:
    content = json.loads(path.read_text())
    assert {"gpu", "granule_bytes", "page_bytes", "slices", "linear_masks", "nonlinear", "colors", "confidence"} <= set(
        content
    )
    assert content["seconds"] > 0
    assert sorted(slice_ for color in content["colors"] for slice_ in color) == list(range(content["slices"]))


def test_a_truncated_file_is_refused(path: Path) -> None:
    text = path.read_text()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        path.write_text(text[:length])
        with pytest.raises(MisuseError, match="truncated"):
            read_map(path)


@pytest.mark.parametrize("key", ["granule_bytes", "linear_masks", "gpu", "patterns", "confidence"])
def test_an_edited_file_is_refused(path: Path, key: str) -> None:
    content = json.loads(path.read_text())
    content[key] = [1] if isinstance(content[key], list) else "edited" if isinstance(content[key], str) else 1024.5
    path.write_text(json.dumps(content))
    with pytest.raises(MisuseError, match="changed after it was written"):
        read_map(path)


def test_other_files_are_refused_in_one_sentence(tmp_path: Path, path: Path) -> None:
    other = tmp_path / "other.json"
    with pytest.raises(MisuseError, match="There is no channel map"):
        read_map(other)
    other.write_text("{}")
    with pytest.raises(MisuseError, match="not a channel map"):
        read_map(other)
    other.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(MisuseError, match="has format 99"):
        read_map(other)


def test_a_failed_write_leaves_the_old_map(path: Path, found: ChannelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(MisuseError, match="can't be written: No space left"):
        write_map(found, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_map_verb(path: Path, found: ChannelMap, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", str(path), "0", "0x400", "2047", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["slice"] for row in rows] == found.slice_of([0, 0x400, 2047]).tolist()
    assert [row["color"] for row in rows] == found.color_of([0, 0x400, 2047]).tolist()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["0x200000"], "outside a page"), (["zero"], "not a number"), (["0", "--constants", "0,0"], "three numbers")],
)
def test_map_verb_misused(path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", str(path), *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_probe_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, picture = tmp_path / "m.json", tmp_path / "m.png"
    arguments = [
        "--device",
        "sim:a2000",
        "--pages",
        "32",
        "--no-interference",
        "-o",
        str(target),
        "--plot",
        str(picture),
    ]
    assert main(["probe", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slices"] == 6
    assert read_map(target).slices == 6
    assert picture.stat().st_size > 10_000
    assert sorted(tmp_path.iterdir()) == [target, picture]


def test_probe_verb_misused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--device", "sim:nope"]) == 2
    assert main(["probe", "--device", "sim:a2000", "-o", str(tmp_path / "no" / "m.json")]) == 2
    assert "There is no directory" in capsys.readouterr().err


def test_a_picture_of_another_type_is_refused(found: ChannelMap, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"\.png"):
        draw(found, tmp_path / "map.txt")
    assert np.all([not list(tmp_path.iterdir())])
