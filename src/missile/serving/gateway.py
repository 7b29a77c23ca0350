"""From a checked request to the engine and back: admission, memory, the ring, deadlines and cancellation."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from missile.serving.arena import Arena
from missile.serving.awake import Awake
from missile.serving.link import Answer, CallKind, Link, Outcome
from missile.serving.refusal import Reason, Refusal
from missile.serving.tenant import Deployment, Tenant
from missile.serving.tensors import DATATYPES, BlockLayout, bf16_to_float

__all__ = ["Gateway", "Inference", "Result", "Source"]

_NS = 1_000_000_000
_LARGE = 1 << 20  # bytes; copying more on the event loop would keep other requests waiting
_COPIERS = 2


class Source(Protocol):
    """Where an input's bytes come from, when it is not a buffer in this process."""

    def read_into(self, target: memoryview) -> None:
        """Fill `target` whole, or raise a Refusal."""

    def detached(self) -> AbstractContextManager[Source]:
        """The same, for another thread: nothing that happens here meanwhile takes it away."""


class Target(Protocol):
    """Where an output's bytes go to."""

    def write_from(self, source: memoryview) -> None:
        """Take `source` whole, or raise a Refusal."""

    def detached(self) -> AbstractContextManager[Target]: ...


@dataclass(frozen=True, slots=True)
class Inference:
    """A request whose inputs fit the signature. inputs: buffers of exactly the right size, or sources, in its order.

    arrival_ns: when the request was complete, on the monotonic clock. started_ns: when its first bytes came.
    timeout_ns: from the arrival on; 0 for none.
    priority: lower goes first within the tenant.
    """

    tenant: Tenant
    deployment: Deployment
    batch: int
    inputs: Sequence[Any]
    arrival_ns: int
    started_ns: int
    timeout_ns: int = 0
    priority: int = 0


@dataclass(slots=True, eq=False)
class _Pending:
    id: int
    inference: Inference
    layout: BlockLayout
    arena: Arena  # its own: a restarted engine comes with another
    offset: int
    block: memoryview
    reserved: int
    future: asyncio.Future[Answer]
    sent_ns: int = 0
    abandoned: bool = False
    timer: asyncio.TimerHandle | None = None


class Result:
    """The outputs, as views that hold until the `with` block ends."""

    def __init__(self, gateway: Gateway, pending: _Pending, answer: Answer) -> None:
        self._gateway = gateway
        self._pending = pending
        self.answer = answer

    def output(self, index: int) -> memoryview:
        pending = self._pending
        start = pending.layout.outputs[index]
        return pending.block[start : start + pending.layout.output_sizes[index]]

    async def deliver(self, places: Sequence[tuple[int, Target]]) -> None:
        """Write outputs, by index, to where the client wants them."""
        pairs = [(place, self.output(index)) for index, place in places]
        if sum(len(raw) for _, raw in pairs) < _LARGE:
            for place, raw in pairs:
                place.write_from(raw)
            return
        with ExitStack() as held:
            own = [(held.enter_context(place.detached()), raw) for place, raw in pairs]

            def write() -> None:
                for place, raw in own:
                    place.write_from(raw)

            await self._gateway.aside(write)

    def front_ns(self) -> int:
        """Time in the front end so far: from the request's first bytes to the ring, and from the answer until now."""
        pending = self._pending
        return pending.sent_ns - pending.inference.started_ns + time.monotonic_ns() - self.answer.done_ns

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gateway.release(self._pending)


