"""A tenant as the front end knows it: its deployments, what it holds, and whether one more request may come in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from missile.serving.config import TenantConfig
from missile.serving.measures import Measures
from missile.serving.refusal import Reason, Refusal
from missile.serving.tensors import BlockLayout, ModelSignature

__all__ = ["Deployment", "State", "Tenant"]

_SERVICE_WEIGHT = 0.1  # of the newest request in the running mean of service times
_LAYOUTS = 64


class State(StrEnum):
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(slots=True, eq=False)
class Deployment:
    """One loaded copy of a tenant's model: a slot in the engine."""

    slot: int
    signature: ModelSignature
    memory_bytes: int
    notes: tuple[str, ...]
    outstanding: int = 0
    _layouts: dict[int, BlockLayout] = field(default_factory=dict)

    def layout(self, batch: int) -> BlockLayout:
        found = self._layouts.get(batch)
        if found is None:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            found = self._layouts[batch] = BlockLayout.of(self.signature, batch)
        return found


class Tenant:
    """State and admission. All times on the monotonic clock."""

    def __init__(self, config: TenantConfig) -> None:
        self.state = State.LOADING
        self.reason = "is being loaded"
        self.deployment: Deployment | None = None
        self.measures = Measures()
        self.outstanding = 0
        self.held_bytes = 0
        self.load_crashes = 0
        self.service_ns = 0.0  # running mean, for one item
        self._tokens = 0.0
        self._tokens_at = time.monotonic_ns()
        self.config = config
        self.tune(config)

    def tune(self, config: TenantConfig) -> None:
        """Take what can change without loading anew: class, SLO, weights, quota."""
        self.config = config
        self.measures.slo_ns = int((config.slo_ms or 0.0) * 1e6)
        self.measures.objective = config.objective
        self._tokens = float(config.quota.burst)

    @property
    def name(self) -> str:
        return self.config.name

    def ready(self) -> Deployment:
        """The deployment that serves; NOT_READY with the reason when there is none."""
        if self.deployment is None or self.state is not State.READY:
            raise Refusal(Reason.NOT_READY, f"Model {self.name!r} {self.reason}.", retry_after_s=1.0)
        return self.deployment

    def admit(self, items: int, nbytes: int) -> None:
        """Let a request in, or refuse it at once: by rate, queue length, predicted wait and memory, in this order."""
        quota = self.config.quota
        if quota.requests_per_s is not None:
            now = time.monotonic_ns()
            self._tokens = min(quota.burst, self._tokens + (now - self._tokens_at) * 1e-9 * quota.requests_per_s)
            self._tokens_at = now
            if self._tokens < 1.0:
                wait = (1.0 - self._tokens) / quota.requests_per_s
                raise Refusal(
                    Reason.RATE,
                    f"Model {self.name!r} takes at most {quota.requests_per_s:g} requests/s.",
                    retry_after_s=wait,
                )
            self._tokens -= 1.0
        if self.outstanding >= quota.queue:
            raise Refusal(
                Reason.OVERLOADED,
                f"Model {self.name!r} has {self.outstanding} requests waiting, as many as its queue takes.",
                retry_after_s=1.0,
            )
        wait_ns = self.outstanding * self.service_ns
        if wait_ns > self.config.wait_ms * 1e6:
            raise Refusal(
                Reason.OVERLOADED,
                f"Model {self.name!r} would keep this request waiting for about {wait_ns / 1e6:.0f} ms, "
                f"more than the {self.config.wait_ms:g} ms it accepts.",
                retry_after_s=1.0,
            )
        if self.held_bytes + nbytes > quota.memory_mib << 20:
            raise Refusal(
                Reason.OVERLOADED,
                f"Model {self.name!r} holds {self.held_bytes >> 20} MiB of its {quota.memory_mib} MiB for requests.",
                retry_after_s=1.0,
            )

    def served(self, service_ns: int, items: int) -> None:
        """Learn from a finished batch of `items`."""
        each = service_ns / max(1, items)
        self.service_ns += _SERVICE_WEIGHT * (each - self.service_ns) if self.service_ns else each
