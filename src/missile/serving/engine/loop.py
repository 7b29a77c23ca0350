"""The engine's loop: calls in from the ring, batches to the executor, answers out to the ring."""

from __future__ import annotations

import gc
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from missile.errors import GpuError, InternalError, MissileError
from missile.serving.config import TenantConfig
from missile.serving.engine.executor import Batch, Executor
from missile.serving.engine.queues import BatchLimits, Scheduler
from missile.serving.engine.spin import Spin
from missile.serving.link import Call, CallKind, Link, Outcome, ring
from missile.serving.tensors import ERROR_BYTES, BlockLayout, ModelSignature

__all__ = ["EngineLoop", "batch_limits"]

log = logging.getLogger("missile.engine")

FACTS_EVERY_NS = 500_000_000
CONTROL_EVERY_NS = 2_000_000
BACKLOG_NS = 1_000_000


def _at_once() -> bool:
    return True


def batch_limits(tenant: TenantConfig, depth: int = 1) -> BatchLimits:
    return BatchLimits(
        latency_sensitive=tenant.tenant_class == "LS",
        slo_ns=int((tenant.slo_ms or 0.0) * 1e6),
        weight=tenant.weight,
        max_items=tenant.batch.max,
        delay_ns=int(tenant.batch.delay_ms * 1e6),
        depth=depth,
    )


