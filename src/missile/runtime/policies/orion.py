"""`orion`: BE kernels one by one, beside an LS request only where profiles differ and little of them is outstanding.

The rule of Orion (Strati, Ma, Klimovic: "Orion: Interference-aware, Fine-grained GPU Sharing for ML Applications",
EuroSys 2024). It is defined for one high-priority client; with several LS tenants a BE kernel has to suit each of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from enum import Enum
from itertools import accumulate
from math import ceil
from typing import ClassVar

from missile.compiler.profile import Limits
from missile.errors import MisuseError, UnsupportedError
from missile.gpu.interface import GpuInfo, Level, Priority
from missile.gpu.work import KernelWork
from missile.runtime.policies._common import latency_first
from missile.runtime.policies.interface import (
    Action,
    Advance,
    Lane,
    Layout,
    Segment,
    Snapshot,
    Start,
    TenantBrief,
    Wake,
)
from missile.runtime.tenant import Tenant

__all__ = ["OrionPolicy"]

_BUSY = 0.6  # a kernel is bound by what it uses at least this share of, as in the paper
_MOST_ADVANCES = 12  # of one tenant in flight: the engine has events for 16
_MOST_AT_ONCE = 8  # kernels of one tenant: each launch takes microseconds, in which an LS request may arrive


class _Kind(Enum):
    COMPUTE = "compute"
    MEMORY = "memory"
    UNKNOWN = "unknown"  # neither limit is near: suits everything


class _BestEffort:
    """A BE tenant's kernels, and what of them is outstanding."""

    def __init__(self, segments: Sequence[Segment], limits: Limits) -> None:
        self.count = len(segments)
        self.lengths = [segment.expected_ns for segment in segments]
        self.kinds = [_kind(_kernel(segment), limits) for segment in segments]
        self.sms = [_sms_needed(_kernel(segment)) for segment in segments]
        self._until = [0.0, *accumulate(self.lengths)]
        self._advances: deque[int] = deque()
        self._given = 0

    def outstanding_ns(self, launched: int, pending: int) -> float:
        """How long the last `pending` segments take alone, when `launched` of the latest request were given."""
        whole, rest = divmod(pending, self.count)
        begin = launched - rest
        if begin >= 0:
            part = self._until[launched] - self._until[begin]
        else:  # some are of the request before
            part = self._until[launched] + self._until[-1] - self._until[begin + self.count]
        return whole * self._until[-1] + part

    def has_room(self, pending: int) -> bool:
        """Whether another advance may be in flight."""
        while self._advances and self._given - self._advances[0] >= pending:
            self._given -= self._advances.popleft()
        return len(self._advances) < _MOST_ADVANCES

    def advance(self, segments: int) -> None:
        self._advances.append(segments)
        self._given += segments


class _LatencySensitive:
    """An LS tenant's kernels by time, to tell which one runs: its requests are started whole."""

    def __init__(self, brief: TenantBrief, lane: int, limits: Limits) -> None:
        works = [work for segment in brief.segments for work in segment.works if work is not None]
        self.service_ns = brief.service_ns[lane]
        scale = self.service_ns / (sum(work.solo_ns for work in works) or 1.0)
        self._ends = list(accumulate(work.solo_ns * scale for work in works))
        self._kinds = [_kind(work, limits) for work in works]
        self._running = 0
        self._since = 0

    def follow(self, running: int, starts: int, now_ns: int) -> None:
        """running: requests on the GPU before `starts` more are started now."""
        if running < self._running or not running:
            self._since = now_ns  # the next one begins when the one before it has ended
        self._running = running + starts

    @property
    def busy(self) -> bool:
        return self._running > 0

    def suits(self, kind: _Kind, now_ns: int) -> int | None:
        """When a BE kernel of `kind` may run beside it: `now_ns` or later; None: not while this request runs."""
        index = bisect_right(self._ends, now_ns - self._since)
        if index >= len(self._kinds):  # slowed down beyond its profile: its last kernel, as far as one can tell
            return now_ns if not self._kinds or _differ(self._kinds[-1], kind) else None
        if _differ(self._kinds[index], kind):
            return now_ns
        later = (i for i in range(index + 1, len(self._kinds)) if _differ(self._kinds[i], kind))
        found = next(later, None)
        return None if found is None else self._since + ceil(self._ends[found - 1])


