"""Plans for loaded tenants: profiles and rates as they are, objectives from runs alone, candidates tried for real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from missile.compiler.bind import BoundModel
from missile.errors import MisuseError
from missile.gpu.interface import Gpu, GpuInfo, Launch
from missile.runtime.copy_weights import copy_weights
from missile.runtime.copying import link_options, scheduled_directions
from missile.runtime.loading import LoadedTenant, Roster
from missile.runtime.metrics import attainment, quantile
from missile.runtime.planner import TAIL, Measured, Plan, make_plan
from missile.runtime.prediction import Demand, Machine
from missile.runtime.records import RunRecord, TenantRecord
from missile.runtime.run import run, solo

__all__ = ["machine_of", "plan_tenants"]

_TRIAL_NS = 500_000_000
_WARM_SHARE = 0.1


def plan_tenants(
    gpu: Gpu,
    roster: Roster,
    *,
    seed: int,
    solos: Mapping[str, RunRecord] | None = None,
    be_min: float = 0.0,
    trial_ns: int = _TRIAL_NS,
    tail: float | None = TAIL,
    colored: Callable[[], Roster] | None = None,
    plain: Roster | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """A plan for `roster`'s tenants, its candidates tried on `gpu` for `trial_ns` each.

    solos: each tenant's run alone, by name; those that are missing are made now, `trial_ns` long. An LS tenant's objective
    is its own (`slo_ms`), or `slo_factor` times its p99 alone; without both it has none. be_min: least BE rate, as a share
    of that alone. tail: as for `make_plan`; each LS tenant is run alone on the trials' arrivals for it. plain: the same
    tenants with code that can't be stopped, for candidates that stop nothing. colored: gives the same tenants with LS and BE
    in different colors of memory (the caller's to close); they are then considered too, at what they cost each tenant alone.
    progress: told what is run next.
    Raises what `run` and `make_plan` raise.
    """
    say = progress or (lambda _text: None)
    warm = int(trial_ns * _WARM_SHARE)
    alone: dict[str, TenantRecord] = {}
    rates: dict[str, float] = {}
    tails: dict[str, float] = {}
    for loaded in roster.ready:
        name = loaded.tenant.name
        record = None if solos is None else solos.get(name)
        if record is None:
            say(f"{name} alone")
            record = _uninterrupted(solo(gpu, roster, name, seed=seed, duration_ns=trial_ns, warmup_ns=warm))
        alone[name] = next(found for found in record.tenants if found.name == name)
        rates[name] = len(alone[name].done) / max(record.duration_ns - record.warmup_ns, 1) * 1e9
        if loaded.tenant.latency_sensitive:
            if (record.seed, record.duration_ns, record.warmup_ns) != (seed, trial_ns, warm):
                say(f"{name} alone, on the arrivals of the trials")
                record = _uninterrupted(solo(gpu, roster, name, seed=seed, duration_ns=trial_ns, warmup_ns=warm))
            found = next(found for found in record.tenants if found.name == name)
            if len(found.done):
                tails[name] = _p99(found)
    demands = [
        replace(_demand(loaded, alone[name], rates[name]), tail_ns=tails.get(name))
        for loaded in roster.ready
        for name in (loaded.tenant.name,)
    ]
    weights = _copy_weights(gpu, roster, demands)
    separate = None if colored is None else colored()
    if separate is not None:
        for place, demand in enumerate(demands):
            say(f"{demand.name} alone, colored")
            record = _uninterrupted(solo(gpu, separate, demand.name, seed=seed, duration_ns=trial_ns, warmup_ns=warm))
            (found,) = record.tenants
            if len(found.done):
                demands[place] = replace(demand, colored_ns=float(np.median(found.service)))

    def trial(policy: str) -> Measured:
        say(policy)
        tenants = roster
        if separate is not None and "colors=on" in policy:
            tenants = separate
        elif plain is not None and "preempt=off" in policy:
            tenants = plain
        tenants = _weighed(gpu, tenants, weights)
        record = _uninterrupted(run(gpu, tenants, policy, seed=seed, duration_ns=trial_ns, warmup_ns=warm))
        return _measured(record, demands, rates)

    # Scheduling copies costs the loop some of its time: worth it where somebody fills the link. Code that checks whether to
    # stop is slower than code that does not, and BE that is lent SMs is stopped seldom.
    variants = ["copies=off"] if scheduled_directions(roster.ready) else []
    variants += ["preempt=off"] if any(demand.preemptible for demand in demands) else []
    plan = make_plan(demands, machine_of(gpu.info), be_min=be_min, trial=trial, tail=tail, variants=variants)
    return replace(plan, copy_weights=weights)


def _uninterrupted(record: RunRecord) -> RunRecord:
    """KeyboardInterrupt where Ctrl-C ended the run: what is left of it is no measurement, and nobody waits for a plan."""
    if record.interrupted:
        raise KeyboardInterrupt
    return record


def _copy_weights(gpu: Gpu, roster: Roster, demands: list[Demand]) -> dict[str, float]:
    """Empty where no direction's copies would be scheduled, or where somebody's weight on the link was given."""
    ready = roster.ready
    if any(loaded.tenant.copy_weight is not None for loaded in ready):
        return {}
    if not scheduled_directions(ready):
        return {}
    own = {loaded.tenant.name: loaded.tenant.weight for loaded in ready}
    return copy_weights(demands, own, link_options(gpu).h2d_rate)


def _weighed(gpu: Gpu, roster: Roster, weights: Mapping[str, float]) -> Roster:
    """A view of `roster` whose tenants have these weights on the link."""
    if not weights:
        return roster
    tenants = [
        replace(loaded, tenant=loaded.tenant.model_copy(update={"copy_weight": weights.get(loaded.tenant.name)}))
        for loaded in roster.tenants
    ]
    return Roster(gpu, tenants, ExitStack())


def machine_of(info: GpuInfo) -> Machine:
    """What a planner has to know of a GPU."""
    rate = float(info.extra.get("memory_bytes_per_s", 0.0))
    return Machine(info.sms, max(info.sm_granularity, 1), max(info.sm_minimum, 1), rate)


def _demand(loaded: LoadedTenant, alone: TenantRecord, rate: float) -> Demand:
    tenant, model = loaded.tenant, loaded.model
    if not len(alone.done):
        raise MisuseError(f"Tenant {tenant.name!r} finished no request alone; there is nothing to plan with.")
    operations = model.operations if isinstance(model, BoundModel) else ()
    launches = [operation for operation in operations if isinstance(operation, Launch)]
    works = tuple(launch.work for launch in launches if launch.work is not None)
    slo = None
    if tenant.slo_ms is not None:
        slo = tenant.slo_ms * 1e6
    elif tenant.slo_factor is not None:
        slo = tenant.slo_factor * _p99(alone)
    return Demand(
        name=tenant.name,
        latency_sensitive=tenant.latency_sensitive,
        service_ns=float(np.median(alone.service)),
        rate_per_s=rate if tenant.latency_sensitive else 0.0,
        slo_ns=slo if tenant.latency_sensitive else None,
        works=works if len(works) == len(operations) else (),
        preemptible=any(launch.preempt is not None for launch in launches),
        alone_ns=_p99(alone) if tenant.latency_sensitive else None,
        copy_bytes=max((buffer.nbytes for side in (loaded.inputs, loaded.outputs) for buffer in side), default=0),
    )


def _measured(record: RunRecord, demands: list[Demand], rates: Mapping[str, float]) -> Measured:
    span_s = max(record.duration_ns - record.warmup_ns, 1) / 1e9
    by_name = {found.name: found for found in record.tenants}
    met: dict[str, float] = {}
    p99: dict[str, float] = {}
    tails: dict[str, float] = {}
    shares = 0.0  # of BE tenants together, as predictions have it: two with half of their rate each have all of the GPU
    for demand in demands:
        found = by_name[demand.name]
        if not demand.latency_sensitive:
            shares += len(found.done) / span_s / max(rates[demand.name], 1e-9)
            continue
        if len(found.done):
            p99[demand.name] = _p99(found)
            if demand.tail_ns:
                tails[demand.name] = p99[demand.name] / demand.tail_ns
        if demand.slo_ns is not None:
            met[demand.name] = attainment(found, demand.slo_ns) or 0.0
    return Measured(met, p99, shares, tails)


def _p99(record: TenantRecord) -> float:
    """ns; the longest of fewer than a hundred."""
    found = quantile(record.latency, 0.99)
    return float(np.max(record.latency) if found is None else found.value)
