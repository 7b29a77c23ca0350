"""`temporal`: one request at a time has the whole GPU, LS first. The safe sharing of today; BE kernels are never cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from missile.gpu.interface import GpuInfo
from missile.runtime.policies.interface import Action, Lane, Layout, Snapshot, Start
from missile.runtime.tenant import Tenant

__all__ = ["TemporalPolicy"]


class TemporalPolicy:
    """Whenever the GPU is free: the oldest queued LS request; if there is none, the BE tenant that has had the least
    time for its weight. A running request is never interrupted."""

    name: ClassVar[str] = "temporal"
    summary: ClassVar[str] = (
        "one request at a time has the whole GPU, LS first. The safe sharing of today; BE kernels are never cut."
    )

    def __init__(self) -> None:
        self._ls: tuple[int, ...] = ()
        self._be: tuple[int, ...] = ()
        self._weights: tuple[float, ...] = ()
        self._served: list[float] = []  # ns of the GPU that each tenant has had
        self._last = 0
        self._since: int | None = None  # when the running request was started

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        numbers = range(len(tenants))
        self._ls = tuple(i for i in numbers if tenants[i].latency_sensitive)
        self._be = tuple(i for i in numbers if not tenants[i].latency_sensitive)
        self._weights = tuple(tenant.weight for tenant in tenants)
        self._served = [0.0] * len(tenants)
        return Layout((Lane("the whole GPU, one request at a time"),))

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        if any(snapshot.running):
            return ()
        now = snapshot.now_ns
        if self._since is not None:
            self._served[self._last] += now - self._since
            self._since = None
        queued = snapshot.queued
        waiting = [i for i in self._ls if queued[i]]
        if waiting:
            chosen = min(waiting, key=snapshot.oldest_ns.__getitem__)
        else:
            waiting = [i for i in self._be if queued[i]]
            if not waiting:
                return ()
            chosen = min(waiting, key=lambda i: self._served[i] / self._weights[i])
        self._last, self._since = chosen, now
        return (Start(chosen, 0),)
