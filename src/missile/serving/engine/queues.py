"""Which request runs next, and with which others: pure (the clock comes in as an argument).

LS before BE. Among LS tenants the request whose SLO ends first goes first. Among BE tenants the one that has had the
least service for its weight; a tenant that was away gets no credit for it.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from missile.serving.link import Call

__all__ = ["BatchLimits", "Scheduler"]


@dataclass(slots=True)
class BatchLimits:
    """How a tenant's requests are chosen and merged. slo_ns is 0 for BE.

    depth: batches that may run at once. While one runs the next starts only when it is whole: the others of a partial one
    may still come.
    """

    latency_sensitive: bool
    slo_ns: int = 0
    weight: float = 1.0
    max_items: int = 1
    delay_ns: int = 0
    depth: int = 1


@dataclass(slots=True)
class _Queue:
    limits: BatchLimits
    heap: list[tuple[int, int, Call]] = field(default_factory=list)  # (priority, order of arrival, call)
    items: int = 0
    waiting_since: int = 0
    served: float = 0.0  # ns of service over weight
    running: int = 0

    @property
    def open(self) -> bool:
        """Whether a batch of what waits may start, once it is due."""
        if not self.heap or self.running >= self.limits.depth:
            return False
        return not self.running or self.items >= self.limits.max_items

    def due_ns(self) -> int:
        """When its next batch may start."""
        if self.items >= self.limits.max_items:
            return 0
        return self.waiting_since + self.limits.delay_ns


class Scheduler:
    """The queues of all tenants, by slot."""

    def __init__(self) -> None:
        self._queues: dict[int, _Queue] = {}
        self._order = 0
        self._cancelled: set[int] = set()
        self._waiting: set[int] = set()

    def add(self, slot: int, limits: BatchLimits) -> None:
        self._queues[slot] = _Queue(limits)

    def tune(self, slot: int, limits: BatchLimits) -> None:
        self._queues[slot].limits = limits

    def remove(self, slot: int) -> list[Call]:
        """Forget a tenant; what was still waiting is returned, in order."""
        queue = self._queues.pop(slot, None)
        calls = [entry[2] for entry in sorted(queue.heap, key=lambda e: e[:2])] if queue else []
        for call in calls:
            self._waiting.discard(call.id)
            self._cancelled.discard(call.id)
        return calls

    def push(self, call: Call) -> bool:
        """False when no tenant has this slot."""
        queue = self._queues.get(call.slot)
        if queue is None:
            return False
        if not queue.heap:
            queue.waiting_since = call.arrival_ns
            if not queue.running and not queue.limits.latency_sensitive:
                active = [q.served for q in self._queues.values() if q is not queue and (q.heap or q.running)]
                queue.served = max(queue.served, min(active, default=queue.served))
        self._order += 1
        heapq.heappush(queue.heap, (call.priority, self._order, call))
        queue.items += max(1, call.batch)
        self._waiting.add(call.id)
        return True

    def cancel(self, call_id: int) -> bool:
        """True when the call was waiting: it will come back from `take` as dropped. False when it runs or ran."""
        if call_id not in self._waiting:
            return False
        self._cancelled.add(call_id)
        return True

    def waiting(self, slot: int) -> int:
        queue = self._queues.get(slot)
        return len(queue.heap) if queue else 0

    def ready(self, latency_sensitive: bool, now_ns: int) -> int | None:
        """The slot that should run next in this class, or None when none is due."""
        best: int | None = None
        best_key = 0.0
        for slot, queue in self._queues.items():
            if queue.limits.latency_sensitive is not latency_sensitive or not queue.open:
                continue
            if queue.due_ns() > now_ns:
                continue
            key = float(queue.waiting_since + queue.limits.slo_ns) if latency_sensitive else queue.served
            if best is None or key < best_key:
                best, best_key = slot, key
        return best

    def take(self, slot: int, now_ns: int) -> tuple[list[Call], list[Call], list[Call]]:
        """(to run now as one batch, expired, cancelled). What runs counts until `done`."""
        queue = self._queues[slot]
        run: list[Call] = []
        expired: list[Call] = []
        cancelled: list[Call] = []
        items = 0
        while queue.heap:
            call = queue.heap[0][2]
            size = max(1, call.batch)
            if call.id in self._cancelled:
                cancelled.append(call)
                self._cancelled.discard(call.id)
            elif call.deadline_ns and call.deadline_ns <= now_ns:
                expired.append(call)
            elif run and items + size > queue.limits.max_items:
                break
            else:
                run.append(call)
                items += size
            heapq.heappop(queue.heap)
            self._waiting.discard(call.id)
            queue.items -= size
        if queue.heap:
            queue.waiting_since = queue.heap[0][2].arrival_ns
        queue.running += bool(run)
        return run, expired, cancelled

    def done(self, slot: int, service_ns: int) -> None:
        """One of the slot's batches has ended after `service_ns`."""
        queue = self._queues.get(slot)
        if queue is not None:
            queue.running -= 1
            queue.served += service_ns / queue.limits.weight

    def next_due_ns(self) -> int | None:
        """When the next waiting batch becomes due (may be past); None when nothing that waits may start."""
        return min((q.due_ns() for q in self._queues.values() if q.open), default=None)
