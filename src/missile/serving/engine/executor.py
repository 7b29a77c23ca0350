"""The seam between the engine's queues and what executes: PyTorch on the CPU, or the GPU runtime.

An executor is given batches and hands them back, finished. It decides nothing about order: that is the queues' part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from missile.serving.config import TenantConfig
from missile.serving.link import Call
from missile.serving.tensors import BlockLayout, ModelSignature

__all__ = ["Batch", "DeviceFacts", "Executor", "Loaded", "TenantFacts"]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What executes. isolation: what holds between tenants, in words, for people ("none: ..." on the CPU)."""

    device: str
    name: str
    simulated: bool
    isolation: str
    sms: int = 0
    colors: int = 0
    policy: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can run. memory_bytes: what it holds, weights included. notes: for the log and the metadata.

    depth: batches of it that `start` takes before the first of them has ended.
    """

    signature: ModelSignature
    memory_bytes: int
    notes: tuple[str, ...] = ()
    depth: int = 1


@dataclass(frozen=True, slots=True)
class TenantFacts:
    """What a tenant has been granted and uses now. None: has no meaning on this device."""

    memory_bytes: int = 0
    sms_granted: float | None = None
    sms_used: float | None = None
    colors: tuple[int, ...] | None = None
    link_granted: float | None = None
    link_used: float | None = None
    preemptions: int | None = None
    lent_seconds: float | None = None
    guard_hits: int | None = None
    cold_starts: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Batch:
    """Requests of one tenant that run together. The executor fills in the times (monotonic, ns) and the errors.

    layouts: where each call's tensors lie, from its offset in the arena. errors: the sentence of each call that failed,
    by its index.
    """

    slot: int
    calls: Sequence[Call]
    layouts: Sequence[BlockLayout]
    start_ns: int = 0
    execute_ns: int = 0
    executed_ns: int = 0
    end_ns: int = 0
    errors: dict[int, str] = field(default_factory=dict)


class Executor(Protocol):
    """Called by the engine's thread only, but for `prepare`, which runs on a thread of its own."""

    @property
    def facts(self) -> DeviceFacts: ...
    @property
    def bell(self) -> int:
        """An event fd that rings when a batch has ended, for an engine that waits."""

    @property
    def polling(self) -> bool:
        """Whether batches run now whose end rings no bell: the engine then polls without sleeping."""

    def prepare(self, tenant: TenantConfig, folder: Path) -> Any:
        """Do what takes long (reading, building, compiling) while others run. MissileError when it can't be done."""

    def install(self, slot: int, tenant: TenantConfig, prepared: Any) -> Loaded | None:
        """Take what `prepare` gave. None: it knows more now, and is to be prepared again. MissileError when it does not fit;
        nothing is held then."""

    def unload(self, slot: int) -> None:
        """Give back what `slot` holds. None of its batches runs."""

    def tune(self, slot: int, tenant: TenantConfig) -> None:
        """New weight, SLO and class of a tenant that stays loaded."""

    def free(self, latency_sensitive: bool) -> bool:
        """Whether a batch of this class could start now."""

    def start(self, batch: Batch, *, latency_sensitive: bool) -> None:
        """Start a batch. It may run to its end before this returns."""

    def poll(self, attend: Callable[[], bool]) -> list[Batch]:
        """Batches that have ended since the last call. May look after running ones for a while, until `attend` says that
        the caller is needed elsewhere."""

    def tenant_facts(self, slot: int) -> TenantFacts: ...
    def close(self) -> None: ...