class OrionPolicy:
    """LS requests start at once, whole, at high priority. A BE kernel starts when

    - no LS request is on the GPU, or: it needs fewer SMs than `sm_threshold` of all, and one of the two, it or the LS kernel
      running (told by its profile and the time since its request began), is bound by arithmetic and the other by memory,
      or either by neither;
    - and the BE kernels outstanding take no more than `dur_threshold` of an LS request's latency alone. throttle_idle: 0
      drops this while no LS request is on the GPU.

    BE tenants take turns.
    """

    name: ClassVar[str] = "orion"
    summary: ClassVar[str] = (
        "BE kernels one by one, beside an LS request only where profiles differ and little of them is outstanding."
    )

    def __init__(self, sm_threshold: float = 1.0, dur_threshold: float = 0.025, throttle_idle: float = 1.0) -> None:
        if not 0.0 < sm_threshold <= 1.0:
            raise MisuseError(f"Policy 'orion': sm_threshold must be above 0 and at most 1, not {sm_threshold:g}.")
        if not 0.0 < dur_threshold <= 100.0:
            raise MisuseError(f"Policy 'orion': dur_threshold must be above 0 and at most 100, not {dur_threshold:g}.")
        if throttle_idle not in (0, 1):
            raise MisuseError(f"Policy 'orion': throttle_idle must be 0 or 1, not {throttle_idle:g}.")
        self._sm_threshold, self._dur_threshold, self._throttle_idle = sm_threshold, dur_threshold, bool(throttle_idle)
        self._limits = Limits(0.0, 0.0, 0.0)
        self._sms = 0.0
        self._tenants: tuple[Tenant, ...] = ()
        self._order: tuple[int, ...] = ()
        self._ls: dict[int, _LatencySensitive] = {}
        self._be: dict[int, _BestEffort] = {}
        self._budget_ns = float("inf")
        self._turn: deque[int] = deque()

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        if info.level < Level.PRIORITIES:
            raise UnsupportedError(f"Policy 'orion' needs stream priorities, which {info.name} does not have.")
        self._limits, self._sms = Limits.of(info), self._sm_threshold * info.sms
        self._tenants = tuple(tenants)
        self._order = tuple(i for i in latency_first(tenants) if tenants[i].latency_sensitive)
        lanes = [
            Lane(f"high-priority stream of {tenant.name}", Priority.HIGH)
            if tenant.latency_sensitive
            else Lane(f"low-priority stream of {tenant.name}, kernel by kernel")
            for tenant in tenants
        ]
        return Layout(tuple(lanes), segment_ns=tuple(None if t.latency_sensitive else 0.0 for t in tenants))

    def brief(self, tenants: Sequence[TenantBrief]) -> None:
        for index, (tenant, brief) in enumerate(zip(self._tenants, tenants, strict=True)):
            if tenant.latency_sensitive:
                self._ls[index] = _LatencySensitive(brief, index, self._limits)
            else:
                self._be[index] = _BestEffort(brief.segments, self._limits)
        self._turn = deque(self._be)
        latency = min((ls.service_ns for ls in self._ls.values()), default=float("inf"))
        self._budget_ns = self._dur_threshold * latency

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        actions: list[Action] = []
        for tenant in self._order:
            running = snapshot.running[tenant]
            count = min(snapshot.depth[tenant] - running, snapshot.queued[tenant])
            actions += [Start(tenant, tenant)] * count
            self._ls[tenant].follow(running, count, snapshot.now_ns)
        outstanding = sum(be.outstanding_ns(snapshot.launched[i], snapshot.pending[i]) for i, be in self._be.items())
        wake: int | None = None
        for tenant in tuple(self._turn):
            outstanding, later = self._feed(tenant, snapshot, outstanding, actions)
            if later is not None:
                wake = later if wake is None else min(wake, later)
        self._turn.rotate(-1)
        if wake is not None:
            actions.append(Wake(wake))
        return actions

    def _feed(
        self, tenant: int, snapshot: Snapshot, outstanding: float, actions: list[Action]
    ) -> tuple[float, int | None]:
        """Advance a BE tenant as far as the rule lets it. Returns what is outstanding then, and when to look again."""
        be, now = self._be[tenant], snapshot.now_ns
        launched, pending = snapshot.launched[tenant], snapshot.pending[tenant]
        fresh = min(snapshot.queued[tenant], snapshot.depth[tenant] - snapshot.running[tenant])
        left = _MOST_AT_ONCE
        while be.has_room(pending):
            if not launched:
                if fresh <= 0:
                    return outstanding, None
                fresh -= 1
            count, at = 0, None
            while launched + count < be.count:
                if count == left:  # look at what has arrived meanwhile, and go on
                    at = now
                    break
                at = self._when(be, launched + count, outstanding, now)
                if at != now:
                    break
                outstanding += be.lengths[launched + count]
                count += 1
            if count:
                actions.append(Advance(tenant, tenant, count))
                be.advance(count)
                pending += count
                left -= count
            if launched + count < be.count:
                return outstanding, at
            launched = 0
        return outstanding, None

    def _when(self, be: _BestEffort, index: int, outstanding: float, now_ns: int) -> int | None:
        """When kernel `index` may start if nothing else happens; None: an arrival or a completion has to come first."""
        busy = [ls for ls in self._ls.values() if ls.busy]
        if (busy or self._throttle_idle) and outstanding > self._budget_ns:
            return None
        if not busy:
            return now_ns
        if be.sms[index] >= self._sms:
            return None
        times = [ls.suits(be.kinds[index], now_ns) for ls in busy]
        known = [time for time in times if time is not None]
        return max(known) if len(known) == len(times) else None


def _kernel(segment: Segment) -> KernelWork | None:
    return next((work for work in segment.works if work is not None), None)


def _kind(work: KernelWork | None, limits: Limits) -> _Kind:
    if work is None or not work.solo_ns:
        return _Kind.UNKNOWN
    peak = limits.tensor if work.tensor_ops else limits.scalar
    compute = work.operations / work.solo_ns / peak if peak else 0.0
    memory = work.footprint_bytes / work.solo_ns / limits.memory if limits.memory else 0.0
    if max(compute, memory) < _BUSY:
        return _Kind.UNKNOWN
    return _Kind.COMPUTE if compute > memory else _Kind.MEMORY


def _sms_needed(work: KernelWork | None) -> float:
    """SMs that hold all of its blocks at once; infinitely many where nobody knows."""
    return float("inf") if work is None else ceil(work.blocks / work.blocks_per_sm)


def _differ(one: _Kind, other: _Kind) -> bool:
    return _Kind.UNKNOWN in (one, other) or one is not other
