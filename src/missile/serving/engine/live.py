"""The runtime's engine, kept running: batches come one by one from outside, and their ends are asked for.

Policies, lanes, segments and preemption are the runtime's own, so what `missile bench` measures is what serves. Only where
requests come from is different: there from arrival times that are known before, here from the serving queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np

from missile.errors import InternalError
from missile.gpu.interface import Gpu
from missile.runtime.copying import ScheduledCopies, link_options
from missile.runtime.engine import NEVER, Engine, Span
from missile.runtime.loading import LoadedTenant
from missile.runtime.policies import create_policy
from missile.runtime.policies.interface import BriefedPolicy, Layout
from missile.runtime.requests import RequestLog
from missile.runtime.stage import Stage
from missile.runtime.tenant import Tenant

__all__ = ["Ended", "LiveEngine"]


class Ended(NamedTuple):
    """A request that has ended: number `request` of tenant number `tenant`. When its kernels ran, ns on the GPU's clock."""

    tenant: int
    request: int
    start_ns: int
    end_ns: int


@runtime_checkable
class _Lender(Protocol):
    """A policy that can let BE run beside LS requests which can afford it. lending: it did by its last decision."""

    @property
    def lends(self) -> bool: ...
    @property
    def lending(self) -> bool: ...


class _Ring:
    """Times by request number, of the last `room` requests."""

    def __init__(self, room: int) -> None:
        self._values = [0] * room

    def __getitem__(self, request: int) -> int:
        return self._values[request % len(self._values)]

    def __setitem__(self, request: int, value: int) -> None:
        self._values[request % len(self._values)] = int(value)


class _Log(RequestLog):
    """A request log without an end: it keeps the last `room` requests, more than can be outstanding."""

    def __init__(self, tenant: Tenant, room: int) -> None:
        super().__init__(tenant, 1)
        for name in ("arrival", "dispatch", "start", "end", "done", "lane"):
            setattr(self, name, cast(Any, _Ring(room)))
        self.ended: list[int] = []

    def arrive(self, now_ns: int) -> None:
        self.arrival[self.arrived] = now_ns
        self.arrived += 1

    def reject(self) -> None:
        raise InternalError("A policy refused a request that the server had admitted.")

    def finish(self, request: int) -> None:
        super().finish(request)
        self.ended.append(request)


class LiveEngine(Engine):
    """Serves `tenants`, by number, under the policy that `policy` names, until `close`; their models stay the caller's.

    depth: requests of each tenant that the GPU may have at once. None is refused, so request n takes its tenant's turn n and
    uses its buffers n modulo their number: the caller keeps no more outstanding than there are. Construction runs every
    model once in each partition and blocks; after an error nothing is held. Errors are those of the policy (see
    `create_policy`) and the GPU.
    link_rate: of the host link to the GPU, bytes/s, where the policy schedules copies; else None.
    By tenant, since the start: sm_ns, time times the SMs of its lanes while they had its work; lent_ns, time in which BE had
    work beside LS requests which could afford it; preemptions.
    """

    def __init__(self, gpu: Gpu, policy: str, tenants: Sequence[LoadedTenant], depth: Sequence[int]) -> None:
        options = {"admission": 0.0} if policy.partition(":")[0] == "missile" else {}  # the server itself sheds
        chosen = create_policy(policy, options)
        self.layout: Layout = chosen.setup([loaded.tenant for loaded in tenants], gpu.info)
        copies = ScheduledCopies.where_needed(gpu, tenants) if getattr(chosen, "copies", False) else None
        stage = Stage(gpu, tenants, self.layout, copies)
        self.link_rate = None if copies is None else link_options(gpu).h2d_rate
        try:
            briefs = stage.rehearse()
            if isinstance(chosen, BriefedPolicy):
                chosen.brief(briefs)
            logs = [_Log(loaded.tenant, 2 * loaded.depth + 2) for loaded in tenants]
            super().__init__(
                gpu,
                stage,
                chosen,
                logs,
                [np.empty(0, np.int64)] * len(logs),
                lanes=len(self.layout.lanes),
                depth=depth,
                span=Span(0, NEVER, NEVER),
            )
        except BaseException:
            stage.close()
            raise
        self._live_logs = logs
        self._fresh = False
        self._origin = gpu.now_ns()
        self._looked = 0
        parts = [*self.layout.partitions, gpu.info.sms - sum(self.layout.partitions)]
        self._lane_sms = [gpu.info.sms if x.partition is None else parts[x.partition] for x in self.layout.lanes]
        self._lender = chosen if isinstance(chosen, _Lender) and chosen.lends else None
        self._best_effort = [n for n, loaded in enumerate(tenants) if not loaded.tenant.latency_sensitive]
        self.sm_ns = [0] * len(tenants)
        self.lent_ns = [0] * len(tenants)
        self.preemptions = [0] * len(tenants)

    @property
    def busy(self) -> bool:
        """Whether there are requests that have not ended."""
        return any(log.arrived > log.finished for log in self._live_logs)

    @property
    def lends(self) -> bool:
        """Whether the policy may let BE tenants run beside LS requests that can afford it."""
        return self._lender is not None

    def submit(self, tenant: int, waited_ns: int = 0) -> None:
        """The next request of `tenant`, whose input lies in its buffer. It starts when the policy says so, in `step`.

        waited_ns: since it came to the server; policies hold objectives against that time, and not against this one.
        """
        self._arrive(tenant, self._gpu.now_ns() - self._origin - waited_ns)
        self._fresh = True

    def step(self, patience_ns: int = 0) -> list[Ended]:
        """Start what may be started; what has ended since the last call. Waits up to `patience_ns` where nothing has."""
        if not self._pass() and patience_ns and (heads := self._heads()):
            now = self._gpu.now_ns()
            self._stage.wait(heads, min(now + patience_ns, self._origin + self._wake_at))
            self._pass()
        return self._take_ended()

    def _pass(self) -> bool:
        now = self.now_ns = self._gpu.now_ns() - self._origin
        self._account(now)
        changed = self._collect()
        if changed or self._fresh or now >= self._wake_at:
            self._fresh = False
            self._decide(now)
        if self._unread:
            self._read_times()
        return changed

    def _take_ended(self) -> list[Ended]:
        ended: list[Ended] = []
        origin = self._origin
        for tenant, log in enumerate(self._live_logs):
            if log.ended:
                ended += [Ended(tenant, n, int(log.start[n]) + origin, int(log.end[n]) + origin) for n in log.ended]
                log.ended.clear()
        return ended

    def _account(self, now: int) -> None:
        """Add the time since the last look, times the SMs of the lane, to whoever had work on a lane; the time alone to BE
        tenants that had it beside LS requests which could afford it."""
        took, self._looked = now - self._looked, now
        for lane, sms in zip(self._lanes, self._lane_sms, strict=True):
            if lane:
                self.sm_ns[lane[0].tenant] += took * sms
        if self._lender is not None and self._lender.lending:
            for tenant in self._best_effort:
                if self._given[tenant] > self._taken[tenant]:
                    self.lent_ns[tenant] += took

    def _preempt(self, tenant: int) -> None:
        before = self._preempted[tenant]
        super()._preempt(tenant)
        self.preemptions[tenant] += self._preempted[tenant] and not before

    def cold_starts(self, tenant: int) -> int:
        """How often the tenant's weights have come in from the host since the last call."""
        return self._stage.take_cold_starts(tenant)

    def close(self) -> None:
        """Take the lanes down. Idempotent. Nothing may run any more."""
        self._stage.clear()
        self._gpu.synchronize()
        self._stage.close()