class Gateway:
    """One per server. All on the event loop, which stays awake while calls come at least every `spin_ns` (see `Awake`)."""

    def __init__(self, spin_ns: int = 0) -> None:
        self._awake = Awake(spin_ns)
        self._link: Link | None = None
        self._arena: Arena | None = None
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._copying = 0
        self._copiers = ThreadPoolExecutor(_COPIERS, "missile-copy")
        self.dropped_answers = 0

    def attach(self, link: Link) -> None:
        """Start with a fresh engine's link."""
        self._link = link
        self._arena = Arena(len(link.arena))

    @property
    def pending(self) -> int:
        return len(self._pending) + self._copying

    @property
    def arena_used(self) -> int:
        return self._arena.used if self._arena is not None else 0

    async def infer(self, inference: Inference) -> Result:
        """Run a request. Raises a Refusal for every way in which it gets no result; use the result in a `with`."""
        tenant = inference.tenant
        try:
            pending = self._reserve(inference)
            try:
                await self._fill(pending)
                self._send(pending)
            except BaseException:
                self.release(pending)
                raise
        except Refusal as refusal:
            owed = refusal.reason in (Reason.OVERLOADED, Reason.ENGINE_LOST, Reason.NOT_READY)
            tenant.measures.refuse(refusal.reason.label, owed=owed)
            raise
        except asyncio.CancelledError:
            tenant.measures.refuse(Reason.CANCELLED.label, owed=False)
            raise
        try:
            answer = await pending.future
        except asyncio.CancelledError:
            tenant.measures.refuse(Reason.CANCELLED.label, owed=False)
            self._abandon(pending)
            raise
        except Refusal as refusal:  # lost engine, or the deadline passed
            tenant.measures.refuse(refusal.reason.label, owed=True)
            raise
        finally:
            if pending.timer is not None:
                pending.timer.cancel()
        return self._settle(pending, answer)

    def _reserve(self, inference: Inference) -> _Pending:
        """Admit a request and give it a block. Nothing is held when it raises."""
        link, arena = self._link, self._arena
        tenant, deployment = inference.tenant, inference.deployment
        if link is None or arena is None:
            raise Refusal(Reason.ENGINE_LOST, "The engine is being started; try again.", retry_after_s=1.0)
        layout = deployment.layout(inference.batch)
        reserved = Arena.block_bytes(layout.nbytes)
        tenant.admit(inference.batch, reserved)
        offset = arena.allocate(layout.nbytes)
        if offset is None:
            raise Refusal(Reason.OVERLOADED, "The server has no memory left for another request.", retry_after_s=1.0)
        tenant.outstanding += 1
        tenant.held_bytes += reserved
        deployment.outstanding += 1
        block = link.arena[offset : offset + layout.nbytes]
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        return _Pending(next(self._ids), inference, layout, arena, offset, block, reserved, future)

    async def _fill(self, pending: _Pending) -> None:
        """Copy the inputs into the block; many bytes on another thread, so that small requests pass them by."""
        inference, layout, block = pending.inference, pending.layout, pending.block
        if sum(layout.input_sizes) < _LARGE:
            _copy_in(inference, inference.inputs, layout, block)
            return
        with ExitStack() as held:
            own = [held.enter_context(s.detached()) if hasattr(s, "read_into") else s for s in inference.inputs]
            await self.aside(lambda: _copy_in(inference, own, layout, block))

    async def aside(self, work: Callable[[], object]) -> None:
        """Run `work` on a copier thread. It is over when this returns or raises, even when the caller is cancelled."""
        self._copying += 1
        try:
            running = asyncio.get_running_loop().run_in_executor(self._copiers, work)
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError:
                while not running.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([running])
                raise
        finally:
            self._copying -= 1

    def _send(self, pending: _Pending) -> None:
        """Put a filled request on the ring."""
        link, inference = self._link, pending.inference
        if link is None or self._arena is not pending.arena:  # the engine was lost while the inputs were copied
            raise Refusal(*_LOST, retry_after_s=1.0)
        deadline = inference.arrival_ns + inference.timeout_ns if inference.timeout_ns else 0
        pending.sent_ns = time.monotonic_ns()
        sent = link.calls.push(
            CallKind.INFER,
            inference.deployment.slot,
            pending.id,
            inference.batch,
            pending.offset,
            inference.priority,
            pending.sent_ns,  # what came before was the front end's time, not queueing
            deadline,
        )
        if not sent:
            raise Refusal(Reason.OVERLOADED, "The engine's queue is full.", retry_after_s=1.0)
        link.call_bell.ring()
        self._awake.called(pending.sent_ns)
        if deadline:
            wait_s = max(0, deadline - pending.sent_ns) / _NS
            pending.timer = asyncio.get_running_loop().call_later(wait_s, self._expire, pending.id)
        self._pending[pending.id] = pending

    # --- answers

    def take_answer(self, fields: tuple[int, ...]) -> None:
        """An answer from the ring."""
        pending = self._pending.pop(fields[0], None)
        if pending is None:
            self.dropped_answers += 1
            return
        if pending.abandoned:
            self.release(pending)
        elif pending.future.done():  # its task was cancelled in this very turn of the loop
            pending.abandoned = True
            self.release(pending)
        else:
            pending.future.set_result(Answer._make(fields))

    def _settle(self, pending: _Pending, answer: Answer) -> Result:
        tenant = pending.inference.tenant
        latency = time.monotonic_ns() - pending.inference.arrival_ns
        if answer.outcome == Outcome.DONE:
            service = answer.copy_in_ns + answer.execute_ns + answer.copy_out_ns
            tenant.served(service, answer.batch)
            tenant.measures.record(
                latency,
                answer.queue_ns,
                answer.copy_in_ns,
                answer.execute_ns,
                answer.copy_out_ns,
                items=max(1, pending.inference.batch),
                batch=answer.batch,
                first=answer.first,
            )
            tenant.measures.last_inference_ms = int(time.time() * 1000)
            return Result(self, pending, answer)
        reason, message = _REFUSALS[Outcome(answer.outcome)]
        if answer.outcome == Outcome.FAILED:
            message = self._error(pending)
        tenant.measures.refuse(reason.label, owed=reason is not Reason.CANCELLED, latency_ns=latency)
        self.release(pending)
        raise Refusal(reason, message)

    def _error(self, pending: _Pending) -> str:
        start = pending.layout.error
        size = int.from_bytes(pending.block[start : start + 4], "little")
        return bytes(pending.block[start + 4 : start + 4 + size]).decode(errors="replace")

    def release(self, pending: _Pending) -> None:
        """Give back what a request holds. The engine has answered for it, or is gone."""
        if pending.reserved == 0:
            return
        inference = pending.inference
        inference.tenant.outstanding -= 1
        inference.tenant.held_bytes -= pending.reserved
        inference.deployment.outstanding -= 1
        pending.reserved = 0
        pending.block.release()
        pending.arena.free(pending.offset)

    def _abandon(self, pending: _Pending) -> None:
        """Nobody waits any more: ask the engine to drop it; its block is freed when the engine has answered."""
        if pending.future.done() and not pending.future.cancelled():
            self.release(pending)  # the answer was there already
            return
        pending.abandoned = True
        self._cancel(pending.id)

    def _cancel(self, call_id: int) -> None:
        if self._link is not None and self._link.calls.push(CallKind.CANCEL, 0, call_id, 0, 0, 0, 0, 0):
            self._link.call_bell.ring()

    def _expire(self, call_id: int) -> None:
        pending = self._pending.get(call_id)
        if pending is not None and not pending.future.done():
            pending.abandoned = True
            pending.future.set_exception(Refusal(*_REFUSALS[Outcome.EXPIRED]))
            self._cancel(call_id)

    def close(self) -> None:
        self._copiers.shutdown(wait=False)

    def lose(self) -> None:
        """The engine is gone: every request that was in it gets a clear error."""
        self._link = None
        self._arena = None
        lost = list(self._pending.values())
        self._pending.clear()
        for pending in lost:
            self.release(pending)
            if not pending.future.done():
                pending.future.set_exception(Refusal(*_LOST, retry_after_s=1.0))


