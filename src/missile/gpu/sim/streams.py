"""Streams, events and graphs of the simulated GPU."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from missile.errors import MisuseError
from missile.gpu.interface import Copy, Event, Fill, Graph, HostBuffer, Latch, Launch, Priority, SmPartition
from missile.gpu.sim.copies import CopyEngine, PendingCopy
from missile.gpu.sim.cost import KernelCost, part_of
from missile.gpu.sim.latches import Await, Raise, own_latch
from missile.gpu.sim.memory import Backing, SimHostBuffer
from missile.gpu.sim.preempt import LEAVING_NS, SimPreemptControl

if TYPE_CHECKING:
    from missile.gpu.sim.engine import Engine

__all__ = ["PreparedKernel", "SimEvent", "SimGraph", "SimStream"]


class PreparedKernel:
    """A kernel ready to run: its cost, its name and tenant for faults, and what it does to memory (if simulated).

    early: it may be launched while the kernel before it in its graph runs.
    """

    __slots__ = ("code", "cost", "early", "effect", "name", "preempt", "tenant")

    def __init__(
        self,
        cost: KernelCost,
        name: str,
        tenant: str,
        effect: Callable[[], None] | None,
        preempt: tuple[SimPreemptControl, int] | None = None,
        early: bool = False,
    ) -> None:
        self.early = early
        self.code = (tenant, name)
        self.preempt = preempt  # and its step
        self.cost = cost
        self.name = name
        self.tenant = tenant
        self.effect = effect


class _Mark:
    """One recording of an event: reached once."""

    __slots__ = ("time", "waiters")

    def __init__(self) -> None:
        self.time = math.inf
        self.waiters: list[Callable[[float], None]] = []

    def reach(self, now: float) -> None:
        self.time = now
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter(now)


class SimEvent:
    """An event; `Gpu.create_event` makes it."""

    def __init__(self, engine: Engine, timing: bool) -> None:
        self._engine = engine
        self._timing = timing
        self._mark: _Mark | None = None

    @property
    def mark(self) -> _Mark | None:
        """The last recording."""
        return self._mark

    @property
    def reached(self) -> bool:
        """As `done`, without the cost of a query."""
        return self._mark is None or self._mark.time < math.inf

    def recorded(self) -> _Mark:
        self._mark = _Mark()
        return self._mark

    def done(self) -> bool:
        self._engine.spend(self._engine.spec.host.query_ns)
        return self.reached

    def time_ns(self) -> int:
        if not self._timing:
            raise MisuseError("The event was created without timing; it has no time.")
        if self._mark is None or self._mark.time == math.inf:
            raise MisuseError("The event was not reached yet (or never recorded); it has no time.")
        return math.ceil(self._mark.time)

    def synchronize(self) -> None:
        self._engine.run_until(lambda: self.reached)

    def close(self) -> None:
        self._mark = None


class SimGraph:
    """Prepared kernels in order."""

    def __init__(self, kernels: Sequence[PreparedKernel]) -> None:
        self._kernels = tuple(kernels)
        self.closed = False

    @property
    def kernels(self) -> int:
        return len(self._kernels)

    @property
    def prepared(self) -> tuple[PreparedKernel, ...]:
        if self.closed:
            raise MisuseError("The graph was closed.")
        return self._kernels

    def close(self) -> None:
        self.closed = True


class _Step(Protocol):
    """Something in a stream's queue. `begin` gives True when it is done at once, else `stream.complete` follows."""

    def begin(self, stream: SimStream, now: float) -> bool: ...


class _Record:
    __slots__ = ("_mark",)

    def __init__(self, mark: _Mark) -> None:
        self._mark = mark

    def begin(self, stream: SimStream, now: float) -> bool:
        stream.engine.timeline.changes += 1
        self._mark.reach(now)
        return True


class _Wait:
    __slots__ = ("_mark",)

    def __init__(self, mark: _Mark) -> None:
        self._mark = mark

    def begin(self, stream: SimStream, now: float) -> bool:
        if self._mark.time < math.inf:
            return True
        self._mark.waiters.append(stream.complete)
        return False


class _Call:
    """Something that the GPU's front end does in a stream's order, at once."""

    __slots__ = ("_action",)

    def __init__(self, action: Callable[[float], None]) -> None:
        self._action = action

    def begin(self, stream: SimStream, now: float) -> bool:
        self._action(now)
        return True


class _Transfer:
    __slots__ = ("copy",)

    def __init__(self, copy: PendingCopy) -> None:
        self.copy = copy

    def begin(self, stream: SimStream, now: float) -> bool:
        if not self.copy.submitted:
            stream.submit_copies(self.copy.engine, now)
        if self.copy.done:
            return True
        self.copy.finish = stream.complete
        return False


