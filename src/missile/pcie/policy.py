"""Completely fair scheduling of one direction of the link, in bytes. Pure: no clock, no GPU, no threads.

The scheduler is Linux's CFS with bytes for CPU time: every tenant has a virtual runtime that advances by
bytes / weight, and whoever has the smallest one goes next. Beside that: bounded credit for a tenant that wakes,
token buckets for rate limits, and guaranteed minimums by earliest deadline. What is guaranteed, and why, is proved in
docs/design/pcie-bounds.md; tests/pcie/test_pcie_policy.py tests each theorem by its number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from missile.errors import MisuseError
from missile.pcie.bucket import TokenBucket
from missile.pcie.weights import MIB, NICE_ZERO, Share

__all__ = ["FLOOR_CHUNKS", "MAX_RESERVED", "MINIMUM_MARGIN", "FairLink", "Granularity", "Pick"]

MAX_RESERVED: Final = 0.95
"""Part of the link that guaranteed minimums may take: the rest keeps tenants without one from starving."""

_UNITS_PER_BYTE: Final = NICE_ZERO
MINIMUM_MARGIN: Final = 1.01
"""Minimums gather so much faster than was promised: chunks are whole, and windows begin in the middle of them."""

FLOOR_CHUNKS: Final = 8  # how much of a missed minimum is made up for, in chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Granularity:
    """Largest chunks in bytes, and the credit of a tenant that wakes, in bytes for a tenant of weight 1.

    solo: one tenant has copies waiting. shared: several have. short: a latency-sensitive tenant is registered.
    """

    solo: int = 8 * MIB
    shared: int = 4 * MIB
    short: int = 2 * MIB
    credit: int = 1 * MIB
    latency_sensitive_credit: int = 8 * MIB

    def __post_init__(self) -> None:
        if not 0 < self.short <= self.shared <= self.solo:
            raise MisuseError(
                f"PCIe chunk sizes must satisfy 0 < short <= shared <= solo, not {self.short}, {self.shared}, {self.solo}."
            )
        if self.credit < 0 or self.latency_sensitive_credit < 0:
            raise MisuseError("PCIe wake-up credit must be at least 0 bytes.")


@dataclass(frozen=True, slots=True)
class Pick:
    """Decision: `tenant` may copy up to `quantum` bytes next. `due`: its guaranteed minimum asks for it."""

    tenant: str
    quantum: int
    latency_sensitive: bool
    due: bool


class _Flow:
    __slots__ = (
        "awake",
        "credit",
        "floor",
        "limit",
        "name",
        "residue",
        "served",
        "share",
        "throttled",
        "units",
        "vruntime",
    )

    def __init__(self, name: str, share: Share, credit: int, granularity: Granularity) -> None:
        self.name = name
        self.share = share
        self.units = share.units
        self.credit = credit * _UNITS_PER_BYTE
        self.vruntime = 0
        self.residue = 0
        self.served = 0
        self.awake = False
        self.throttled = False
        self.limit = None if share.limit is None else TokenBucket(share.limit, share.burst_bytes, full=True)
        gathers, most = MINIMUM_MARGIN * share.minimum, FLOOR_CHUNKS * granularity.solo
        self.floor = TokenBucket(gathers, most, full=False) if share.minimum else None


class FairLink:
    """One direction of the link. Times in ns on any one clock that does not go back.

    A tenant is *awake* while it has bytes that could be copied now. `pick` says who goes next and changes nothing that
    a second `pick` would notice; `charge` accounts for what was then issued.
    Virtual time is an integer: 1024 units per byte for a tenant of weight 1.
    """

    def __init__(self, capacity: float, granularity: Granularity | None = None) -> None:
        """capacity: measured rate of this direction in bytes/s, which minimums are admitted against."""
        if not capacity > 0:
            raise MisuseError(f"Link capacity must be a positive number of bytes/s, not {capacity}.")
        self.capacity = capacity
        self.granularity = granularity or Granularity()
        self.min_vruntime = 0
        self._flows: dict[str, _Flow] = {}
        self._awake: list[_Flow] = []
        self._latency_sensitive = 0  # registered
        self._urgent = 0  # of them, awake
        self._limited = 0  # awake tenants with a rate limit

    # --- tenants

    def admit(self, tenant: str, share: Share) -> None:
        """Register a tenant, asleep. MisuseError: known already, or the minimums no longer fit the link."""
        if tenant in self._flows:
            raise MisuseError(f"Tenant {tenant!r} is already registered with the PCIe scheduler.")
        reserved = share.minimum + sum(flow.share.minimum for flow in self._flows.values())
        if reserved > MAX_RESERVED * self.capacity:
            raise MisuseError(
                f"Guaranteed PCIe minimums with tenant {tenant!r} sum to {reserved / 1e9:.3g} GB/s; at most "
                f"{MAX_RESERVED * self.capacity / 1e9:.3g} of this link's {self.capacity / 1e9:.3g} GB/s can be promised."
            )
        g = self.granularity
        flow = _Flow(tenant, share, g.latency_sensitive_credit if share.latency_sensitive else g.credit, g)
        flow.vruntime = self.min_vruntime
        self._flows[tenant] = flow
        self._latency_sensitive += share.latency_sensitive

    def remove(self, tenant: str) -> None:
        flow = self._flow(tenant)
        if flow.awake:
            self._leave(flow)
        self._latency_sensitive -= flow.share.latency_sensitive
        del self._flows[tenant]

    def tenants(self) -> tuple[str, ...]:
        return tuple(self._flows)

    def knows(self, tenant: str) -> bool:
        return tenant in self._flows

    def share(self, tenant: str) -> Share:
        """MisuseError for an unknown tenant, as everywhere here."""
        return self._flow(tenant).share

    def served(self, tenant: str) -> int:
        """Bytes charged to the tenant so far."""
        return self._flow(tenant).served

    # --- waking and sleeping

    def wake(self, tenant: str, now_ns: int) -> None:
        """The tenant has bytes to copy now. It starts no further back than its credit behind the minimum."""
        flow = self._flow(tenant)
        if flow.awake:
            return
        flow.awake = True
        flow.throttled = False
        self._place(flow)
        self._awake.append(flow)
        self._urgent += flow.share.latency_sensitive
        self._limited += flow.limit is not None
        if flow.limit is not None:
            flow.limit.resume(now_ns)  # a limit's tokens also gather while its tenant sleeps: never paused
        if flow.floor is not None:
            flow.floor.resume(now_ns, at_most=self._quantum(flow))

    def sleep(self, tenant: str, now_ns: int) -> None:
        """The tenant has nothing to copy now. Its virtual runtime stays, so that sleeping gains nothing but the credit."""
        flow = self._flow(tenant)
        if not flow.awake:
            return
        flow.awake = False
        self._leave(flow)
        if flow.floor is not None:
            flow.floor.pause(now_ns)

    def _leave(self, flow: _Flow) -> None:
        self._awake.remove(flow)
        self._urgent -= flow.share.latency_sensitive
        self._limited -= flow.limit is not None

    @property
    def awake_count(self) -> int:
        return len(self._awake)

    @property
    def latency_sensitive_registered(self) -> bool:
        return self._latency_sensitive > 0

    @property
    def latency_sensitive_awake(self) -> bool:
        return self._urgent > 0

    # --- deciding

    def pick(self, now_ns: int) -> Pick | None:
        """Who goes next, or None: nobody is awake, or rate limits hold back all who are (see `next_eligible`)."""
        first: _Flow | None = None
        due: _Flow | None = None
        due_by = 0
        for flow in self._awake:
            if flow.limit is not None and not self._within_limit(flow, now_ns):
                continue
            if flow.floor is not None:
                quantum = self._quantum(flow)
                flow.floor.refill(now_ns)
                if flow.floor.holds(quantum):
                    # The minimum's oldest whole chunk is owed before the next one gathers.
                    deadline = flow.floor.time_of(2 * quantum, now_ns)
                    if due is None or deadline < due_by:
                        due, due_by = flow, deadline
            if first is None or flow.vruntime < first.vruntime:
                first = flow
        if first is None:
            return None
        if first.vruntime > self.min_vruntime:
            self.min_vruntime = first.vruntime
        chosen = due or first
        return Pick(chosen.name, self._quantum(chosen), chosen.share.latency_sensitive, due is not None)

    def charge(self, pick: Pick, nbytes: int) -> None:
        """Account for `nbytes` (at most `pick.quantum`) that the picked tenant has been given."""
        flow = self._flow(pick.tenant)
        if flow.limit is not None:
            flow.limit.take_held(nbytes)
        if flow.floor is not None:
            flow.floor.take(nbytes)
        flow.served += nbytes
        step, flow.residue = divmod(nbytes * _UNITS_PER_BYTE * NICE_ZERO + flow.residue, flow.units)
        advanced = flow.vruntime + step
        if pick.due:
            # Bytes of the minimum beyond the fair share must not be paid back later by starving.
            ceiling = self.min_vruntime + pick.quantum * _UNITS_PER_BYTE * NICE_ZERO // flow.units
            advanced = min(advanced, max(flow.vruntime, ceiling))
        flow.vruntime = advanced

    def largest_piece(self, tenant: str) -> int:
        """Bytes that fit whatever quantum the tenant is next given."""
        flow = self._flow(tenant)
        return self.granularity.short if flow.limit is None else min(self.granularity.short, flow.share.burst_bytes)

    def next_eligible(self, now_ns: int) -> int | None:
        """When the first tenant that a rate limit holds back may go on, ns; None when none is held back."""
        if not self._limited:
            return None
        times = [
            flow.limit.time_of(self._quantum(flow), now_ns)
            for flow in self._awake
            if flow.limit is not None and not flow.limit.holds(self._quantum(flow))
        ]
        return min(times, default=None)

    def lag(self, tenant: str) -> int:
        """How far the tenant's virtual runtime is ahead of the minimum, in units of 1/1024 byte at weight 1."""
        return self._flow(tenant).vruntime - self.min_vruntime

    def _flow(self, tenant: str) -> _Flow:
        try:
            return self._flows[tenant]
        except KeyError:
            known = ", ".join(self._flows) or "none"
            raise MisuseError(f"Unknown PCIe tenant {tenant!r}; registered: {known}.") from None

    def _quantum(self, flow: _Flow) -> int:
        g = self.granularity
        several = len(self._awake) > 1
        quantum = g.short if self._latency_sensitive else g.shared if several else g.solo
        return quantum if flow.limit is None else min(quantum, flow.share.burst_bytes)

    def _within_limit(self, flow: _Flow, now_ns: int) -> bool:
        assert flow.limit is not None
        flow.limit.refill(now_ns)
        if not flow.limit.holds(self._quantum(flow)):
            flow.throttled = True
            return False
        if flow.throttled:
            flow.throttled = False
            self._place(flow)
        return True

    def _place(self, flow: _Flow) -> None:
        flow.vruntime = max(flow.vruntime, self.min_vruntime - flow.credit)
