"""One run from tenants to record: the policy's lanes, the engine, and what remains when something goes wrong in between."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType

import numpy as np

from missile.errors import GpuError, MisuseError
from missile.gpu.interface import Gpu
from missile.runtime.copying import ScheduledCopies, link_options
from missile.runtime.engine import Engine, Span
from missile.runtime.loading import LoadedTenant, Roster, load_tenants
from missile.runtime.policies import Policy, create_policy
from missile.runtime.policies.interface import BriefedPolicy, ReplanningPolicy
from missile.runtime.policies.streams import StreamsPolicy
from missile.runtime.records import RunRecord, TenantRecord
from missile.runtime.requests import RequestLog
from missile.runtime.stage import Stage
from missile.runtime.tenant import Tenant
from missile.workloads.arrivals import arrival_times

__all__ = ["SOLO", "run", "solo"]

SOLO = "solo"
"""`RunRecord.policy` of a tenant's run alone on the whole GPU."""

_LONGEST_GRACE_NS = 2_000_000_000
_REPORTS = 20  # progress reports in a run, at most
_FEWEST_NS_BETWEEN_REPORTS = 1_000_000_000  # on hardware, where reporting takes time from the request path


def run(
    gpu: Gpu,
    tenants: Roster | Sequence[Tenant],
    policy: Policy | str,
    *,
    seed: int,
    duration_ns: int,
    warmup_ns: int = 0,
    progress: Callable[[float], None] | None = None,
    gate: Callable[[], None] | None = None,
) -> RunRecord:
    """Run `tenants` together under `policy` for `duration_ns`, of which the first `warmup_ns` are not measured.

    tenants: a roster, or specifications that are loaded and freed again here. policy: a new object, or text for
    `create_policy`. progress: called now and then with the share done, in [0, 1]; on hardware it has to be quick.
    gate: called when all is ready, just before the run's clock starts (where several processes start together).
    Requests that arrived in time may finish for another quarter of the measured span (2 s at most) while BE goes on.

    A record comes back whatever happens once the run has begun: on Ctrl-C with `interrupted`, after a kernel fault with
    `fault` and what had finished before. Raises MisuseError, UnsupportedError or OutOfMemoryError before that.
    """
    if isinstance(tenants, Roster):
        return _run(gpu, tenants, policy, seed, duration_ns, warmup_ns, progress, gate=gate)
    with load_tenants(gpu, tenants) as roster:
        return _run(gpu, roster, policy, seed, duration_ns, warmup_ns, progress, gate=gate)


def solo(
    gpu: Gpu,
    roster: Roster,
    tenant: str,
    *,
    seed: int,
    duration_ns: int,
    warmup_ns: int = 0,
    progress: Callable[[float], None] | None = None,
) -> RunRecord:
    """Run one of the roster's tenants alone on the whole GPU, on the arrivals that it has in every shared run of `seed`."""
    return _run(gpu, roster.only(tenant), StreamsPolicy(), seed, duration_ns, warmup_ns, progress, name=SOLO)