class _Kernels:
    """Kernels one after another: a graph, or one launch."""

    __slots__ = ("_at", "_gap", "_kernels", "_stream", "_turn")

    def __init__(self, kernels: Sequence[PreparedKernel]) -> None:
        self._kernels = kernels
        self._at = 0
        self._gap = 0.0
        self._turn: int | None = None  # of the kernel that is next, where it is queued before the current one has ended

    def begin(self, stream: SimStream, now: float) -> bool:
        if not self._kernels:
            return True
        self._stream = stream
        if stream.kernels_free_at > now:
            stream.engine.timeline.at(stream.kernels_free_at, self._start)
        else:
            self._start(now)
        return False

    def _start(self, now: float) -> None:
        stream = self._stream
        engine = stream.engine
        kernel = self._kernels[self._at]
        cost = kernel.cost
        if kernel.preempt is not None:
            control, step = kernel.preempt
            share = control.share(step)
            if not share:
                engine.timeline.at(now + self._gap + LEAVING_NS, self._ended)
                return
            if share < 1.0:
                cost = part_of(cost, share)
        running = engine.compute.start(
            now,
            cost,
            stream.parts,
            priority=stream.level,
            gap=self._gap + engine.fetch_ns(kernel),
            noise=engine.kernel_noise() * engine.paces.get(kernel.tenant, 1.0),
            turn=self._turn,
        )
        running.finish = self._ended
        following = self._at + 1
        early = following < len(self._kernels) and self._kernels[following].early
        self._turn = engine.compute.take_turn() if early else None
        if kernel.preempt is not None:
            control.started(running, step)

    def _ended(self, now: float) -> None:
        kernel = self._kernels[self._at]
        stream = self._stream
        engine = stream.engine
        engine.kernel_ended(kernel)
        if kernel.preempt is not None:
            kernel.preempt[0].ended()
        self._at += 1
        sharing = engine.spec.sharing
        crowd = engine.compute.launch_load(sharing.graph_gap_ns)
        if self._at == len(self._kernels):
            stream.kernels_free_at = now + sharing.stream_gap_ns + sharing.frontend_ns * crowd
            stream.complete(now)
            return
        following = self._kernels[self._at]
        gap = sharing.graph_gap_ns + sharing.frontend_ns * crowd
        if following.early:
            gap *= sharing.overlapped_gap_ns / sharing.graph_gap_ns
        gap *= engine.paces.get(following.tenant, 1.0)
        if engine.compute.contended and not following.early:
            # Others get the room of this kernel while the next one is on its way.
            self._gap = 0.0
            engine.timeline.at(now + gap, self._start)
        else:
            self._gap = gap
            self._start(now)


