"""Isolation of real models: each LS model beside each BE model on split SMs, in plain and in colored memory.

Every tenant works in a closed loop, so that a service time is the model's own: no queue is in it, and no idle GPU that
would clock or cache differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from missile.bench.isolation.plan import halves_of
from missile.compiler.objective import OverlapChoice
from missile.errors import GpuError, MissileError, MisuseError
from missile.gpu.interface import Gpu, GpuInfo
from missile.probe.channel_map import ChannelMap
from missile.runtime.loading import Coloring, LoadedTenant, Roster, load_tenants
from missile.runtime.policies.interface import Action, Lane, Layout, Policy, Snapshot, Start
from missile.runtime.policies.partition import PartitionPolicy
from missile.runtime.records import RunRecord, TenantRecord
from missile.runtime.run import run
from missile.runtime.tenant import Tenant, TenantClass
from missile.workloads.arrivals import ClosedLoop

__all__ = ["DEFAULT_BE", "DEFAULT_LS", "RealCell", "RealPlan", "RealSample", "Room", "measure_real", "real_cells"]

DEFAULT_LS = (
    "resnet34",
    "efficientnet_b0",
    "mobilenet_v3_large",
    "mobilebert",
    "squeezenet1_1",
    "shufflenet_v2",
    "mobilevit_s",
    "efficientformer_l1",
)
DEFAULT_BE = ("synthetic-gemv", "decoder_1b", "synthetic-copy", "densenet161", "bert_large")


class Room(StrEnum):
    """What a tenant has of the SMs: all of them, or its side of the split."""

    WHOLE = "whole"
    SHARE = "share"


@dataclass(frozen=True, slots=True)
class RealPlan:
    """ls, be: models. ls_share: of the SMs, for the LS side. duration_s of each run, of which warmup_s are not measured.
    overlap: how launches of LS models overlap."""

    ls: tuple[str, ...] = DEFAULT_LS
    be: tuple[str, ...] = DEFAULT_BE
    ls_share: float = 0.25
    duration_s: float = 0.3
    warmup_s: float = 0.05
    seed: int = 1
    overlap: OverlapChoice = OverlapChoice.ALONE

    def __post_init__(self) -> None:
        if not self.ls or not self.be:
            raise MisuseError("An isolation benchmark of models needs at least one LS and one BE model.")
        if twice := [model for model in (*self.ls, *self.be) if (*self.ls, *self.be).count(model) > 1]:
            raise MisuseError(f"Model {twice[0]!r} is given twice.")
        if not 0 <= self.warmup_s < self.duration_s:
            raise MisuseError("The warm-up must be shorter than the run.")
        PartitionPolicy(self.ls_share)


@dataclass(frozen=True, slots=True)
class RealCell:
    """One run. ls or be is "" where that side is not there. colored: LS on one half of the colors, BE on the other."""

    ls: str
    be: str
    room: Room
    colored: bool


@dataclass(frozen=True, slots=True)
class RealSample:
    """ls_ns, be_ns: from first kernel's start to last one's end on the GPU, every measured request. be_per_s: finished
    requests a second. error: why there are none."""

    ls_ns: tuple[int, ...] = ()
    be_ns: tuple[int, ...] = ()
    be_per_s: float = 0.0
    error: str = ""


def real_cells(plan: RealPlan) -> tuple[RealCell, ...]:
    """Every run of `plan`. A pair's plain and colored runs stand beside each other, as do a model's solo runs."""
    cells = []
    for colored in (False, True):
        cells += [RealCell("", be, Room.SHARE, colored) for be in plan.be]
    cells += [RealCell("", be, Room.WHOLE, False) for be in plan.be]
    for ls in plan.ls:
        cells += [RealCell(ls, "", Room.WHOLE, False), RealCell(ls, "", Room.SHARE, False)]
        cells += [RealCell(ls, "", Room.SHARE, True), RealCell(ls, "", Room.WHOLE, True)]
        for be in plan.be:
            cells += [RealCell(ls, be, Room.SHARE, False), RealCell(ls, be, Room.SHARE, True)]
    return tuple(cells)


def measure_real(
    gpu: Gpu,
    channel_map: ChannelMap,
    plan: RealPlan,
    cells: Sequence[RealCell],
    done: Callable[[RealCell, RealSample], None],
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Run `cells` in order; `done(cell, sample)` after each.

    A model is loaded when it is first needed, once in plain and once in colored memory, and stays. One that can't be is an
    `error` in its cells; the others go on.
    """
    tenants = {tenant.name: tenant for tenant in _tenants(plan)}
    layout = PartitionPolicy(plan.ls_share).setup(list(tenants.values()), gpu.info)
    with ExitStack() as owned:
        models = _Models(gpu, channel_map, tenants, plan.overlap, owned, progress)
        for cell in cells:
            sides = [models.get(name, cell.colored) for name in (cell.ls, cell.be) if name]
            if missing := next((side.error for side in sides if side.model is None), ""):
                done(cell, RealSample(error=missing))
                continue
            record = run(
                gpu,
                Roster(gpu, sides, ExitStack()),
                _policy(cell, plan, layout),
                seed=plan.seed,
                duration_ns=round(plan.duration_s * 1e9),
                warmup_ns=round(plan.warmup_s * 1e9),
            )
            if record.fault:
                raise MissileError(record.fault)
            done(cell, _sample(cell, record))
            if record.interrupted:
                raise KeyboardInterrupt