class EngineLoop:
    """Owns one link's engine side. `run` returns when told to stop, or when the front end is gone.

    patience_ns: a batch that runs longer ends `run` with an InternalError that names the tenant's slot (0: none does).
    spin_ns: the longest mean gap between calls for which it stays awake (see `Spin`).
    """

    def __init__(self, link: Link, executor: Executor, folder: Path, *, spin_ns: int = 0, patience_ns: int = 0) -> None:
        self._link = link
        self._executor = executor
        self._folder = folder
        self._spinning = Spin(spin_ns if len(os.sched_getaffinity(0)) > 1 else 0)
        self._batch_patience_ns = patience_ns
        self._scheduler = Scheduler()
        self._limits: dict[int, BatchLimits] = {}
        self._signatures: dict[int, ModelSignature] = {}
        self._layouts: dict[tuple[int, int], BlockLayout] = {}
        self._running: dict[int, deque[int]] = {}  # when the batches that are on the executor started, by slot
        self._loaded: deque[tuple[int, TenantConfig, Any]] = deque()  # what the loader threads have to say
        self._unloading: set[int] = set()
        self._backlog: deque[tuple[int, ...]] = deque()  # answers that found the ring full
        self._stopping = False
        self._gone = False

    def run(self) -> None:
        link = self._link
        poller = select.poll()
        for descriptor in (link.call_bell.descriptor, self._executor.bell, link.control.fileno()):
            poller.register(descriptor, select.POLLIN)
        next_facts = next_look = 0
        while not self._gone and not (self._stopping and not self._limits):
            self._take_calls()
            self._dispatch()
            self._collect(self._attend)
            self._finish_loads()
            now = time.monotonic_ns()
            if now >= next_facts:
                self._check_batches(now)
                self._send_facts()
                next_facts = now + FACTS_EVERY_NS
            if now >= next_look:  # the loop may be too busy to sleep, where it would be told
                self._take_control()
                next_look = now + CONTROL_EVERY_NS
            if len(link.calls) or self._executor.polling or self._spin(poller, next_facts):
                continue
            link.call_bell.arm()
            if not len(link.calls) and not self._loaded and not self._collect(_at_once):
                for descriptor, _ in poller.poll(max(0.0, (self._wake_ns(next_facts) - time.monotonic_ns()) / 1e6)):
                    if descriptor == link.control.fileno():
                        self._take_control()
                    elif descriptor == self._executor.bell:
                        os.eventfd_read(descriptor)
            link.call_bell.quiet()
        self._executor.close()

    def _spin(self, poller: select.poll, next_facts: int) -> bool:
        """Look for the next call while that is worth it; False when there is none, or something else to do."""
        calls, spinning = self._link.calls, self._spinning
        until = min(spinning.until_ns(time.monotonic_ns()), self._wake_ns(next_facts))
        while (now := time.monotonic_ns()) < until:
            if len(calls):
                return True
            if spinning.stolen(now) or poller.poll(0):
                break
        return False

    def _wake_ns(self, next_facts: int) -> int:
        """Until when the loop has nothing to do unless it is called: the next facts, or a waiting batch that may start."""
        if self._backlog:
            return time.monotonic_ns() + BACKLOG_NS  # the front end has to make room first
        until = next_facts
        for latency_sensitive in (True, False):
            if self._executor.free(latency_sensitive) and (due := self._scheduler.next_due_ns()) is not None:
                until = min(until, due)
        return until

    # --- calls

    def _take_calls(self) -> None:
        pop = self._link.calls.pop
        while (fields := pop()) is not None:
            call = Call._make(fields)
            self._spinning.called(call.arrival_ns)
            if call.kind == CallKind.CANCEL:
                self._scheduler.cancel(call.id)
            elif call.slot in self._unloading or not self._scheduler.push(call):
                self._answer(call, Outcome.UNLOADED)

    def _layout(self, call: Call) -> BlockLayout:
        key = (call.slot, call.batch)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = BlockLayout.of(self._signatures[call.slot], call.batch)
        return layout

    def _dispatch(self) -> None:
        for latency_sensitive in (True, False):
            while self._executor.free(latency_sensitive):
                now = time.monotonic_ns()
                slot = self._scheduler.ready(latency_sensitive, now)
                if slot is None:
                    break
                run, expired, cancelled = self._scheduler.take(slot, now)
                for call in expired:
                    self._answer(call, Outcome.EXPIRED, queue_ns=now - call.arrival_ns)
                for call in cancelled:
                    self._answer(call, Outcome.CANCELLED, queue_ns=now - call.arrival_ns)
                if run:
                    batch = Batch(slot, run, [self._layout(call) for call in run])
                    self._running.setdefault(slot, deque()).append(now)
                    self._executor.start(batch, latency_sensitive=latency_sensitive)
                    self._collect(_at_once)
                    self._take_calls()

    def _attend(self) -> bool:
        """Whether there are calls, or models that have been loaded, to look after."""
        return bool(len(self._link.calls) or self._loaded)

    def _collect(self, attend: Callable[[], bool]) -> bool:
        """Answer for what the executor has finished; True when there was any."""
        while self._backlog and self._link.answers.push(*self._backlog[0]):
            self._backlog.popleft()
        finished = self._executor.poll(attend)
        for batch in finished:
            started = self._running[batch.slot]
            started.popleft()
            if not started:
                del self._running[batch.slot]
            self._scheduler.done(batch.slot, batch.end_ns - batch.start_ns)
            items = sum(max(1, call.batch) for call in batch.calls)
            for index, call in enumerate(batch.calls):
                error = batch.errors.get(index)
                if error is not None:
                    self._write_error(call, batch.layouts[index], error)
                self._push_answer(
                    call.id,
                    Outcome.DONE if error is None else Outcome.FAILED,
                    items,
                    int(index == 0),
                    batch.start_ns - call.arrival_ns,
                    batch.execute_ns - batch.start_ns,
                    batch.executed_ns - batch.execute_ns,
                    batch.end_ns - batch.executed_ns,
                    batch.end_ns,
                )
        if finished:
            self._link.answer_bell.ring()
            for slot in [s for s in self._unloading if s not in self._running]:
                self._unload(slot)
        return bool(finished)

    def _write_error(self, call: Call, layout: BlockLayout, sentence: str) -> None:
        raw = sentence.encode()[: ERROR_BYTES - 4]
        start = call.offset + layout.error
        self._link.arena[start : start + 4] = len(raw).to_bytes(4, "little")
        self._link.arena[start + 4 : start + 4 + len(raw)] = raw

    def _answer(self, call: Call, outcome: Outcome, *, queue_ns: int = 0) -> None:
        self._push_answer(call.id, outcome, 0, 0, queue_ns, 0, 0, 0, time.monotonic_ns())
        self._link.answer_bell.ring()

    def _push_answer(self, *fields: int) -> None:
        if self._backlog or not self._link.answers.push(*fields):
            self._backlog.append(fields)

    # --- control

    def _take_control(self) -> None:
        control = self._link.control
        while not self._gone and control.pending():
            message = control.receive()
            if message is None:
                self._gone = True
                return
            operation = message["op"]
            if operation == "load":
                tenant = TenantConfig.model_validate(message["tenant"])
                self._start_load(message["slot"], tenant)
            elif operation == "unload":
                self._unloading.add(message["slot"])
                if message["slot"] not in self._running:
                    self._unload(message["slot"])
            elif operation == "tune":
                self._tune(message["slot"], TenantConfig.model_validate(message["tenant"]))
            elif operation == "stop":
                self._stopping = True
                self._unloading.update(self._limits)
                for slot in [s for s in self._unloading if s not in self._running]:
                    self._unload(slot)

    def _start_load(self, slot: int, tenant: TenantConfig) -> None:
        threading.Thread(target=self._load, args=(slot, tenant), daemon=True).start()

    def _load(self, slot: int, tenant: TenantConfig) -> None:
        """On a thread of its own: loading takes seconds and the others go on."""
        try:
            result: Any = self._executor.prepare(tenant, self._folder)
        except MissileError as error:
            result = error
        except Exception as error:  # whatever a user's factory raises must not end the engine
            log.exception("loading %s failed", tenant.name)
            result = MissileError(f"{type(error).__name__}: {error}")
        self._loaded.append((slot, tenant, result))
        ring(self._executor.bell)

    def _finish_loads(self) -> None:
        while self._loaded:
            slot, tenant, result = self._loaded.popleft()
            if slot in self._unloading:  # unloaded while it was being loaded
                self._unloading.discard(slot)
                continue
            try:
                if isinstance(result, MissileError):
                    raise result
                result = self._executor.install(slot, tenant, result)
                if result is None:
                    self._start_load(slot, tenant)
                    continue
            except MissileError as error:
                if isinstance(error, GpuError) and error.usable == "nothing":
                    raise
                self._link.control.send({"op": "failed", "slot": slot, "error": str(error)})
                continue
            gc.freeze()  # what a model consists of lives long
            self._limits[slot] = batch_limits(tenant, result.depth)
            self._signatures[slot] = result.signature
            self._scheduler.add(slot, self._limits[slot])
            self._link.control.send(
                {
                    "op": "loaded",
                    "slot": slot,
                    "signature": result.signature.as_json(),
                    "memory_bytes": result.memory_bytes,
                    "notes": list(result.notes),
                }
            )

    def _tune(self, slot: int, tenant: TenantConfig) -> None:
        if slot in self._limits:
            self._limits[slot] = batch_limits(tenant, self._limits[slot].depth)
            self._scheduler.tune(slot, self._limits[slot])
            self._executor.tune(slot, tenant)

    def _unload(self, slot: int) -> None:
        if slot not in self._limits:
            return  # still loading: `_finish_loads` gives it back
        for call in self._scheduler.remove(slot):
            self._answer(call, Outcome.UNLOADED)
        self._executor.unload(slot)
        self._unloading.discard(slot)
        del self._limits[slot], self._signatures[slot]
        for key in [k for k in self._layouts if k[0] == slot]:
            del self._layouts[key]
        self._link.control.send({"op": "unloaded", "slot": slot})

    def _check_batches(self, now: int) -> None:
        """A batch that never ends can't be taken back: the process has to go, and is started anew."""
        for slot, started in self._running.items():
            seconds = (now - started[0]) / 1e9
            if self._batch_patience_ns and now - started[0] > self._batch_patience_ns:
                self._link.control.send({"op": "stuck", "slot": slot, "seconds": seconds})
                raise InternalError(f"A batch of slot {slot} has been running for {seconds:.0f} s.")

    def _send_facts(self) -> None:
        tenants = {str(slot): self._executor.tenant_facts(slot).as_json() for slot in self._limits}
        if not self._link.control.send({"op": "facts", "tenants": tenants}):
            self._gone = True