class SimStream:
    """An in-order queue. `parts`: indices of the SM parts that its kernels may use."""

    def __init__(
        self, engine: Engine, handle: int, priority: Priority, partition: SmPartition | None, parts: tuple[int, ...]
    ) -> None:
        self.engine = engine
        self.parts = parts
        self.level = int(priority)
        self.kernels_free_at = 0.0  # when the front end can start this stream's next launch
        self._ended: tuple[object, float] = (
            None,
            -math.inf,
        )  # where this stream's last kernels or copy ran, and until when
        self.closed = False
        self._handle = handle
        self._priority = priority
        self._partition = partition
        self._queue: deque[tuple[float, _Step]] = deque()
        self._busy = False

    @property
    def priority(self) -> Priority:
        return self._priority

    @property
    def partition(self) -> SmPartition | None:
        return self._partition

    @property
    def handle(self) -> int:
        return self._handle

    @property
    def empty(self) -> bool:
        """As `idle`, without the cost of a query."""
        return not self._queue

    # --- enqueue
    def launch(self, operation: Launch | Fill | Copy) -> None:
        self._push(_Kernels((self.engine.prepare(operation),)), self.engine.spec.host.launch_ns)

    def launch_graph(self, graph: Graph) -> None:
        if not isinstance(graph, SimGraph):
            raise MisuseError("The graph belongs to another GPU.")
        self._push(_Kernels(graph.prepared), self.engine.spec.host.graph_ns)

    def copy_to_device(self, target: int, source: HostBuffer, *, offset: int = 0, nbytes: int | None = None) -> None:
        engine = self.engine
        contents, size = _window(source, offset, nbytes)
        engine.memory.check(target, size)
        engine.count_copy("h2d")
        self._push_copy(engine.h2d, size, lambda: engine.memory.write(target, contents, offset, size))

    def copy_to_host(self, target: HostBuffer, source: int, *, offset: int = 0, nbytes: int | None = None) -> None:
        engine = self.engine
        contents, size = _window(target, offset, nbytes)
        engine.memory.check(source, size)
        engine.count_copy("d2h")
        self._push_copy(engine.d2h, size, lambda: engine.memory.read(contents, offset, source, size))

    def record(self, event: Event) -> None:
        if not isinstance(event, SimEvent):
            raise MisuseError("The event belongs to another GPU.")
        self._check_open()
        self._push(_Record(event.recorded()), self.engine.spec.host.record_ns)

    def wait(self, event: Event) -> None:
        if not isinstance(event, SimEvent):
            raise MisuseError("The event belongs to another GPU.")
        if event.mark is not None:
            self._push(_Wait(event.mark), self.engine.spec.host.record_ns)

    def raise_latch(self, latch: Latch, value: int) -> None:
        self._push(Raise(own_latch(latch), value), self.engine.spec.host.record_ns)

    def wait_latch(self, latch: Latch, value: int) -> None:
        self._push(Await(own_latch(latch), value), self.engine.spec.host.record_ns)

    def call(self, action: Callable[[float], None]) -> None:
        """Let the GPU do `action` when all that was enqueued before is done."""
        self._push(_Call(action), self.engine.spec.host.record_ns)

    # --- state
    def idle(self) -> bool:
        self.engine.spend(self.engine.spec.host.query_ns)
        return self.empty

    def synchronize(self) -> None:
        self.engine.run_until(lambda: self.empty)

    def close(self) -> None:
        """Work that was given to it still runs."""
        self.closed = True

    # --- the GPU's side
    def complete(self, now: float) -> None:
        """The head of the queue is done."""
        _, step = self._queue.popleft()
        if isinstance(step, _Kernels):
            self._ended = (self.engine.compute, now)
        elif isinstance(step, _Transfer):
            self._ended = (step.copy.engine, now)
        self._busy = False
        self._pump(now)

    def submit_copies(self, engine: CopyEngine, now: float) -> None:
        """Give the copy engine the copies at the head of the queue: it orders copies by issue, not by readiness."""
        for _, step in self._queue:
            if isinstance(step, _Transfer) and step.copy.engine is engine:
                if not step.copy.submitted:
                    where, until = self._ended
                    if where is not engine:
                        link = self.engine.spec.link
                        switch = link.switch_ns if self.engine.compute.idle else link.busy_switch_ns
                        step.copy.ready = max(step.copy.ready, until + switch)
                    engine.submit(step.copy, now)
            elif not isinstance(step, _Record | Raise):
                break

    def _push_copy(self, copy_engine: CopyEngine, nbytes: int, move: Callable[[], None]) -> None:
        self._check_open()
        engine = self.engine
        ready = engine.timeline.host + engine.spec.host.copy_ns + engine.spec.link.latency_ns
        self._push(_Transfer(PendingCopy(copy_engine, nbytes, ready, move)), engine.spec.host.copy_ns)
        first = self._queue[0][1]
        if isinstance(first, _Record | Raise | _Transfer):
            self.submit_copies(copy_engine, engine.timeline.host)

    def _check_open(self) -> None:
        if self.closed:
            raise MisuseError("The stream was closed.")

    def _push(self, step: _Step, cost_ns: float) -> None:
        self._check_open()
        self.engine.spend(cost_ns)
        due = self.engine.timeline.host + self.engine.spec.host.latency_ns
        self._queue.append((due, step))
        if len(self._queue) == 1:
            self.engine.timeline.at(due, self._pump)

    def _pump(self, now: float) -> None:
        queue = self._queue
        while queue and not self._busy:
            due, step = queue[0]
            if due > now:
                self.engine.timeline.at(due, self._pump)
                return
            if step.begin(self, now):
                queue.popleft()
            else:
                self._busy = True
        if not queue:
            self.engine.timeline.changes += 1


def _window(buffer: HostBuffer, offset: int, nbytes: int | None) -> tuple[Backing, int]:
    """The contents of a host buffer and how many bytes of them are meant. MisuseError when they are not all inside."""
    if not isinstance(buffer, SimHostBuffer):
        raise MisuseError("The host buffer is not pinned memory of this GPU.")
    size = buffer.nbytes - offset if nbytes is None else nbytes
    if offset < 0 or size < 0 or offset + size > buffer.nbytes:
        raise MisuseError(f"The host buffer has {buffer.nbytes} bytes; offset {offset} and {size} bytes go beyond it.")
    return buffer.contents, size