class _Models:
    """Loaded models by name and memory; `owned` frees them."""

    def __init__(
        self,
        gpu: Gpu,
        channel_map: ChannelMap,
        tenants: Mapping[str, Tenant],
        overlap: OverlapChoice,
        owned: ExitStack,
        progress: Callable[[str], None],
    ) -> None:
        self._gpu, self._map, self._tenants, self._owned, self._progress = gpu, channel_map, tenants, owned, progress
        self._overlap = overlap
        self._halves = halves_of(channel_map)
        self._loaded: dict[tuple[str, bool], LoadedTenant] = {}

    def get(self, name: str, colored: bool) -> LoadedTenant:
        if (name, colored) not in self._loaded:
            self._progress(f"loading {name}{', colored' if colored else ''}")
            self._loaded[name, colored] = self._load(self._tenants[name], colored)
        return self._loaded[name, colored]

    def _load(self, tenant: Tenant, colored: bool) -> LoadedTenant:
        colors = self._halves[0 if tenant.latency_sensitive else 1]
        coloring = Coloring(self._map, {tenant.name: colors}) if colored else None
        try:
            roster = self._owned.enter_context(
                load_tenants(self._gpu, [tenant], coloring=coloring, overlap=self._overlap.objective)
            )
        except GpuError as error:
            if error.usable == "nothing":
                raise
            return LoadedTenant(tenant, None, error=str(error))
        except MissileError as error:
            return LoadedTenant(tenant, None, error=str(error))
        return roster.tenants[0]


def _tenants(plan: RealPlan) -> list[Tenant]:
    sides = ((plan.ls, TenantClass.LS, 1), (plan.be, TenantClass.BE, 2))
    return [
        Tenant.model_validate({"name": model, "class": side, "model": model, "arrivals": ClosedLoop(depth=depth)})
        for models, side, depth in sides
        for model in models
    ]


def _policy(cell: RealCell, plan: RealPlan, layout: Layout) -> Policy:
    if cell.ls and cell.be:
        return PartitionPolicy(plan.ls_share)
    return _Alone(layout.partitions if cell.room is Room.SHARE else (), 0 if cell.ls else 1)


class _Alone:
    """One tenant by itself on one side of a split; on all SMs without one."""

    name = "alone"

    def __init__(self, partitions: tuple[int, ...], side: int) -> None:
        self._layout = Layout((Lane("alone", partition=side if partitions else None),), partitions=partitions)

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        return self._layout

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        return [Start(0, 0)] * min(snapshot.queued[0], snapshot.depth[0] - snapshot.running[0])


def _sample(cell: RealCell, record: RunRecord) -> RealSample:
    by_name = {tenant.name: tenant for tenant in record.tenants}
    took = {name: _service(by_name[name]) for name in (cell.ls, cell.be) if name}
    seconds = (record.duration_ns - record.warmup_ns) / 1e9
    be = took.get(cell.be, np.empty(0, np.int64))
    errors = [tenant.error for tenant in record.tenants if tenant.error]
    return RealSample(
        tuple(took[cell.ls].tolist()) if cell.ls else (),
        tuple(be.tolist()),
        round(len(be) / seconds, 3),
        errors[0] if errors else "",
    )


def _service(tenant: TenantRecord) -> npt.NDArray[np.int64]:
    return np.asarray(tenant.end - tenant.start, np.int64)
