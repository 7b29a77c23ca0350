"""The suite `paper`: its cells (who shares the GPU, under which arrivals) and the settings every policy is tried at. Pure.

A rate is a share of its model's *capacity*: the requests/s that it finishes alone in a closed loop, measured on the GPU at
hand, so that one definition loads a slow GPU and a fast one alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from missile.bench.scenario import Scenario
from missile.errors import MisuseError
from missile.runtime.tenant import Tenant
from missile.workloads.models import MODELS
from missile.workloads.traces import disb_tasks

__all__ = ["BASELINES", "SETTINGS", "SUITES", "Capacity", "Cell", "family", "paper_cells", "select", "settings_of"]

Capacity = Mapping[str, float]
"""Requests/s of each LS model alone, by name."""

SLO_FACTOR = 1.5

_CHANGES = ("pause=on", "elastic=off", "preempt=off", "copies=off", "colors=on")

SETTINGS: dict[str, tuple[str, ...]] = {
    "temporal": ("temporal",),
    "streams": ("streams",),
    "priority": ("priority",),
    "partition": tuple(f"partition:ls_share={share}" for share in (0.25, 0.5, 0.75, 0.9)),
    "mps": (
        "mps:priority=off",
        "mps:priority=on",
        "mps:be_share=0.75,priority=on",
        "mps:be_share=0.5,priority=on",
        "mps:be_share=0.25,priority=on",
        "mps:ls_share=0.5,be_share=0.5",
    ),
    "orion": (
        "orion:dur_threshold=0.025",
        "orion:dur_threshold=0.1",
        "orion:dur_threshold=0.5",
        "orion:dur_threshold=2",
        "orion:dur_threshold=0.5,sm_threshold=0.5",
        "orion:dur_threshold=0.1,throttle_idle=off",
    ),
    "missile": ("missile",),
    **{f"missile:{change}": (f"missile:{change}",) for change in _CHANGES},
}
"""What each family is tried at: a baseline over its own knobs, `missile` as it plans itself, and each of its ablations.

A family of several settings has none that is called as it is: its name stands for all of them.
With pause=on nothing is planned: BE always pauses while an LS request is there.

Colors are the other way round: translated kernels take longer, so `missile` separates memory only when it is told to."""

BASELINES = ("temporal", "streams", "priority", "partition", "mps", "orion")


def family(policy: str) -> str:
    """The family in `SETTINGS` that a policy belongs to: an ablation its own, else the policy's name."""
    return policy if policy in SETTINGS else policy.partition(":")[0]


