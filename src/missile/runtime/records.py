"""What a run leaves behind: the raw times of every request. Everything that is reported is computed from these."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["RunRecord", "TenantRecord"]

Times = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """One tenant's requests in arrival order. All arrays int64, shape (n,), ns since the run's start on the GPU's clock.

    arrival: when the request arrived (for a closed loop: when it was issued).
    dispatch: when the engine had launched its kernels (host time, after the launching call returned).
    start, end: when its kernels started and ended on the GPU.
    done: when the host saw that its output had arrived. Only finished requests are in the arrays; `unfinished` counts
    the others.
    lane: index into `RunRecord.lanes`, where it ran.
    cold: shape (m, 2): when copying its weights in was asked for and when they had arrived, for the m times that this began
    in the measured span and ended. cold_bytes: of one; cold_ideal_ns: what the link takes for them, at its measured rate.
    """

    name: str
    arrival: Times
    dispatch: Times
    start: Times
    end: Times
    done: Times
    lane: Times
    unfinished: int = 0
    rejected: int = 0
    cold: Times = field(default_factory=lambda: np.empty((0, 2), np.int64))
    cold_bytes: int = 0
    cold_ideal_ns: int = 0
    error: str = ""  # why the tenant stopped early or never started; "" when all went well

    @property
    def latency(self) -> Times:
        """Arrival to output on the host, ns."""
        return self.done - self.arrival

    @property
    def queueing(self) -> Times:
        """Arrival to first kernel running, ns."""
        return self.start - self.arrival

    @property
    def service(self) -> Times:
        """First kernel running to output on the host, ns."""
        return self.done - self.start


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run of one policy (or one tenant's solo run).

    duration_ns: the whole run, warm-up included; measured is [warmup_ns, duration_ns). The tenants' arrays hold the requests
    that arrived in it, and of closed loops those that finished in it (so that their number over its length is a rate).
    lanes: a description of each lane ("high-priority stream", "SM partition 0 (32 SMs)").
    jitter_ns: how long single passes of the engine's loop took, ns, those above its floor; the latest few thousand.
    fault: what the GPU raised and so ended the run, "" when nothing did; the arrays hold what had finished before.
    """

    policy: str
    device: str
    simulated: bool
    duration_ns: int
    warmup_ns: int
    seed: int
    tenants: tuple[TenantRecord, ...]
    lanes: tuple[str, ...] = ()
    jitter_ns: Times = field(default_factory=lambda: np.empty(0, np.int64))
    interrupted: bool = False
    fault: str = ""
    notes: tuple[str, ...] = ()
