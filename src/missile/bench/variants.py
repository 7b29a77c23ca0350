"""The tenants' models as single policies need them: preemptible, or in separate colors of memory; made when first needed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from missile.coloring.halves import find_halves
from missile.compiler.bind import BoundModel
from missile.compiler.objective import Objective
from missile.errors import UnsupportedError
from missile.gpu.interface import Gpu
from missile.probe import map_for
from missile.runtime.coloring import Coloring
from missile.runtime.loading import LoadedTenant, Roster, load_tenants
from missile.runtime.policies import create_policy
from missile.runtime.policies.missile import MissilePolicy
from missile.runtime.preempting import Preempting, make_preemptible
from missile.runtime.tenant import Tenant

__all__ = ["ModelVariants"]


class ModelVariants:
    """Models beside those of `roster`, which every policy but `missile` runs on. Owns them until `close`.

    `missile` gets BE models that can be preempted and memory in separate colors, as far as its options ask for them.
    """

    def __init__(self, gpu: Gpu, roster: Roster, overlap: Objective | None = Objective.ALONE) -> None:
        self._gpu = gpu
        self._roster = roster
        self._overlap = overlap
        self._made: dict[tuple[bool, bool], Preempting] = {}

    def of(self, policy: str) -> Preempting | None:
        """What `policy` runs on in place of the plain models, and whose model can't be preempted. None: nothing.

        UnsupportedError where a model can't be colored, or the GPU has one color only; and what loading raises.
        """
        made = create_policy(policy)
        if not isinstance(made, MissilePolicy):
            return None
        kind = (made.colors, made.preempt)
        if kind == (False, False):
            return None
        if kind not in self._made:
            self._made[kind] = self._make(*kind)
        return self._made[kind]

    def _make(self, colored: bool, preemptible: bool) -> Preempting:
        hosted = [loaded for loaded in self._roster.ready if loaded.weights is not None]
        if colored and hosted:
            raise UnsupportedError(
                f"tenant {hosted[0].tenant.name!r} keeps its weights on the host, which colored memory can't do."
            )
        tenants = [
            loaded.tenant
            for loaded in self._roster.ready
            if loaded.weights is None and (colored or not loaded.tenant.latency_sensitive)
        ]
        views = [_view(loaded) for loaded in hosted if not loaded.tenant.latency_sensitive]
        roster = Roster(self._gpu, views, ExitStack())
        if tenants:
            made = load_tenants(
                self._gpu, tenants, coloring=self._coloring(tenants) if colored else None, overlap=self._overlap
            )
            resources = ExitStack()
            resources.callback(made.close)
            roster = Roster(self._gpu, (*made.tenants, *views), resources)
        if not preemptible:
            return Preempting(roster, {})
        try:
            return make_preemptible(roster)
        except BaseException:
            roster.close()
            raise

    def _coloring(self, tenants: list[Tenant]) -> Coloring:
        """LS tenants on one half of the colors, BE tenants on the other."""
        channel_map = map_for(self._gpu)
        halves = find_halves(channel_map)
        if halves is None:
            raise UnsupportedError(f"{self._gpu.info.name} has one color of memory, so nothing can be separated.")
        ls, be = halves.sets
        return Coloring(channel_map, {tenant.name: ls if tenant.latency_sensitive else be for tenant in tenants})

    def close(self) -> None:
        """Free all of them. Idempotent. No run may be using them."""
        with ExitStack() as undo:
            for made in self._made.values():
                undo.callback(made.roster.close)
            self._made = {}


def _view(loaded: LoadedTenant) -> LoadedTenant:
    """`loaded` with a model that owns nothing: weights on the host are there once, and other code works on the same."""
    assert isinstance(loaded.model, BoundModel)
    return replace(loaded, model=replace(loaded.model, _resources=ExitStack()))