def _run(
    gpu: Gpu,
    roster: Roster,
    policy: Policy | str,
    seed: int,
    duration_ns: int,
    warmup_ns: int,
    progress: Callable[[float], None] | None,
    *,
    name: str = "",
    gate: Callable[[], None] | None = None,
) -> RunRecord:
    if isinstance(policy, str):
        name, policy = name or policy, create_policy(policy)
    if not 0 <= warmup_ns < duration_ns:
        raise MisuseError(
            f"A run's warm-up must be shorter than the run: {warmup_ns / 1e9:g} s of {duration_ns / 1e9:g} s."
        )
    grace = min((duration_ns - warmup_ns) // 4, _LONGEST_GRACE_NS)
    span = Span(warmup_ns, duration_ns, duration_ns + grace)
    ready = roster.ready
    if not ready:
        return _nothing_ran(gpu, roster, name or policy.name, seed, span)
    layout = policy.setup([loaded.tenant for loaded in ready], gpu.info)
    copies = ScheduledCopies.where_needed(gpu, ready) if getattr(policy, "copies", False) else None
    rate = link_options(gpu).h2d_rate if any(loaded.weights is not None for loaded in ready) else 1.0
    stage = Stage(gpu, ready, layout, copies)
    fault: GpuError | None = None
    lost = False
    try:
        engine = _engine(gpu, stage, policy, ready, len(layout.lanes), seed, span)
        with _quiet_interpreter(), _stop_on_interrupt(engine):
            if gate is not None:
                gate()
            fault = _serve(engine, progress, gpu.info.simulated, span)
            lost = fault is not None and fault.usable == "nothing"
    except GpuError as error:
        lost = error.usable == "nothing"
        raise
    finally:
        _strike(gpu, stage, lost=lost)
    whole = not engine.stopping and fault is None
    measured = span if whole else span._replace(end=min(max(engine.now_ns, span.begin), span.end))
    return RunRecord(
        policy=name or policy.name,
        device=gpu.info.device,
        simulated=gpu.info.simulated,
        duration_ns=measured.end,
        warmup_ns=span.begin,
        seed=seed,
        tenants=_with_cold_starts(
            _tenant_records(roster, engine, measured, fault), ready, stage, engine, measured, rate
        ),
        lanes=tuple(lane.name for lane in layout.lanes),
        jitter_ns=engine.jitter,
        interrupted=engine.stopping,
        fault="" if fault is None else str(fault),
        notes=(*_notes(roster, measured, span, fault), *_changes(policy, name)),
    )


def _nothing_ran(gpu: Gpu, roster: Roster, policy: str, seed: int, span: Span) -> RunRecord:
    """The record of tenants of which none could be loaded."""
    info = gpu.info
    tenants = tuple(RequestLog(t.tenant, 0).record(span.begin, span.end, error=t.error) for t in roster.tenants)
    notes = _notes(roster, span, span, None)
    return RunRecord(policy, info.device, info.simulated, span.end, span.begin, seed, tenants, notes=notes)


def _engine(
    gpu: Gpu, stage: Stage, policy: Policy, ready: Sequence[LoadedTenant], lanes: int, seed: int, span: Span
) -> Engine:
    arrivals = [
        arrival_times(loaded.tenant.arrivals, seed=seed, tenant=loaded.tenant.name, horizon_ns=span.end)
        for loaded in ready
    ]
    logs = []
    briefs = stage.rehearse()
    if isinstance(policy, BriefedPolicy):
        policy.brief(briefs)
    for loaded, times, found in zip(ready, arrivals, briefs, strict=True):
        # A closed loop's number of requests is not known before: room for it running alone all the time.
        room = len(times) if loaded.tenant.closed_loop is None else span.limit // int(min(found.service_ns)) + 64
        logs.append(RequestLog(loaded.tenant, room))
    return Engine(gpu, stage, policy, logs, arrivals, lanes=lanes, depth=[loaded.depth for loaded in ready], span=span)


def _serve(engine: Engine, progress: Callable[[float], None] | None, simulated: bool, span: Span) -> GpuError | None:
    """Run the engine. Returns the error that ended it early, when that is the GPU's."""
    pause = max(span.end // _REPORTS, 0 if simulated else _FEWEST_NS_BETWEEN_REPORTS)
    try:
        if progress is None:
            engine.run()
        else:
            report = progress
            engine.run(lambda now: report(min(now / span.end, 1.0)), pause)
            report(1.0)
    except GpuError as error:
        return error
    except KeyboardInterrupt:  # the second one: the first was taken by `_stop_on_interrupt`
        engine.stopping = True
    return None


def _strike(gpu: Gpu, stage: Stage, *, lost: bool) -> None:
    """Take the stage down once nothing runs on it; a lost context has nothing that is worth waiting for, or that ends."""
    if not lost:
        with suppress(GpuError):
            stage.clear()
            gpu.synchronize()
    stage.close()


def _tenant_records(roster: Roster, engine: Engine, span: Span, fault: GpuError | None) -> tuple[TenantRecord, ...]:
    logs = {log.tenant.name: log for log in engine.logs}
    suspects = _suspects(engine, fault)
    records = []
    for loaded in roster.tenants:
        name = loaded.tenant.name
        log = logs.get(name) or RequestLog(loaded.tenant, 0)
        error = loaded.error
        if fault is not None and name in suspects:
            error = str(fault) if len(suspects) == 1 else f"It or {_others(suspects, name)} ended the run: {fault}"
        records.append(log.record(span.begin, span.end, error=error))
    return tuple(records)


def _with_cold_starts(
    records: tuple[TenantRecord, ...],
    ready: Sequence[LoadedTenant],
    stage: Stage,
    engine: Engine,
    span: Span,
    rate: float,
) -> tuple[TenantRecord, ...]:
    """rate: of the link to the device, bytes/s."""
    found = {}
    for tenant, loaded in enumerate(ready):
        if loaded.weights is None:
            continue
        times = np.array(stage.cold_starts(tenant), np.int64).reshape(-1, 2) - engine.origin_ns
        inside = (times[:, 0] >= span.begin) & (times[:, 0] < span.end)
        nbytes = sum(part.nbytes for part in loaded.weights.parts)
        found[loaded.tenant.name] = (times[inside], nbytes, round(nbytes / rate * 1e9))
    return tuple(
        replace(record, cold=cold[0], cold_bytes=cold[1], cold_ideal_ns=cold[2])
        if (cold := found.get(record.name))
        else record
        for record in records
    )


def _suspects(engine: Engine, fault: GpuError | None) -> tuple[str, ...]:
    """Tenants of which one is to blame: the one that the GPU names, else all that had work on it."""
    running = engine.in_flight
    return (fault.tenant,) if fault is not None and fault.tenant in running else running


def _others(suspects: Sequence[str], name: str) -> str:
    return " or ".join(repr(other) for other in suspects if other != name)


def _notes(roster: Roster, measured: Span, planned: Span, fault: GpuError | None) -> tuple[str, ...]:
    notes = [f"Tenant {entry.tenant.name} did not run: {entry.error}" for entry in roster.tenants if entry.error]
    if fault is not None:
        notes.append(f"The run ended after {measured.end / 1e9:.3f} s: {fault} What had finished before is valid.")
    elif measured.end < planned.end:
        notes.append(f"The run was interrupted after {measured.end / 1e9:.3f} s of {planned.end / 1e9:.3f} s.")
    return tuple(notes)


def _changes(policy: Policy, name: str) -> Iterator[str]:
    """When a policy that plans anew while it runs did so."""
    if isinstance(policy, ReplanningPolicy):
        for at, what in policy.changes:
            yield f"{name or policy.name} after {at / 1e9:.3f} s: {what}."


@contextmanager
def _quiet_interpreter() -> Iterator[None]:
    """No garbage collection while a run lasts: a pass over the heap takes longer than a request may wait."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def _stop_on_interrupt(engine: Engine) -> Iterator[None]:
    """Make the first Ctrl-C end the run in order; a second one interrupts as usual. Only on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        engine.stopping = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