def settings_of(names: Sequence[str]) -> tuple[str, ...]:
    """The policies that `names` ask for: a family's all, or single settings such as "partition:ls_share=0.4"."""
    return tuple(dict.fromkeys(policy for name in names for policy in SETTINGS.get(name, (name,))))


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination that is run under every policy. `group`: what kind it is; rates in `tenants` are shares of capacity.

    least_s: shorter measured spans would leave its LS tenants without a p99.
    """

    name: str
    group: str
    tenants: tuple[dict[str, Any], ...]
    least_s: float = 0.0

    @property
    def models(self) -> frozenset[str]:
        return frozenset(tenant["model"] for tenant in self.tenants)

    @property
    def pair(self) -> bool:
        return len(self.tenants) == 2

    def duration_s(self, asked_s: float, warmup_s: float, most_s: float | None = None) -> float:
        """How long its runs are, warm-up included: as long as asked, longer where it needs that, at most `most_s`."""
        wanted = max(asked_s, self.least_s + warmup_s)
        return wanted if most_s is None else min(wanted, most_s)

    def scenario(self, capacity: Capacity, *, most_s: float | None = None, **run: Any) -> Scenario:
        """Its scenario at `capacity`. most_s: as of `duration_s`; run: the scenario's other fields. KeyError for an LS model
        without a capacity."""
        duration_s = self.duration_s(run["duration_s"], run["warmup_s"], most_s)
        tenants = [_tenant(tenant, capacity) for tenant in self.tenants]
        return Scenario.model_validate({**run, "name": self.name, "duration_s": duration_s, "tenant": tenants})


def _tenant(tenant: dict[str, Any], capacity: Capacity) -> Tenant:
    arrivals = dict(tenant["arrivals"])
    if (load := arrivals.pop("load", None)) is not None:
        # To a tenth of a request: the scenario is compared with the one that a file was made with.
        arrivals["rate_per_s"] = round(load * capacity[tenant["model"]], 1)
    return Tenant.model_validate({**tenant, "arrivals": arrivals})


def _ls(model: str, arrivals: dict[str, Any]) -> dict[str, Any]:
    return {"name": model, "class": "LS", "model": model, "slo_factor": SLO_FACTOR, "arrivals": arrivals}


def _be(model: str, name: str = "") -> dict[str, Any]:
    return {"name": name or model, "class": "BE", "model": model, "arrivals": {"kind": "closed", "depth": 2}}


def _poisson(load: float) -> dict[str, Any]:
    return {"kind": "poisson", "load": load}


def _azure(what: str) -> dict[str, Any]:
    # Bursty: at half of the capacity on average, their bursts are above it already.
    return {"kind": "trace", "name": f"azure-llm-2023/{what}", "load": 0.5}


# DISB's networks are of another time than the twelve: each is played by one of like kind, the same in every workload.
_DISB_LS = {
    "resnet152": "resnet34",
    "densenet201": "efficientnet_b0",
    "vgg19": "mobilevit_s",
    "inceptionv3": "efficientformer_l1",
    "distilbert": "mobilebert",
}
_DISB_BE = {
    "resnet152": ("resnet152", "resnet152"),
    "densenet201": ("densenet161", "densenet161"),
    "vgg19": ("decoder_1b", "decoder_1b"),
    "inceptionv3": ("resnet152", "resnet152.2"),
    "distilbert": ("bert_large", "bert_large"),
}
_DISB_LEAST_S = 6.0  # its slowest tasks have 20 requests/s; those of REAL have 4 to 10, and no p99 in that time
_DISB_REQUESTS = 120


def _disb(workload: Any) -> Cell:
    tenants = []
    least_s = 1.0
    for task in disb_tasks(workload):
        if task.latency_sensitive and task.load != "continuous":
            least_s = max(least_s, _DISB_REQUESTS / task.rate_per_s if task.rate_per_s else _DISB_LEAST_S)
        network = task.id.rpartition("_")[0]
        arrivals = {"kind": "disb", "workload": workload, "task": task.id}
        tenants.append(
            _ls(_DISB_LS[network], arrivals)
            if task.latency_sensitive
            else {**_be(*_DISB_BE[network]), "arrivals": arrivals}
        )
    return Cell(f"disb-{workload}", "DISB", tuple(tenants), min(least_s, _DISB_LEAST_S))


def paper_cells() -> tuple[Cell, ...]:
    """All cells, those first that a short budget should have: each prefix is of use."""
    ls = [name for name, info in MODELS.items() if info.kind == "ls"]
    be = [name for name, info in MODELS.items() if info.kind == "be"]

    def pairs(label: str, group: str, arrivals: dict[str, Any]) -> list[Cell]:
        return [Cell(f"{label}--{one}--{other}", group, (_ls(one, arrivals), _be(other))) for one in ls for other in be]

    def mix(label: str, of_ls: Sequence[str], of_be: Sequence[str], load: float, least_s: float = 0.0) -> Cell:
        tenants = (*(_ls(name, _poisson(load)) for name in of_ls), *map(_be, of_be))
        return Cell(f"mix-{label}", "mix", tenants, least_s)

    return (
        *pairs("poisson60", "Poisson, 60% of capacity", _poisson(0.6)),
        mix("1ls-2be", ["efficientnet_b0"], ["bert_large", "decoder_1b"], 0.5),
        mix("2ls-1be", ["resnet34", "mobilebert"], ["densenet161"], 0.25),
        mix("3ls-2be", ["resnet34", "efficientnet_b0", "mobilebert"], ["bert_large", "decoder_1b"], 0.15, 1.0),
        mix("all-twelve", ls, be, 0.06, 2.5),
        *pairs("azure-conv", "Azure LLM, conversation", _azure("conv")),
        *pairs("azure-code", "Azure LLM, code", _azure("code")),
        *pairs("poisson30", "Poisson, 30% of capacity", _poisson(0.3)),
        *pairs("poisson90", "Poisson, 90% of capacity", _poisson(0.9)),
        *map(_disb, ("A", "B", "C", "D", "E", "REAL")),
    )


SUITES: dict[str, Callable[[], tuple[Cell, ...]]] = {"paper": paper_cells}


def select(cells: Sequence[Cell], patterns: Sequence[str] = (), models: Sequence[str] = ()) -> tuple[Cell, ...]:
    """The cells whose names match one of `patterns` ("poisson60--*"; none given: all) and that need no model but `models`.

    MisuseError for an unknown model, and where nothing is left.
    """
    for model in models:
        if model not in MODELS:
            raise MisuseError(f"Unknown model {model!r}; known: {', '.join(MODELS)}.")
    chosen = tuple(
        cell
        for cell in cells
        if (not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns))
        and (not models or cell.models <= set(models))
    )
    if not chosen:
        examples = ", ".join(dict.fromkeys(cell.name.partition("--")[0] for cell in cells))
        raise MisuseError(f"No cell of the suite fits --cells and --models; cells' names begin with {examples}.")
    return chosen
