"""The GPU device: compiled packages under one of the runtime's policies.

A batch is: inputs into pinned memory, one copy to the device, the model's kernels, one copy back, outputs out of pinned
memory. A package is compiled for one batch size; smaller batches run padded. Lanes, segments and preemption are the
runtime's (see `LiveEngine`). Tensors of a tenant with large ones pass through a copier thread, so that no launch waits for
them; several of its batches are on their way at once, so that the GPU does not wait either.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import numpy as np

from missile.errors import GpuError, MissileError, UnsupportedError
from missile.gpu.interface import Gpu, Level
from missile.runtime.policies import create_policy
from missile.serving.config import TenantConfig
from missile.serving.engine.binding import Binder, CodeMissing, Found
from missile.serving.engine.executor import Batch, DeviceFacts, Loaded, TenantFacts
from missile.serving.engine.live import Ended, LiveEngine
from missile.serving.engine.packages import empty, fill
from missile.serving.engine.served import ServedModel, load_served, runtime_tenant
from missile.serving.link import ring

__all__ = ["GpuExecutor"]

_LOOK_NS = 20_000  # how long a step may wait for a running batch
_LOOK_AFTER_NS = 500_000  # how long a poll may look after running batches
_SETTLE_S = 60.0  # how long batches may take to end before tenants can't be changed
_ISOLATION = {
    "priority": "LS streams have priority; SMs, caches, memory and link are shared",
    "partition": "SMs are split between LS and BE tenants; caches, memory and link are shared",
    "missile, lending": "LS has priority, BE gives SMs back when LS requests there could not afford it beside them, "
    "long copies share the link by weight; caches and memory are shared, but for tenants with colors of their own",
    "missile": "LS has priority, BE gives SMs back while LS requests are there, long copies share the link by weight; "
    "caches and memory are shared, but for tenants with colors of their own",
}


class GpuExecutor:
    """Owns `gpu`. policy: what `create_policy` takes. swap_bytes: device memory for weights that wait on the host.

    UnsupportedError when the GPU has not what it needs.
    """

    def __init__(
        self, arena: memoryview, gpu: Gpu, *, policy: str, channel_map: Path | None = None, swap_bytes: int = 0
    ) -> None:
        if gpu.info.level < Level.PRIORITIES:
            raise UnsupportedError(f"Serving needs stream priorities, which {gpu.info.name} does not have.")
        self._arena = np.frombuffer(arena, np.uint8)
        self._gpu = gpu
        self._policy = policy
        preempt = getattr(create_policy(policy), "preempt", False)
        self._binder = Binder(gpu, preempt=preempt, channel_map=channel_map, swap_bytes=swap_bytes)
        self._models: dict[int, ServedModel] = {}
        self._order: list[ServedModel] = []  # by number in the live engine
        self._live: LiveEngine | None = None
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._filled: deque[tuple[ServedModel, int]] = (
            deque()
        )  # a batch of it lies in its buffer; when its oldest call came
        self._emptied: deque[Batch] = deque()
        self._finished: deque[Batch] = deque()
        self._copier = threading.Thread(target=self._copy, name="missile-copy", daemon=True)
        self._copier.start()

    @property
    def facts(self) -> DeviceFacts:
        info = self._gpu.info
        name = self._policy.partition(":")[0]
        if getattr(create_policy(self._policy), "lends", False):
            name = "missile, lending"
        return DeviceFacts(
            info.device,
            info.name,
            info.simulated,
            _ISOLATION.get(name, "none: tenants share everything"),
            sms=info.sms,
            policy=self._policy,
        )

    @property
    def bell(self) -> int:
        return self._bell

    @property
    def polling(self) -> bool:
        return self._live is not None and self._live.busy

    # --- models

    def prepare(self, tenant: TenantConfig, folder: Path) -> Found:
        """The tenant's package, compiled now when there is none yet (minutes; what runs is disturbed meanwhile)."""
        return self._binder.find(tenant, folder)

    def install(self, slot: int, tenant: TenantConfig, prepared: Found) -> Loaded | None:
        """The others pause while the policy is set up anew with this tenant: the GPU is split once for all of them."""
        self._settle()
        try:
            colors = {m.tenant.name: m.loaded.colors for m in self._models.values() if m.loaded.colors}
            colors.pop(tenant.name, None)  # it takes over from itself
            model = load_served(self._gpu, self._binder, tenant, prepared, name=self._name_for(tenant), others=colors)
        except CodeMissing:
            return None
        try:
            self._set_up([*self._models.values(), model])
        except BaseException as error:
            self._drop(model, error)
            raise
        self._models[slot] = model
        return Loaded(model.signature, model.bound.nbytes, model.notes, depth=model.depth)

    def _name_for(self, tenant: TenantConfig) -> str:
        taken = {m.loaded.tenant.name for m in self._models.values()}
        return _free_name(tenant.name, taken)

    def _drop(self, model: ServedModel, error: BaseException) -> None:
        """Give a model back that could not be set up, and go on with the others."""
        if _lost(error):
            return
        self._gpu.synchronize()
        model.resources.close()
        if self._live is None:
            self._set_up(list(self._models.values()))

    def _set_up(self, models: Sequence[ServedModel]) -> None:
        """A live engine of these models, once what runs has ended. Without one when it raises."""
        self._settle()
        if self._live is not None:
            live, self._live = self._live, None
            self._note_use()
            live.close()
        self._order = []
        if models:
            depth = [model.running_depth for model in models]
            self._live = LiveEngine(self._gpu, self._policy, [m.loaded for m in models], depth)
        self._order = list(models)
        for number, model in enumerate(models):
            model.number, model.given = number, 0
            model.usage.begin(self._gpu.now_ns())

    def _settle(self) -> None:
        """Bring everything that was started to its end; `poll` hands it out later."""
        give_up = time.monotonic() + _SETTLE_S
        while any(model.flying for model in self._order):
            self._move(_LOOK_NS)
            if time.monotonic() > give_up:
                raise MissileError("Batches on the GPU did not end, so its tenants can't be changed.")

    def unload(self, slot: int) -> None:
        model = self._models.pop(slot, None)
        if model is not None:
            self._set_up(list(self._models.values()))
            model.resources.close()

    def tune(self, slot: int, tenant: TenantConfig) -> None:
        model = self._models[slot]
        model.tenant = tenant
        fresh = runtime_tenant(tenant, model.loaded.tenant.name)
        if fresh != model.loaded.tenant:
            loaded = model.loaded
            model.loaded = replace(loaded, tenant=fresh)
            self._set_up(list(self._models.values()))

    def tenant_facts(self, slot: int) -> TenantFacts:
        model = self._models[slot]
        self._note_use()
        usage = model.usage
        return TenantFacts(
            memory_bytes=model.bound.nbytes,
            sms_granted=float(self._granted(model)),
            sms_used=round(usage.sms, 2),
            link_granted=self._link_granted(model),
            link_used=None if usage.link is None else round(usage.link, 4),
            colors=model.loaded.colors or None,
            preemptions=usage.preempted if model.preemptible else None,
            lent_seconds=round(usage.lent_ns / 1e9, 6) if self._is_lent(model) else None,
            cold_starts=None if model.loaded.weights is None else usage.cold,
            guard_hits=None if model.escapes is None else model.escapes.read(),
        )

    def _granted(self, model: ServedModel) -> int:
        """SMs of the tenant's side of the split; all of them where there is none."""
        everything = self._gpu.info.sms
        if self._live is None or not self._live.layout.partitions:
            return everything
        kept = self._live.layout.partitions[0]
        return kept if model.tenant.tenant_class == "LS" else everything - kept

    def _is_lent(self, model: ServedModel) -> bool:
        """Whether the tenant may run beside LS requests that can afford it."""
        return self._live is not None and self._live.lends and model.tenant.tenant_class == "BE"

    def _link_granted(self, model: ServedModel) -> float | None:
        """The tenant's entitlement to the host link, where copies are scheduled: its weight among all."""
        if self._live is None or self._live.link_rate is None:
            return None
        return round(model.tenant.weight / sum(other.tenant.weight for other in self._order), 4)

    def _note_use(self) -> None:
        """Take over what the live engine has counted since the last time."""
        live = self._live
        if live is None:
            return
        now = self._gpu.now_ns()
        for model in self._order:
            weights = model.loaded.weights
            model.usage.note(live, model.number, 0 if weights is None else weights.nbytes, now)

    # --- batches

    def free(self, latency_sensitive: bool) -> bool:
        return True

    def start(self, batch: Batch, *, latency_sensitive: bool) -> None:
        model = self._models[batch.slot]
        batch.start_ns = time.monotonic_ns()
        model.flying.append(batch)
        index = model.given % model.depth
        model.given += 1
        arrival_ns = min((call.arrival_ns for call in batch.calls), default=batch.start_ns)
        if model.aside:

            def work() -> None:
                fill(self._arena, model.inputs[index], batch)
                self._filled.append((model, arrival_ns))

            self._work.put(work)
        else:
            fill(self._arena, model.inputs[index], batch)
            self._filled.append((model, arrival_ns))

    def poll(self, attend: Callable[[], bool]) -> list[Batch]:
        until = time.monotonic_ns() + _LOOK_AFTER_NS
        while not self._finished:
            hurry = attend()
            self._move(0 if hurry else _LOOK_NS)
            if hurry or not self.polling or time.monotonic_ns() > until:
                break
        ended = list(self._finished)
        self._finished.clear()
        return ended

    def _move(self, patience_ns: int) -> None:
        """One step: filled batches to the live engine, ended ones from it."""
        live = self._live
        if live is None:
            return
        while self._filled:
            model, arrival_ns = self._filled.popleft()
            live.submit(model.number, max(time.monotonic_ns() - arrival_ns, 0))
        for ended in live.step(patience_ns) if live.busy else ():
            self._end(ended)
        while self._emptied:
            self._hand_out(self._emptied.popleft())

    def _end(self, ended: Ended) -> None:
        model = self._order[ended.tenant]
        batch = next(b for b in model.flying if not b.executed_ns)
        # Event times are on the host's clock, but only to within its calibration: keep the parts in order.
        now = time.monotonic_ns()
        # What it waited for the batch before it is queueing. (The buffers are filled meanwhile.)
        batch.start_ns = min(max(batch.start_ns, model.executed_ns), now)
        model.executed_ns = max(ended.end_ns, model.executed_ns)
        batch.execute_ns = min(max(ended.start_ns, batch.start_ns), now)
        batch.executed_ns = min(max(ended.end_ns, batch.execute_ns), now)
        model.usage.moved += model.bound.input_bytes
        index = ended.request % model.depth
        if model.aside:

            def work() -> None:
                empty(self._arena, model.outputs[index], batch)
                self._emptied.append(batch)

            self._work.put(work)
        else:
            empty(self._arena, model.outputs[index], batch)
            self._hand_out(batch)

    def _hand_out(self, batch: Batch) -> None:
        for model in self._order:
            if model.flying and model.flying[0] is batch:
                model.flying.popleft()
        self._finished.append(batch)

    def _copy(self) -> None:
        """The copier thread: NumPy lets go of the interpreter while it copies."""
        while (work := self._work.get()) is not None:
            work()
            ring(self._bell)

    def close(self) -> None:
        self._gpu.synchronize()
        for slot in list(self._models):
            self.unload(slot)
        self._work.put(None)
        self._copier.join(5.0)
        self._gpu.close()


def _lost(error: BaseException) -> bool:
    """Whether it took the GPU with it."""
    return isinstance(error, GpuError) and error.usable == "nothing"


def _free_name(name: str, taken: Collection[str]) -> str:
    """`name`, or with a number behind it: a tenant's new model is loaded beside the old one."""
    numbered = (f"{name[:56]}+{number}" for number in count(2))
    return next(candidate for candidate in chain([name], numbered) if candidate not in taken)
