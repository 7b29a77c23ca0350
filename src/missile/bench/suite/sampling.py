"""A part of the suite that gives a fair picture: which cells to run first, and which settings need not run again. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from missile.bench.suite.cells import BASELINES, SETTINGS, Cell, family
from missile.bench.suite.summary import CellSummary
from missile.errors import MisuseError
from missile.workloads.models import MODELS

__all__ = ["SAMPLE_RULE", "sample", "settings_that_won"]

SAMPLE_RULE = (
    "a fixed sample, chosen before anything was measured: by turns a pair at Poisson 60, 30 and 90% of capacity and a mix, "
    "a pair under an Azure trace or a DISB workload; LS and BE models are paired by a Latin square, so that at each load "
    "every LS model comes once before one comes again, and every BE model equally often"
)
"""How `sample` chooses, for reports."""

_LOADS = (("poisson60", 0, 0), ("poisson30", 1, 3), ("poisson90", 2, 5))  # label, shift of BE models, first LS model
_OTHERS = ("mix-1ls-2be", "conv", "code", "mix-3ls-2be", "conv", "mix-2ls-1be", "code", "disb-A")


def sample(cells: Sequence[Cell], count: int) -> tuple[Cell, ...]:
    """The first `count` cells of the sample's order, of which every prefix is balanced as far as its length allows.

    32 of them hold every LS model once and every BE model twice at each Poisson load; more come from the traces, mixes and
    DISB. MisuseError for a count below 1, or above what the sample has.
    """
    by_name = {cell.name: cell for cell in cells}
    order = [by_name[name] for name in dict.fromkeys(_order()) if name in by_name]
    if not 0 < count <= len(order):
        raise MisuseError(f"--sample takes 1 to {len(order)} cells, not {count}; without it, all cells are chosen.")
    return tuple(order[:count])


def _order() -> Iterator[str]:
    ls = [name for name, info in MODELS.items() if info.kind == "ls"]
    be = [name for name, info in MODELS.items() if info.kind == "be"]

    def pair(label: str, shift: int, place: int) -> str:
        place %= len(ls)
        return f"{label}--{ls[place]}--{be[(place + shift + place // len(be)) % len(be)]}"

    conv = iter(pair("azure-conv", 3, place) for place in range(0, len(ls), 2))
    code = iter(pair("azure-code", 3, place) for place in range(1, len(ls), 2))
    for turn, other in zip(range(len(ls)), _OTHERS, strict=True):
        for label, shift, first in _LOADS:
            yield pair(label, shift, first + turn)
        yield next(conv) if other == "conv" else next(code) if other == "code" else other
    yield from (*conv, *code, "mix-all-twelve", *(f"disb-{name}" for name in ("B", "C", "D", "E", "REAL")))


def settings_that_won(policies: Sequence[str], cells: Sequence[CellSummary]) -> tuple[str, ...]:
    """`policies` (families or single settings), of each baseline those settings only that were its best in some of `cells`.

    A baseline that `cells` say nothing about keeps all of its settings, and `missile` and its ablations are what they are.
    """
    won: dict[str, set[str]] = {}
    for cell in cells:
        for name, best in cell.best.items():
            won.setdefault(name, set()).add(best.policy)
    kept: list[str] = []
    for policy in policies:
        name = family(policy)
        settings = SETTINGS.get(policy, (policy,))
        if name in BASELINES and name in won:
            settings = tuple(one for one in settings if one in won[name]) or settings
        kept += settings
    return tuple(dict.fromkeys(kept))
