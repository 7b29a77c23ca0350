"""Preemption on the simulated GPU: the switch, and what launches that look at it do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from missile.errors import MisuseError
from missile.gpu.interface import Left, Stream
from missile.gpu.sim.compute import Running

if TYPE_CHECKING:
    from missile.gpu.sim.engine import Engine

__all__ = ["LEAVING_NS", "SimPreemptControl"]

LEAVING_NS = 1000.0  # a launch whose blocks all leave takes as long as the shortest kernel

_REQUESTS = 1 << 16


class SimPreemptControl:
    """See `PreemptControl`; `Gpu.create_preempt_control` makes it. One of its launches runs at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._flag = False
        self._left: Left | None = None
        self._rest = 0.0  # share of the step that left which is still to run
        self._resume = -1  # the step to resume at; -1: none
        self._issued = 0  # requests that the host has begun
        self._request = 0  # the one that the GPU is at
        self._running: Running | None = None
        self._step = 0
        self.closed = False

    @property
    def address(self) -> int:
        return 0

    # --- the host's side
    def begin(self, stream: Stream) -> int:
        self._issued = (self._issued + 1) % _REQUESTS
        request = self._issued

        def start(_now: float) -> None:
            self._request, self._resume = request, -1

        self._in_order(stream, start)
        return request

    def raise_flag(self) -> None:
        self._write(self._raise)

    def lower_flag(self) -> None:
        self._write(self._lower)

    def left(self) -> Left | None:
        self._engine.check()
        return self._left

    def resume(self, stream: Stream, left: Left) -> None:
        def go_on(_now: float) -> None:
            self._left = None
            self._request, self._resume = left.request, left.step

        self._in_order(stream, go_on)

    def close(self) -> None:
        self.closed = True

    def _in_order(self, stream: Stream, action: Callable[[float], None]) -> None:
        from missile.gpu.sim.streams import SimStream  # it knows launches, which know this

        if not isinstance(stream, SimStream):
            raise MisuseError("The stream belongs to another GPU.")
        stream.call(action)

    def _write(self, action: Callable[[float], None]) -> None:
        engine = self._engine
        engine.spend(engine.spec.host.record_ns)
        engine.timeline.at(engine.timeline.host + engine.spec.host.latency_ns, action)

    # --- the GPU's side
    def _raise(self, now: float) -> None:
        self._flag = True
        running = self._running
        if running is not None and self._left is None:
            rest = self._engine.compute.curtail(now, running)
            if rest:
                self._leave(self._step, rest)

    def _lower(self, _now: float) -> None:
        self._flag = False

    def _leave(self, step: int, rest: float) -> None:
        self._left = Left(self._request, step)
        # Of a resumed step that is stopped again, a part of what was left is left.
        self._rest = rest * (self._rest if step == self._resume and self._rest else 1.0)

    def share(self, step: int) -> float:
        """A launch of `step` is next: which share of its blocks runs. The others leave."""
        if self._left is not None or step < self._resume:
            return 0.0
        if self._flag:
            self._leave(step, 1.0)
            return 0.0
        if step == self._resume and self._rest:
            return self._rest
        return 1.0

    def started(self, running: Running, step: int) -> None:
        self._running, self._step = running, step

    def ended(self) -> None:
        self._running = None
