"""`missile bench isolation`: its plan, its cells on a simulated GPU, its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from missile.bench.isolation.lab import ColoredUnits, pages_for
from missile.bench.isolation.plan import FULL, QUICK, Cell, MicroPlan, cells_of, schemes_of
from missile.bench.isolation.plot import plot_isolation
from missile.bench.isolation.results import IsolationResults, outcomes
from missile.bench.isolation.run import run_micro
from missile.bench.isolation.table import blocks_of, render_markdown
from missile.cli.app import main
from missile.coloring.pool import ColoredPool
from missile.errors import MisuseError
from missile.gpu import open_gpu
from missile.gpu.interface import Access
from missile.probe import ChannelMap, map_for, read_map

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "probe-h200" / "map1.json"
MIB = 1 << 20
TINY = MicroPlan(
    working_sets=(2 * MIB, 4 * MIB),
    victim_accesses=(Access.READ,),
    aggressor_accesses=(Access.READ, Access.WRITE),
    aggressor_bytes=(8 * MIB,),
    repeats=5,
)


@pytest.fixture(scope="module")
def recorded() -> ChannelMap:
    return read_map(RECORDED)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> ChannelMap:
    """The map of the simulated GPU of these tests."""
    with open_gpu("sim:a5500") as gpu:
        return map_for(gpu, cache=tmp_path_factory.mktemp("maps"), pages=32, interference=False)


def test_schemes_have_disjoint_sides_but_for_the_two_controls(recorded: ChannelMap, known: ChannelMap) -> None:
    for channel_map in (recorded, known):
        schemes = schemes_of(channel_map)
        assert [s.name for s in schemes if not s.disjoint] == ["none", schemes[3].name]
        assert len({s.name for s in schemes}) == len(schemes)


@pytest.mark.parametrize("plan", [FULL, QUICK, TINY])
def test_every_pair_has_both_sides_alone_beside_it(plan: MicroPlan, recorded: ChannelMap) -> None:
    cells = list(cells_of(plan, schemes_of(recorded), 132))
    assert len(set(cells)) == len(cells)
    for cell in cells:
        if cell.victim_access and cell.aggressor_access:
            assert cell.victim_alone in cells
            assert cell.aggressor_alone in cells
        assert cell.victim_sms + cell.aggressor_sms == 132


def test_units_are_of_their_colors_and_the_sides_share_no_page(known: ChannelMap) -> None:
    plan = TINY
    schemes = schemes_of(known)
    with open_gpu("sim:a5500") as gpu, ColoredPool(gpu, pages_for(plan, schemes, known)) as pool:
        units = ColoredUnits(gpu, known, pool)
        constants = known.classify(gpu, pool.addresses)
        for scheme in schemes:
            ours = units.units(scheme.victim, 4 * MIB, victim=True)
            theirs = units.units(scheme.aggressor, 8 * MIB, victim=False)
            assert (len(ours), len(theirs)) == (4 * MIB // 256, 8 * MIB // 256)
            assert not set(ours // known.page_bytes) & set(theirs // known.page_bytes)
            for found, colors in ((ours, scheme.victim), (theirs, scheme.aggressor)):
                assert len(np.unique(found)) == len(found)
                page = np.searchsorted(np.sort(pool.addresses), found, side="right") - 1
                row = np.argsort(pool.addresses)[page]
                offset = found - pool.addresses[row]
                for number in np.unique(row):
                    here = known.color_of(offset[row == number], constants[number])
                    assert set(here) <= set(colors)


def test_a_simulated_run_is_whole_resumes_and_says_that_it_is_simulated(known: ChannelMap, tmp_path: Path) -> None:
    path = tmp_path / "isolation.json"
    seen: list[int] = []
    with open_gpu("sim:a5500") as gpu:

        def stop(done: int, count: int, text: str) -> None:
            if done == 7:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_micro(gpu, TINY, path, known=known, progress=stop)
        part = IsolationResults.read(path)
        assert (part.interrupted, len(part.cells)) == (True, 7)
        whole = run_micro(gpu, TINY, path, known=known, progress=lambda done, count, text: seen.append(done))
    assert not whole.interrupted
    assert whole.cells[:7] == part.cells
    assert next(done for done in seen if done) == 7  # what was there counts as done
    assert IsolationResults.read(path) == whole
    assert whole.simulated
    assert "(simulated)" in render_markdown(whole)
    assert plot_isolation(whole, tmp_path / "isolation.png")
    assert not list(tmp_path.glob("*.part*"))


def test_disjoint_colors_keep_a_simulated_victim_undisturbed(known: ChannelMap, tmp_path: Path) -> None:
    with open_gpu("sim:a5500") as gpu:
        results = run_micro(gpu, TINY, tmp_path / "isolation.json", known=known)
    found = outcomes(results)
    assert len(found) == 2 * 2 * len(results.schemes)
    for outcome in found:
        assert outcome.slowdown is not None
        assert outcome.aggressor_kept is not None
        if outcome.disjoint:
            assert outcome.slowdown < 1.05
    assert max(o.slowdown or 0 for o in found if not o.disjoint) > 1.2
    block = blocks_of(results)[0]
    assert all(len(row) == len(block.schemes) and None not in row for _, row in block.rows)


def test_ratios_are_of_the_right_cells(known: ChannelMap, tmp_path: Path) -> None:
    with open_gpu("sim:a5500") as gpu:
        results = run_micro(gpu, TINY, tmp_path / "isolation.json", known=known)
    cells = {c.cell: c for c in results.cells}
    scheme = next(s for s in results.schemes if s.disjoint)
    outcome = next(o for o in outcomes(results) if o.scheme == scheme.name and o.aggressor_access is Access.WRITE)
    ours, theirs = outcome.victim_sms, outcome.aggressor_sms
    both = cells[Cell(scheme.name, ours, theirs, 2 * MIB, 8 * MIB, Access.READ, Access.WRITE)]
    alone = cells[Cell(scheme.name, ours, theirs, 2 * MIB, 0, Access.READ, None)]
    everything = cells[Cell("none", ours, theirs, 0, 8 * MIB, None, Access.WRITE)]
    assert outcome.slowdown == pytest.approx(np.median(both.victim_ns) / np.median(alone.victim_ns), abs=1e-4)
    kept = both.aggressor_bytes_per_s / (everything.aggressor_bytes_per_s * scheme.aggressor_share)
    assert outcome.aggressor_kept == pytest.approx(kept, abs=1e-4)


def test_results_of_another_gpu_are_not_mixed_in(known: ChannelMap, tmp_path: Path) -> None:
    path = tmp_path / "isolation.json"
    with open_gpu("sim:a5500") as gpu:
        run_micro(gpu, TINY, path, known=known)
    before = path.read_bytes()
    with open_gpu("sim:p40") as gpu, pytest.raises(MisuseError, match="another GPU"):
        run_micro(gpu, TINY, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"kind": 1}', '{"schema": "missile-isolation/1"}'])
def test_broken_results_are_refused_in_a_sentence(broken: str, tmp_path: Path) -> None:
    path = tmp_path / "isolation.json"
    path.write_text(broken)
    with pytest.raises(MisuseError, match=r"isolation\.json.*\.$"):
        IsolationResults.read(path)


@pytest.mark.parametrize(
    "bad",
    [{"working_sets": ()}, {"working_sets": (0,)}, {"splits": (1.0,)}, {"splits": ()}, {"repeats": 0}],
)
def test_plans_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(MisuseError):
        MicroPlan(**{"working_sets": (MIB,), **bad})


def test_the_command_writes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MISSILE_CACHE", str(tmp_path / "cache"))
    assert main(["bench", "isolation", "-d", "sim:p40", "--quick", "-o", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["simulated"] is True
    assert said["outcomes"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"isolation.json", "isolation.md", "isolation.png"}
    assert main(["bench", "isolation", "-d", "sim:nothing"]) == 2
