"""The requests of one tenant during a run: when they arrive, how many wait, and their times in preallocated arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from missile.errors import InternalError
from missile.runtime.records import TenantRecord
from missile.runtime.tenant import Tenant

__all__ = ["REJECTED", "RequestLog"]

Times = npt.NDArray[np.int64]

REJECTED = -1


class RequestLog:
    """Requests are numbered in arrival order, and a tenant's requests start and finish in that order, so three counters
    say everything: `arrived` >= `started` >= `finished`. Times in ns since the run's start. A rejected request counts as
    started and, when those before it have finished, as finished; its `lane` is `REJECTED` and its other times mean nothing.

    capacity: room for this many requests; a closed loop that outgrows it doubles it.
    """

    def __init__(self, tenant: Tenant, capacity: int) -> None:
        self.tenant = tenant
        self.arrived = 0
        self.started = 0
        self.finished = 0
        size = max(capacity, 1)
        self.arrival, self.dispatch, self.start, self.end, self.done, self.lane = (
            np.zeros(size, np.int64) for _ in range(6)
        )

    def arrive(self, now_ns: int) -> None:
        if self.arrived == len(self.arrival):
            self._grow()
        self.arrival[self.arrived] = now_ns
        self.arrived += 1

    def reject(self) -> None:
        """Refuse the oldest request that was not started."""
        self.lane[self.started] = REJECTED
        self.started += 1
        if self.finished == self.started - 1:
            self.finished = self.started

    def finish(self, request: int) -> None:
        """All times of `request` and of those before it are noted."""
        after = request + 1
        while after < self.started and self.lane[after] == REJECTED:
            after += 1
        self.finished = after

    def _grow(self) -> None:
        for name in ("arrival", "dispatch", "start", "end", "done", "lane"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate((old, np.zeros_like(old))))

    def record(self, begin_ns: int, end_ns: int, *, error: str = "") -> TenantRecord:
        """The measured requests, as times since the run's start.

        Arrivals that depend on nothing: those that arrived in [begin_ns, end_ns), however late they finished. A closed
        loop: those that finished in it, so that their number over the span is the rate.
        """
        n = self.finished
        if not self.started >= n <= self.arrived:
            raise InternalError(f"Tenant {self.tenant.name!r}: {n} requests finished of {self.started} started.")
        deciding = self.done if self.tenant.closed_loop is not None else self.arrival
        inside = (deciding[:n] >= begin_ns) & (deciding[:n] < end_ns)
        refused = inside & (self.lane[:n] == REJECTED)
        inside &= ~refused
        if self.tenant.closed_loop is not None:
            unfinished = 0
        else:
            waiting = self.arrival[n : self.arrived]
            late = (waiting >= begin_ns) & (waiting < end_ns)
            turned_away = late & (self.lane[n : self.arrived] == REJECTED)
            unfinished = int(np.count_nonzero(late & ~turned_away))
            refused = np.concatenate((refused, turned_away))
        return TenantRecord(
            name=self.tenant.name,
            **{
                name: getattr(self, name)[:n][inside].copy()
                for name in ("arrival", "dispatch", "start", "end", "done", "lane")
            },
            unfinished=unfinished,
            rejected=int(np.count_nonzero(refused)),
            error=error,
        )
