"""When an LS request is turned away instead of started. Pure."""

from __future__ import annotations

import math
from collections import deque

from missile.errors import MisuseError
from missile.runtime.policies.interface import Action, Reject, Snapshot, Start, TenantBrief, Wake
from missile.runtime.tenant import Tenant

__all__ = ["Admission"]

_SMOOTHING = 0.1  # weight of the latest service time in the running mean


class Admission:
    """Starts one LS tenant's requests, or turns them away.

    The rule: the oldest queued request is refused when it can't meet its objective even if everything before it takes its
    usual time and it itself no longer than alone; then those behind it still can. Without an objective, a request that waits
    behind more than `queue_limit` others of its tenant makes the oldest one be refused; with one, the objective bounds the
    queue. Tenants in closed loops are never refused: they wait for their own answers, so their queues are bounded.
    refuses: False starts everything.
    """

    def __init__(self, number: int, tenant: Tenant, lane: int, *, queue_limit: int, refuses: bool = True) -> None:
        self._number = number
        self._tenant = tenant
        self._lane = lane
        self._limit = queue_limit
        self._objective_ns = tenant.slo_ms * 1e6 if tenant.slo_ms is not None else None
        self._may_refuse = refuses and tenant.closed_loop is None
        self._alone_ns = 0.0
        self._usual_ns = 0.0
        self.taken = 0  # requests that were started or turned away
        self.running = 0  # requests that were running or started when it was last asked
        self._since = 0  # when the request that runs now began to be served, as far as can be told
        # Of those that run, the oldest first; of several started at once: the oldest's.
        self._arrivals: deque[int] = deque()

    def brief(self, found: TenantBrief) -> None:
        """MisuseError for an objective below what the tenant takes when it is alone."""
        self._alone_ns = self._usual_ns = found.service_ns[self._lane]
        if self._objective_ns is not None and self._objective_ns < min(found.service_ns):
            raise MisuseError(
                f"Tenant {self._tenant.name!r} has an objective of {self._objective_ns / 1e6:g} ms and takes "
                f"{min(found.service_ns) / 1e6:.3g} ms when it is alone; no plan can meet that."
            )

    @property
    def service_ns(self) -> float:
        """What a request of the tenant takes at present, from the time when its turn has come."""
        return self._usual_ns

    def ends_at(self) -> float:
        """When the requests that run are expected to have ended, ns; minus infinity where none does."""
        return self._since + self.running * self._usual_ns if self.running else -math.inf

    def all_end_within(self, snapshot: Snapshot, share: float) -> bool:
        """Whether all requests of the tenant that are there are expected to end within `share` of its objective, each after
        those before it have taken their usual time. Without an objective: no. Ask after `starts`."""
        queued, running = snapshot.queued[self._number], snapshot.running[self._number]
        if not queued and not self.running:
            return True
        if self._objective_ns is None:
            return False
        now, bound, usual = snapshot.now_ns, share * self._objective_ns, self._usual_ns
        ends = now + (max(usual - (now - self._since), 0.0) if self.running else usual)
        for arrival in self._arrivals:
            if ends - arrival > bound:
                return False
            ends += usual
        waiting = queued + running - self.running  # less those that `starts` has started just now
        return waiting <= 0 or (
            ends - snapshot.oldest_ns[self._number] <= bound and ends - now + (waiting - 1) * usual <= bound
        )

    def starts(self, snapshot: Snapshot) -> list[Action]:
        """What to do with what is queued. Call it whenever something is, and when `running` has changed: it also watches how
        long requests take."""
        tenant, now = self._number, snapshot.now_ns
        queued, running = snapshot.queued[tenant], snapshot.running[tenant]
        self._watch(now, running)
        actions: list[Action] = []
        if not queued:
            return actions
        room = snapshot.depth[tenant] - running
        if not self._may_refuse:
            actions += [Start(tenant, self._lane)] * min(queued, room)
        else:
            # Only the oldest one's arrival is known; the others arrived later and are asked about when they are oldest.
            oldest = snapshot.oldest_ns[tenant]
            if self._is_refused(oldest, queued, now, running):
                actions.append(Reject(tenant))
            elif room > 0:
                actions.append(Start(tenant, self._lane))
            if actions and queued > 1:
                actions.append(Wake(now))
        begun = sum(isinstance(action, Start) for action in actions)
        self.taken += begun + sum(isinstance(action, Reject) for action in actions)
        if begun and not running:
            self._since = now
        self._arrivals.extend([snapshot.oldest_ns[tenant]] * begun)
        self.running = running + begun
        return actions

    def _is_refused(self, arrival_ns: int, queued: int, now: int, running: int) -> bool:
        if self._objective_ns is None:
            return queued > self._limit
        before = max(running * self._usual_ns - (now - self._since), 0.0) if running else 0.0
        return now + before + self._alone_ns > arrival_ns + self._objective_ns

    def _watch(self, now: int, running: int) -> None:
        ended = self.running - running
        if ended > 0:
            took = (now - self._since) / ended
            self._usual_ns += _SMOOTHING * (took - self._usual_ns)
            self._since = now
            for _ in range(min(ended, len(self._arrivals))):
                self._arrivals.popleft()
        self.running = running
