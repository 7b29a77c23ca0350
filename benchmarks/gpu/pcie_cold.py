"""Cold starts of compiled models whose weights wait on the host, as `missile bench` and `missile serve` make them. A part of
pcie.py."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pcie_mix import package_of

from missile.compiler.library import find_package
from missile.errors import MissileError
from missile.gpu.interface import Gpu
from missile.pcie.engine import CopyEngine, EngineOptions
from missile.pcie.streamed import StreamedCopies
from missile.pcie.ticket import CopyState, CopyTicket
from missile.pcie.weights import MIB, Share
from missile.runtime.hosted import weight_bytes
from missile.runtime.loading import load_tenants
from missile.runtime.policies.interface import Lane, Layout
from missile.runtime.stage import Stage
from missile.runtime.tenant import Tenant

MODELS = (
    ("decoder_1b", 8),
    ("bert_large", 32),
)  # one that takes longer to copy than to run, and the other way round
_LOOK_NS = 20_000


class Start(NamedTuple):
    """One run of a model, ns from when it was asked for: until its weights had arrived (-1: they were there) and until its
    end was seen."""

    weights_ns: int
    whole_ns: int


def cold_models(
    gpu: Gpu, options: EngineOptions, rate: float, repeats: int, packages: Path | None, models: Any = MODELS
) -> dict[str, Any]:
    """Cold and warm starts of models that displace each other, alone and beside two bulk tenants of equal weight.

    rate: of the link to the device, bytes/s. Requests' inputs and outputs are left out. weights: when the last of them had
    arrived; whole: when the end of the model was seen; against bytes over the link's rate (or the tenant's share of it), and
    whole also against the longer of that and the warm start: what overlapping can reach. Each is (median, worst).
    """
    out: dict[str, Any] = {}
    with Models(gpu, options, models, packages) as rig:
        for case, floods, share in (("alone", 0, 1.0), ("beside two bulk tenants", 2, 1 / 3)):
            flood = Flood(gpu, rig.engine, floods)
            starts: dict[str, list[tuple[Start, Start]]] = {name: [] for name in rig.names}
            for _ in range(repeats):
                for name in rig.names:
                    cold = rig.start(name, cold=True)
                    starts[name].append((cold, rig.start(name, cold=False)))
            flood.on = False
            rig.engine.run_until_idle()
            flood.close()
            for name, pairs in starts.items():
                out.setdefault(name, {})[case] = _summary(pairs, rig.nbytes(name), rate * share)
                print(f"  {name}, {case}: {out[name][case]}", flush=True)
    return out


class Models:
    """Models on the runtime's stage, in device memory for the largest of them, so that each displaces the others."""

    def __init__(self, gpu: Gpu, options: EngineOptions, models: Any, packages: Path | None) -> None:
        """models: names and batches. Every model has run when this returns: the first run of a kernel loads it."""
        self._gpu = gpu
        places = {name: (package_of(name, packages), batch) for name, batch in models}
        budget = max(weight_bytes(find_package(place, batch, gpu.info)[0]) for place, batch in places.values())
        with ExitStack() as undo:
            self.engine = undo.enter_context(CopyEngine(gpu, options))
            tenants = [_tenant(name, place, batch) for name, (place, batch) in places.items()]
            roster = undo.enter_context(load_tenants(gpu, tenants, swap_bytes=budget))
            if errors := [one.error for one in roster.tenants if one.error]:
                raise MissileError(errors[0])
            self._loaded = {one.tenant.name: replace(one, inputs=(), outputs=()) for one in roster.ready}
            self.names = tuple(self._loaded)
            copies = StreamedCopies(gpu, self.engine)
            for name in self.names:
                copies.admit(name, Share())
            layout = Layout(tuple(Lane(name) for name in self.names))
            self._stage = Stage(gpu, list(self._loaded.values()), layout, copies)
            undo.callback(self._stage.close)
            self._stage.rehearse()
            undo.callback(gpu.synchronize)
            undo.callback(self._stage.clear)
            self._resources = undo.pop_all()
        self._requests = 0

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def nbytes(self, name: str) -> int:
        """What a cold start copies."""
        weights = self._loaded[name].weights
        assert weights is not None
        return sum(part.nbytes for part in weights.parts)

    def start(self, name: str, *, cold: bool) -> Start:
        """Run the model once. cold: its weights are not there."""
        stage, tenant = self._stage, self.names.index(name)
        before = len(stage.cold_starts(tenant))
        begun = self._gpu.now_ns()
        slot, _ = stage.enqueue(tenant, tenant, self._requests)
        self._requests += 1
        while not slot.done.done():
            stage.wait([slot.done], self._gpu.now_ns() + _LOOK_NS)
        ended = self._gpu.now_ns()
        while cold and len(stage.cold_starts(tenant)) == before:  # they have come, and it has not been seen yet
            stage.wait([], self._gpu.now_ns() + _LOOK_NS)
        found = stage.cold_starts(tenant)[before:]
        return Start(found[0].arrived_ns - begun if found else -1, ended - begun)


def _tenant(name: str, model: str, batch: int) -> Tenant:
    found = {"name": name, "class": "BE", "model": model, "batch": batch, "residency": "host"}
    return Tenant.model_validate(found | {"arrivals": {"kind": "closed"}})


def _summary(pairs: list[tuple[Start, Start]], nbytes: int, rate: float) -> dict[str, Any]:
    ideal = nbytes / rate * 1e9
    warm = statistics.median(start.whole_ns for _, start in pairs)
    whole = [start.whole_ns for start, _ in pairs]
    weights = [start.weights_ns for start, _ in pairs]

    def against(times: list[int], base: float) -> tuple[float, float]:
        return statistics.median(times) / base, max(times) / base

    return {
        "bytes": nbytes,
        "starts": len(pairs),
        "ideal_ms": ideal / 1e6,
        "warm_ms": warm / 1e6,
        "weights": against(weights, ideal),
        "whole": against(whole, ideal),
        "whole_against_longer": against(whole, max(ideal, warm)),
    }


class Flood:
    """Tenants that always have two copies of 64 MiB waiting, until `on` is False."""

    def __init__(self, gpu: Gpu, engine: CopyEngine, tenants: int) -> None:
        self.on = True
        self._engine = engine
        self._host, self._device = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
        for index in range(tenants):
            engine.admit(f"bulk {index}")
            for _ in range(2):
                self._copy(f"bulk {index}")

    def _copy(self, tenant: str) -> None:
        self._engine.to_device(tenant, self._device, self._host).add_done_callback(self._again)

    def _again(self, ticket: CopyTicket) -> None:
        if self.on and ticket.state is CopyState.DONE:
            self._copy(ticket.tenant)

    def close(self) -> None:
        self._host.free()
        self._device.free()
