"""What is tried when tuning, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.compiler.tiles import Problem, Tile, candidates
from missile.compiler.tuning import AUTOTUNE, TuningTable, table_path
from missile.errors import MisuseError

SIDE = st.integers(1, 40_000)


@given(SIDE, SIDE, st.integers(1, 8192), st.integers(1, 64), st.sampled_from([1, 9, 49]), st.sampled_from([4, 8]))
def test_candidates_are_few_distinct_and_valid(m: int, n: int, k: int, batch: int, taps: int, warps: int) -> None:
    tiles = candidates(Problem(m, n, k, batch, taps), count=7, max_warps=warps)
    assert 1 <= len(tiles) <= 7
    assert len(set(tiles)) == len(tiles)
    for tile in tiles:
        for side, size in ((tile.m, m), (tile.n, n), (tile.k, k)):
            assert side & (side - 1) == 0
            assert 16 <= side < max(32, 2 * size)
        assert 1 <= tile.warps <= warps
        assert tile.warps * 256 <= max(256, tile.m * tile.n)
        assert (tile.m + tile.n) * tile.k * 2 * tile.stages <= 227 * 1024


def test_large_products_get_large_tiles_and_small_ones_small() -> None:
    large = candidates(Problem(4096, 4096, 1024), count=4)
    small = candidates(Problem(49, 512, 512, taps=9), count=4)
    assert min(t.m * t.n for t in large) > max(t.m * t.n for t in small)


def test_table_survives_the_disk(tmp_path: Path) -> None:
    table = TuningTable("NVIDIA H200", {"mm 1x2@2x1 2x3@3x1 float16": Tile(16, 32, 64, 3, 4)}, {"ab": {"XBLOCK": 64}})
    path = tmp_path / "table.json"
    table.save(path)
    read = TuningTable.load(path, "")
    assert (read.gpu, read.tiles, read.blocks) == (table.gpu, table.tiles, table.blocks)
    other = TuningTable("NVIDIA H200", {"x": Tile(16, 16, 16, 1, 1)})
    read.merge(other)
    assert read.tiles == table.tiles | other.tiles


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 99}', '{"format": 1, "tiles": {"a": [1]}, "blocks": {}, "gpu": ""}']
)
def test_broken_table_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(MisuseError, match=r"tuning table .*table\.json can't be read"):
        TuningTable.load(path, "")


def test_no_table_is_an_empty_one(tmp_path: Path) -> None:
    assert TuningTable.load(tmp_path / "none.json", "NVIDIA H200").tiles == {}


@pytest.mark.parametrize("path", sorted(AUTOTUNE.glob("*.json")), ids=lambda path: path.name)
def test_shipped_tables_are_readable_and_named_after_their_gpu(path: Path) -> None:
    table = TuningTable.load(path, "")
    assert table_path(table.gpu) == path
    assert json.loads(path.read_text())["format"] == 1
    assert table.tiles


def test_problem_with_a_little_longer_sums_takes_its_neighbours_tile() -> None:
    tile = Tile(128, 128, 64, 3, 4)
    table = TuningTable("", {"mm 3136x192@192x1 192x48@1x192 float16": tile})
    assert table.find("mm 3136x240@240x1 240x48@1x240 float16") == tile
    assert table.find("mm 3136x192@192x1 192x48@1x192 float16") == tile
    assert table.find("mm 3136x480@480x1 480x48@1x480 float16") is None
    assert table.find("mm 3136x240@240x1 240x64@1x240 float16") is None
    assert table.find("mm 3136x240@240x1 240x48@48x1 float16") is None
    assert table.find("addmm 3136x48@0x1 3136x240@240x1 240x48@1x240 float16") is None
    assert table.find("conv 1x3x8x8 4x3x3x3 stride 1x1 padding 1x1 groups 1 float16") is None
