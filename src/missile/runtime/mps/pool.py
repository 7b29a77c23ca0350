"""`mps`: every tenant in a process of its own under NVIDIA's MPS, with a share of the SMs for each.

A run here gives the same record as `run.run`: the workers' loops are the same, start together on the host's clock, and
draw the same arrivals from the same seeds. Workers stay for later runs of the same settings, idle and without effect.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import TracebackType

import numpy as np

from missile.compiler.objective import Objective
from missile.errors import MissileError, MisuseError, OutOfMemoryError, UnsupportedError
from missile.runtime.mps.daemon import MpsDaemon
from missile.runtime.mps.process import Worker, hear
from missile.runtime.mps.protocol import Armed, Done, Failed, Go, Load, Ready, Serve
from missile.runtime.policies import parse_options
from missile.runtime.records import RunRecord
from missile.runtime.requests import RequestLog
from missile.runtime.tenant import Tenant

__all__ = ["MpsPool", "MpsSettings", "is_mps"]

_NAME = "mps"
_LOAD_S = 300.0  # an Inductor compile may be part of it
_REHEARSE_S = 120.0
_HEAD_START_NS = 20_000_000  # from the last worker's readiness to the common start
_MOST_WORKERS = 24
# Of the driver's work queues for each process, which has one stream in use. An MPS server has a fixed number for all of
# them: with 32 each, as other policies ask for, the fifth process was refused on an H200.
_QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "4", "CUDA_DEVICE_MAX_COPY_CONNECTIONS": "4"}
_SETTLE_S = 15.0  # beyond a run's planned end: its grace, what runs on the GPU, the record's way back
_ERRORS = {kind.__name__: kind for kind in (MisuseError, UnsupportedError, OutOfMemoryError)}


def is_mps(policy: str) -> bool:
    """Whether `policy` (a name, or a name with options) is this one."""
    return policy.partition(":")[0] == _NAME


@dataclass(frozen=True, slots=True)
class MpsSettings:
    """ls_share, be_share: the share of the SMs that each LS (BE) process may use, in (0, 1]; they may overlap.

    priority: 1 gives BE processes MPS's lower client priority, 0 treats all alike.
    """

    ls_share: float = 1.0
    be_share: float = 1.0
    priority: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ls_share", "be_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise MisuseError(f"Policy 'mps': {name} must be above 0 and at most 1, not {getattr(self, name):g}.")
        if self.priority not in (0, 1):
            raise MisuseError(f"Policy 'mps': priority must be 0 or 1, not {self.priority:g}.")

    @classmethod
    def parse(cls, text: str) -> MpsSettings:
        """From "mps" or "mps:ls_share=0.5,be_share=0.5,priority=1". MisuseError names the known options."""
        return cls(**parse_options(text, cls.__slots__))

    def environment(self, tenant: Tenant) -> dict[str, str]:
        """What the process of `tenant` is started with."""
        share = self.ls_share if tenant.latency_sensitive else self.be_share
        low = self.priority and not tenant.latency_sensitive
        return {
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{100 * share:g}",
            "CUDA_MPS_CLIENT_PRIORITY": "1" if low else "0",
        }


class MpsPool:
    """The daemon and its workers on `device`, from construction to `close`. One thread uses it at a time.

    cache: where packages lie (None: the default). UnsupportedError on a simulated GPU, whose state one process holds, and
    where MPS is missing. daemon: False starts workers without MPS, also simulated ones that share nothing; for tests.
    """

    def __init__(
        self,
        device: str,
        *,
        seed: int = 0,
        cache: Path | None = None,
        daemon: bool = True,
        overlap: Objective | None = Objective.ALONE,
    ) -> None:
        if daemon and not device.startswith("cuda"):
            raise UnsupportedError(
                "Policy 'mps' needs a process for each tenant, and processes can't share a simulated GPU."
            )
        self._device, self._seed, self._cache = device, seed, cache
        self._overlap = overlap
        self._workers: dict[tuple[object, ...], Worker] = {}
        self._started = 0
        self._environment: Mapping[str, str] = {}
        with ExitStack() as undo:
            # Sockets lie in it: the system's own folder for these keeps their paths short.
            folder = tempfile.TemporaryDirectory(prefix="missile-mps-", ignore_cleanup_errors=True)
            self._folder = Path(undo.enter_context(folder))
            if daemon:
                started = MpsDaemon(self._folder)
                undo.callback(started.close)
                self._environment = started.environment
            undo.callback(self._dismiss)
            self._resources = undo.pop_all()

    def prepare(self, tenants: Sequence[Tenant], policies: Sequence[str]) -> None:
        """Start the workers of several runs of `tenants` at once, as far as there is room; the runs then find them ready.

        What goes wrong with one is told by the run that needs it.
        """
        wanted = [(tenant, MpsSettings.parse(policy)) for policy in policies for tenant in tenants]
        fresh: dict[str, list[Worker]] = {}
        try:
            self._make_room({self._key(*one) for one in wanted})
            for tenant, settings in wanted:
                if self._key(tenant, settings) not in self._workers and len(self._workers) < _MOST_WORKERS:
                    fresh.setdefault(tenant.name, []).append(self._start(tenant, settings))
            # Answers go by tenant, so one of each at a time.
            for some in zip_longest(*fresh.values()):
                group = {worker.tenant: worker for worker in some if worker is not None}
                for name, answer in hear(group.values(), _LOAD_S, "loading its model").items():
                    if isinstance(answer, Ready):
                        group[name].sms = answer.sms
                    else:
                        self._drop(group[name])
        except BaseException:
            self._dismiss()
            raise

    def run(self, tenants: Sequence[Tenant], policy: str, *, seed: int, duration_ns: int, warmup_ns: int) -> RunRecord:
        """As `run.run`. A worker that dies leaves the others running, and its tenant has the `error`.

        Ctrl-C during the measurement gives what was measured, `interrupted`; before it, KeyboardInterrupt.
        """
        settings = MpsSettings.parse(policy)
        if not 0 <= warmup_ns < duration_ns:
            raise MisuseError(
                f"A run's warm-up must be shorter than the run: {warmup_ns / 1e9:g} s of {duration_ns / 1e9:g} s."
            )
        try:
            workers, failed = self._assemble(tenants, settings)
            sms = {name: worker.sms for name, worker in workers.items()}
            orders = [Serve(t, seed, duration_ns, warmup_ns) for t in tenants if t.name in workers]
            answers: dict[str, object] = {**failed, **self._measure(workers, orders)}
        except BaseException:
            self._dismiss()
            raise
        records = {name: answer.record for name, answer in answers.items() if isinstance(answer, Done)}
        failed |= {name: answer for name, answer in answers.items() if isinstance(answer, Failed)}
        if failed or any(record.fault for record in records.values()):
            self._dismiss()  # what one process meets, all processes of an MPS server may have met
        errors = {name: failure.text for name, failure in failed.items()}
        span = (warmup_ns, duration_ns)
        return _merged(policy, self._device, tenants, records, errors, sms, seed, span)

    def _assemble(
        self, tenants: Sequence[Tenant], settings: MpsSettings
    ) -> tuple[dict[str, Worker], dict[str, Failed]]:
        """A worker with its model loaded for each tenant, by name; and the tenants that did not fit in memory."""
        self._make_room([self._key(tenant, settings) for tenant in tenants])
        workers: dict[str, Worker] = {}
        fresh = []
        for tenant in tenants:
            key = self._key(tenant, settings)
            if key in self._workers:
                worker = self._workers[key] = self._workers.pop(key)  # now the latest used
            else:
                worker = self._start(tenant, settings)
                fresh.append(worker)
            workers[tenant.name] = worker
        failed: dict[str, Failed] = {}
        for name, answer in hear(fresh, _LOAD_S, "loading its model").items():
            if isinstance(answer, Ready):
                workers[name].sms = answer.sms
            elif isinstance(answer, Failed):
                if answer.kind != OutOfMemoryError.__name__:
                    raise _ERRORS.get(answer.kind, MissileError)(answer.text)
                failed[name] = answer
        if len(failed) == len(workers):
            raise OutOfMemoryError(f"No tenant could be loaded. {next(iter(failed.values())).text}")
        return {name: worker for name, worker in workers.items() if name not in failed}, failed

    def _key(self, tenant: Tenant, settings: MpsSettings) -> tuple[object, ...]:
        """All that a worker is started with; arrivals and objectives come with each run."""
        return tenant.name, tenant.tenant_class, tenant.model, tenant.batch, *settings.environment(tenant).values()

    def _start(self, tenant: Tenant, settings: MpsSettings) -> Worker:
        """A new worker, told to load; its answer is still to come."""
        log = self._folder / f"worker-{self._started}.log"
        self._started += 1
        worker = Worker(tenant.name, {**_QUEUES, **self._environment, **settings.environment(tenant)}, log)
        self._workers[self._key(tenant, settings)] = worker
        worker.send(Load(self._device, self._seed, tenant, self._cache, self._overlap))
        return worker

    def _drop(self, worker: Worker) -> None:
        self._workers = {key: other for key, other in self._workers.items() if other is not worker}
        worker.end()

    def _make_room(self, needed: Collection[tuple[object, ...]]) -> None:
        """End workers that `needed` has no use for, the longest unused first, as far as it needs more than there may be."""
        others = [key for key in self._workers if key not in needed]
        for key in others[: max(len(others) + len(needed) - _MOST_WORKERS, 0)]:
            self._workers.pop(key).end()

    def _measure(self, workers: Mapping[str, Worker], orders: Sequence[Serve]) -> dict[str, object]:
        """What each worker answers to its order, by tenant: `Done`, or `Failed`."""
        for order in orders:
            workers[order.tenant.name].send(order)
        answers = hear(workers.values(), _REHEARSE_S, "getting ready")
        armed = [workers[name] for name, answer in answers.items() if isinstance(answer, Armed)]
        go = Go(time.perf_counter_ns() + _HEAD_START_NS)
        for worker in armed:
            worker.send(go)
        limit_s = 1.25 * orders[0].duration_ns / 1e9 + _SETTLE_S
        return answers | hear(armed, limit_s, "its run", pass_on=True)

    def _dismiss(self) -> None:
        """End every worker; the next run starts new ones."""
        workers, self._workers = tuple(self._workers.values()), {}
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            worker.end()

    def close(self) -> None:
        """End the workers, then the daemon. Idempotent."""
        self._resources.close()

    def __enter__(self) -> MpsPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _merged(
    policy: str,
    device: str,
    tenants: Sequence[Tenant],
    records: Mapping[str, RunRecord],
    errors: Mapping[str, str],
    sms: Mapping[str, int],
    seed: int,
    span: tuple[int, int],
) -> RunRecord:
    """One record of the workers' records. span: the warm-up's and the run's end, ns. Pure."""
    rows = []
    for lane, tenant in enumerate(tenants):
        if (record := records.get(tenant.name)) is None:
            rows.append(RequestLog(tenant, 0).record(*span, error=errors[tenant.name]))
        else:
            (row,) = record.tenants
            rows.append(replace(row, lane=np.full_like(row.lane, lane)))
    faults = [record.fault for record in records.values() if record.fault]
    return RunRecord(
        policy=policy,
        device=device,
        simulated=any(record.simulated for record in records.values()),
        # A run that was cut short is as long as its shortest part.
        duration_ns=min((record.duration_ns for record in records.values()), default=span[0]),
        warmup_ns=span[0],
        seed=seed,
        tenants=tuple(rows),
        lanes=tuple(f"process of {tenant.name} on {sms.get(tenant.name, 0)} SMs" for tenant in tenants),
        jitter_ns=np.concatenate([np.empty(0, np.int64), *(record.jitter_ns for record in records.values())]),
        interrupted=any(record.interrupted for record in records.values()),
        fault=faults[0] if faults else "",
        notes=tuple(
            dict.fromkeys(note for part in (errors.values(), *(r.notes for r in records.values())) for note in part)
        ),
    )