_LOST = (Reason.ENGINE_LOST, "The engine stopped while it had this request; it is being started again.")
_REFUSALS = {
    Outcome.FAILED: (Reason.FAILED, "The model failed."),
    Outcome.EXPIRED: (Reason.EXPIRED, "The request's deadline passed before its result was there."),
    Outcome.CANCELLED: (Reason.CANCELLED, "The request was cancelled."),
    Outcome.UNLOADED: (Reason.NOT_READY, "The model was unloaded before the request could run."),
}


def _copy_in(inference: Inference, inputs: Sequence[Any], layout: BlockLayout, block: memoryview) -> None:
    """Touches nothing but its arguments: it may run on any thread."""
    finite = inference.tenant.config.finite_inputs
    for index, source in enumerate(inputs):
        start = layout.inputs[index]
        target = block[start : start + layout.input_sizes[index]]
        if hasattr(source, "read_into"):
            source.read_into(target)
        elif len(target) < _LARGE:
            target[:] = source
        else:  # NumPy lets go of the interpreter while it copies
            np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
        if finite:
            _check_finite(target, inference, index)


def _check_finite(target: memoryview, inference: Inference, index: int) -> None:
    tensor = inference.deployment.signature.inputs[index]
    datatype = DATATYPES[tensor.datatype]
    if not datatype.floating:
        return
    values = np.frombuffer(target, datatype.numpy)
    if tensor.datatype == "BF16":
        values = bf16_to_float(values)
    if not np.isfinite(values).all():
        raise Refusal(
            Reason.INVALID, f"Input {tensor.name!r} holds NaN or infinity, and this model takes finite values only."
        )
