"""Tenants with residency "host": their weights wait in pinned memory and come in when a request does, through the link's
scheduler, into one budget of device memory that they share.

They run beside the policy, not under it: an LS tenant's stream has priority; a BE tenant's next batch starts only while no
LS batch is on the GPU, and what has started runs to its end. A tenant has one batch at a time.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from missile.errors import GpuError, MissileError, UnsupportedError
from missile.gpu.interface import Event, Gpu, HostBuffer, Priority, Stream
from missile.pcie.engine import CopyEngine
from missile.pcie.swap import Swapper, SwapRun
from missile.pcie.weights import Share
from missile.runtime.copying import link_options
from missile.runtime.hosted import HostedModel, host_model
from missile.serving.config import TenantConfig
from missile.serving.engine.binding import Found
from missile.serving.engine.executor import Batch, Loaded, TenantFacts
from missile.serving.engine.packages import Views, empty, fill, package_signature, views

__all__ = ["HostedTenants"]

_ASIDE_BYTES = 1 << 20  # as for tenants on the device
_USE_NS = 100_000_000


class _Phase(enum.Enum):
    IDLE = enum.auto()
    FILLING = enum.auto()  # inputs into pinned memory
    FILLED = enum.auto()
    RUNNING = enum.auto()  # weights come in, kernels run
    LEAVING = enum.auto()  # outputs out of the GPU
    EMPTYING = enum.auto()  # outputs out of pinned memory
    EMPTIED = enum.auto()


@dataclass(slots=True, eq=False)
class _Hosted:
    """A tenant. name: in the swap and on the link. cold: runs that brought weights in. moved: bytes since `used_from`."""

    tenant: TenantConfig
    name: str
    model: HostedModel
    stream: Stream
    done: Event
    inputs: tuple[HostBuffer, ...]
    outputs: tuple[HostBuffer, ...]
    input_views: Views
    output_views: Views
    aside: bool
    resources: ExitStack
    phase: _Phase = _Phase.IDLE
    batch: Batch | None = None
    run: SwapRun | None = None
    cold: int = 0
    moved: int = 0
    used_from: int = 0
    used_link: float = 0.0


class HostedTenants:
    """All of a server's, by slot. Owns the budget, the link's scheduler and every tenant's memory, until `close`.

    arena: where requests' tensors lie. aside: runs work on a thread that is not the engine's. Everything else belongs to
    the engine's thread, which keeps calling `step`.
    """

    def __init__(
        self, gpu: Gpu, budget: int, arena: npt.NDArray[np.uint8], aside: Callable[[Callable[[], None]], None]
    ) -> None:
        """budget: bytes of device memory for weights. OutOfMemoryError; after an error nothing is held."""
        self._gpu = gpu
        self._arena = arena
        self._aside = aside
        self._tenants: dict[int, _Hosted] = {}
        self.finished: deque[Batch] = deque()
        options = link_options(gpu)
        self._rate = options.h2d_rate
        with ExitStack() as undo:
            self.engine = CopyEngine(gpu, replace(options, staging_slots=0))  # weights and requests are pinned already
            undo.callback(self.engine.close)
            self._swapper = Swapper(gpu, self.engine, budget)
            undo.callback(self._swapper.close)
            self._resources = undo.pop_all()

    def __contains__(self, slot: int) -> bool:
        return slot in self._tenants

    def __len__(self) -> int:
        return len(self._tenants)

    @property
    def names(self) -> list[str]:
        """As they are known on the link."""
        return [hosted.name for hosted in self._tenants.values()]

    @property
    def weight(self) -> float:
        """Of all of them together, on the link."""
        return sum(hosted.tenant.weight for hosted in self._tenants.values())

    @property
    def busy(self) -> bool:
        """Whether a batch has not ended."""
        return any(hosted.batch is not None for hosted in self._tenants.values())

    @property
    def latency_sensitive(self) -> bool:
        """Whether an LS batch is on its way."""
        return any(h.batch is not None and h.tenant.tenant_class == "LS" for h in self._tenants.values())

    # --- tenants

    def install(self, slot: int, tenant: TenantConfig, found: Found, name: str) -> Loaded:
        """Read the tenant's weights into pinned memory. Errors are those of `host_model`; nothing is held then."""
        if tenant.colors is not None:
            raise UnsupportedError(
                f"Tenant {tenant.name!r}: weights on the host and colored memory can't be had in one."
            )
        signature = package_signature(found.package, tenant.outputs, batched=tenant.batched)
        sensitive = tenant.tenant_class == "LS"
        gpu = self._gpu
        with ExitStack() as undo:
            self.engine.admit(name, Share(weight=tenant.weight, latency_sensitive=sensitive))
            undo.callback(self.engine.remove, name)
            stream = gpu.create_stream(priority=Priority.HIGH if sensitive else Priority.LOW)
            undo.callback(stream.close)
            done = gpu.create_event(timing=False)
            undo.callback(done.close)
            model = host_model(found.package, found.directory, gpu, self._swapper, stream, tenant=name)
            undo.callback(model.close)
            undo.callback(self._swapper.remove, name)
            bound = model.model
            inputs, outputs = (self._pinned(nbytes, name, undo) for nbytes in (bound.input_bytes, bound.output_bytes))
            self._tenants[slot] = _Hosted(
                tenant,
                name,
                model,
                stream,
                done,
                inputs,
                outputs,
                views(bound, inputs, 1, is_input=True, batched=tenant.batched),
                views(bound, outputs, 1, is_input=False, batched=tenant.batched),
                aside=max(bound.input_bytes, bound.output_bytes) > _ASIDE_BYTES,
                resources=undo.pop_all(),
                used_from=gpu.now_ns(),
            )
        notes = (*found.notes, "weights on the host: it runs beside the policy, and is not preempted")
        return Loaded(signature, bound.nbytes, notes)

    def _pinned(self, nbytes: int, tenant: str, undo: ExitStack) -> tuple[HostBuffer, ...]:
        if not nbytes:
            return ()
        buffer = self._gpu.allocate_host(nbytes, tenant=tenant)
        undo.callback(buffer.free)
        buffer.array[:] = 0
        return (buffer,)

    def unload(self, slot: int) -> None:
        """Give back what a tenant holds, which does not run."""
        self._tenants.pop(slot).resources.close()

    def tune(self, slot: int, tenant: TenantConfig) -> None:
        """No batch is on its way: a new weight makes it a new tenant on the link."""
        hosted = self._tenants[slot]
        if tenant.weight != hosted.tenant.weight:
            self.engine.remove(hosted.name)
            self.engine.admit(hosted.name, Share(weight=tenant.weight, latency_sensitive=tenant.tenant_class == "LS"))
        hosted.tenant = tenant

    def facts(self, slot: int, weights: float) -> TenantFacts:
        """weights: of all tenants on the link together."""
        hosted = self._tenants[slot]
        now = self._gpu.now_ns()
        took = now - hosted.used_from
        if took >= _USE_NS:
            hosted.used_link = min(1.0, hosted.moved / (self._rate * took * 1e-9))
            hosted.used_from, hosted.moved = now, 0
        resident = hosted.model.hosted.nbytes if hosted.name in self._swapper.resident() else 0
        return TenantFacts(
            memory_bytes=hosted.model.model.nbytes + resident,
            sms_granted=float(self._gpu.info.sms),
            link_granted=round(hosted.tenant.weight / weights, 4),
            link_used=round(hosted.used_link, 4),
            cold_starts=hosted.cold,
        )

    # --- batches

    def start(self, batch: Batch) -> None:
        """Take the tenant's next batch; the one before has ended."""
        hosted = self._tenants[batch.slot]
        batch.start_ns = time.monotonic_ns()
        hosted.batch, hosted.phase = batch, _Phase.FILLING

        def work() -> None:
            fill(self._arena, hosted.input_views[0], batch)
            hosted.phase = _Phase.FILLED

        self._do(hosted, work)

    def _do(self, hosted: _Hosted, work: Callable[[], None]) -> None:
        if hosted.aside:
            self._aside(work)
        else:
            work()

    def step(self, patience_ns: int, *, held_back: bool) -> None:
        """Move every batch on; what has ended is in `finished` then. held_back: BE batches may not start now.

        Waits up to `patience_ns` where nothing has happened. Raises what the GPU raises when it is lost.
        """
        if not self.busy:
            return
        due = self.engine.step()
        self._swapper.poll()
        moved = [self._advance(hosted, held_back) for hosted in self._tenants.values() if hosted.batch is not None]
        if patience_ns and not any(moved):
            until = self._gpu.now_ns() + patience_ns
            leaving = [h.done for h in self._tenants.values() if h.phase is _Phase.LEAVING]
            events = [*self.engine.events(), *self._swapper.events(), *leaving]
            self._gpu.wait(events, until if due is None else min(due, until))

    def _advance(self, hosted: _Hosted, held_back: bool) -> bool:
        """One move of a tenant's batch; False when it has to wait."""
        batch, run = hosted.batch, hosted.run
        assert batch is not None
        if hosted.phase is _Phase.FILLED:
            if held_back and hosted.tenant.tenant_class == "BE":
                return False
            if hosted.inputs:
                hosted.stream.copy_to_device(hosted.model.model.input_address, hosted.inputs[0])
            batch.execute_ns = time.monotonic_ns()
            hosted.phase, hosted.run = _Phase.RUNNING, self._swapper.start(hosted.name)
        elif hosted.phase is _Phase.RUNNING and run is not None and run.done:
            self._ran(hosted, batch, run)
        elif hosted.phase is _Phase.LEAVING and hosted.done.done():
            hosted.phase = _Phase.EMPTYING

            def work() -> None:
                empty(self._arena, hosted.output_views[0], batch)
                hosted.phase = _Phase.EMPTIED

            self._do(hosted, work)
        elif hosted.phase is _Phase.EMPTIED:
            batch.end_ns = time.monotonic_ns()
            hosted.batch, hosted.run, hosted.phase = None, None, _Phase.IDLE
            self.finished.append(batch)
        else:
            return False
        return True

    def _ran(self, hosted: _Hosted, batch: Batch, run: SwapRun) -> None:
        batch.executed_ns = time.monotonic_ns()
        hosted.cold += bool(run.copied_bytes)
        hosted.moved += run.copied_bytes + hosted.model.model.input_bytes
        if run.error is not None:
            if isinstance(run.error, GpuError) and run.error.usable == "nothing":
                raise run.error
            batch.errors.update(dict.fromkeys(range(len(batch.calls)), _sentence(hosted, run.error)))
            hosted.phase = _Phase.EMPTIED
        elif hosted.outputs:
            hosted.stream.copy_to_host(hosted.outputs[0], hosted.model.model.output_address)
            hosted.stream.record(hosted.done)
            hosted.phase = _Phase.LEAVING
        else:
            hosted.phase = _Phase.EMPTIED

    def close(self) -> None:
        """Idempotent. Nothing runs any more."""
        for slot in list(self._tenants):
            self.unload(slot)
        self._resources.close()


def _sentence(hosted: _Hosted, error: MissileError) -> str:
    return f"The model of tenant {hosted.tenant.name!r} failed: {error}"
