"""Residency "host": weights wait in pinned memory and are copied in when a request comes, under way while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from missile.errors import MissileError, MisuseError, OutOfMemoryError
from missile.gpu.interface import Copy, Event, Fill, Gpu, HostBuffer, Launch, Stream
from missile.pcie.engine import CopyEngine
from missile.pcie.extents import Extents
from missile.pcie.ticket import CopyState, CopyTicket, Span
from missile.pcie.weights import MIB

__all__ = ["HostModel", "Segment", "SwapRun", "Swapper", "WeightSlice", "segments"]

Operation = Launch | Fill | Copy


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Bytes [offset, offset + nbytes) of a model's weight image, first needed by operation number `first`."""

    offset: int
    nbytes: int
    first: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes of the image that are copied as one, before operation number `first` may start."""

    offset: int
    nbytes: int
    first: int


def segments(slices: Sequence[WeightSlice], *, at_least: int = 8 * MIB) -> tuple[Segment, ...]:
    """Slices in order of first use, joined where they are neighbours in the image until a segment has `at_least` bytes.

    Gaps of alignment (under 512 bytes) are copied along. An image laid out in order of first use gives long segments.
    """
    out: list[Segment] = []
    for piece in sorted(slices, key=lambda item: (item.first, item.offset)):
        if out:
            last = out[-1]
            gap = piece.offset - (last.offset + last.nbytes)
            if last.nbytes < at_least and 0 <= gap < 512:
                out[-1] = Segment(last.offset, last.nbytes + gap + piece.nbytes, last.first)
                continue
        out.append(Segment(piece.offset, piece.nbytes, piece.first))
    return tuple(out)


@dataclass(frozen=True, slots=True)
class HostModel:
    """A tenant's model whose weights live on the host.

    image: its weights in pinned memory, owned by the caller. parts: what is copied, in order of first use.
    operations: the plan for weights that start at a given device address; called when that address is new.
    """

    tenant: str
    image: HostBuffer
    nbytes: int
    parts: tuple[Segment, ...]
    operations: Callable[[int], Sequence[Operation]]


@dataclass(slots=True)
class SwapRun:
    """One request's execution. Times in ns on the GPU's clock, -1 while unknown.

    copied_bytes: 0 for a warm start. weights_ns: when the last weights had arrived. finished_ns: when the end was seen.
    """

    tenant: str
    started_ns: int
    copied_bytes: int = 0
    evicted: tuple[str, ...] = ()
    weights_ns: int = -1
    finished_ns: int = -1
    error: MissileError | None = None
    end: Event | None = None

    @property
    def done(self) -> bool:
        return self.finished_ns >= 0

    def slowdown(self, rate: float) -> float:
        """Duration against the ideal of a cold start: its bytes at `rate` bytes/s (the link's, or the tenant's share)."""
        if not (self.done and self.copied_bytes):
            raise MisuseError("Only a finished cold start can be compared with the link.")
        return (self.finished_ns - self.started_ns) * rate / (self.copied_bytes * 1e9)


@dataclass(slots=True)
class _Loaded:
    """A model's place, and its plan there."""

    model: HostModel
    stream: Stream
    base: int = -1
    plan: Sequence[Operation] = ()
    launched: int = 0  # operations of the run that is loading
    loading: SwapRun | None = None


class Swapper:
    """Runs models from host memory within a budget of device memory. Belongs to the engine's thread.

    The owner keeps calling `engine.step` and then `poll`. Each model runs on one stream, its requests one after another.
    """

    def __init__(self, gpu: Gpu, engine: CopyEngine, budget: int) -> None:
        """budget: device bytes for all models together, allocated here and freed by `close`."""
        self._gpu = gpu
        self._engine = engine
        self._extents = Extents(budget)
        self._memory = gpu.allocate(budget, tenant="swap")
        self._models: dict[str, _Loaded] = {}
        self._events: list[Event] = []
        self._queue: deque[SwapRun] = deque()  # not started: no room, or the model is still loading
        self._running: list[SwapRun] = []

    def add(self, model: HostModel, stream: Stream) -> None:
        """Register a tenant's model, to run on `stream`. MisuseError: known, larger than the budget, or a broken plan."""
        if model.tenant in self._models:
            raise MisuseError(f"Tenant {model.tenant!r} already has a model in the swap.")
        if not 0 < model.nbytes <= min(self._extents.capacity, model.image.nbytes):
            raise MisuseError(
                f"Model of tenant {model.tenant!r} has {model.nbytes} bytes of weights; the swap budget is "
                f"{self._extents.capacity} and its host image {model.image.nbytes} bytes."
            )
        for part in model.parts:
            if part.offset < 0 or part.nbytes <= 0 or part.offset + part.nbytes > model.nbytes:
                raise MisuseError(f"A weight segment of tenant {model.tenant!r} lies outside its image: {part}.")
        self._models[model.tenant] = _Loaded(model, stream)

    @property
    def address(self) -> int:
        """Where the budget begins on the device."""
        return self._memory.address

    def resident(self) -> tuple[str, ...]:
        return self._extents.resident()

    def start(self, tenant: str) -> SwapRun:
        """Run the tenant's model once, as soon as there is room for it; earlier requests go first."""
        if tenant not in self._models:
            raise MisuseError(
                f"Tenant {tenant!r} has no model in the swap; known: {', '.join(self._models) or 'none'}."
            )
        run = SwapRun(tenant, self._gpu.now_ns())
        self._queue.append(run)
        self.poll()
        return run

    def poll(self) -> None:
        """See what ended, and start what now can."""
        ended = [run for run in self._running if run.end is not None and run.end.done()]
        for run in ended:
            self._end(run, run.error)
        blocked = False
        waiting: deque[SwapRun] = deque()
        while self._queue:
            run = self._queue.popleft()
            loaded = self._models[run.tenant]
            # A model that is here may pass one that waits for room; two of one tenant never change places.
            if loaded.loading is not None or any(other.tenant == run.tenant for other in waiting):
                waiting.append(run)
            elif run.tenant in self._extents:
                self._extents.acquire(run.tenant)
                self._running.append(run)
                self._launch(loaded, run, len(loaded.plan))
            elif blocked or not self._load(loaded, run):
                blocked = True
                waiting.append(run)
        self._queue = waiting

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._running)

    def events(self) -> list[Event]:
        """Ends of runs, for `Gpu.wait` beside the engine's own."""
        return [run.end for run in self._running if run.end is not None]

    def close(self) -> None:
        """Free the budget. MisuseError while runs are unfinished."""
        if self.busy:
            raise MisuseError("The swap can't be closed while models run; wait for them first.")
        for event in self._events:
            event.close()
        self._events.clear()
        self._memory.free()

    def _load(self, loaded: _Loaded, run: SwapRun) -> bool:
        """Begin a cold start; False when what is in use leaves no room."""
        model = loaded.model
        try:
            placed = self._extents.place(model.tenant, model.nbytes)
        except OutOfMemoryError:
            return False
        self._extents.acquire(model.tenant)
        base = self._memory.address + placed.offset
        if base != loaded.base:
            loaded.plan, loaded.base = model.operations(base), base
        run.evicted = placed.evicted
        loaded.loading, loaded.launched = run, 0
        self._running.append(run)
        if not model.parts:
            self._issued(loaded, run, 0)
        for index, part in enumerate(model.parts):
            ticket = self._engine.to_device(
                model.tenant,
                Span(base, model.nbytes),
                model.image,
                target_offset=part.offset,
                source_offset=part.offset,
                nbytes=part.nbytes,
            )
            run.copied_bytes += part.nbytes

            def issued(ticket: CopyTicket, until: int = index + 1) -> None:
                self._copy_issued(loaded, run, ticket, until)

            ticket.when_issued(issued)
            ticket.add_done_callback(lambda ticket: self._copy_done(run, ticket))
        return True

    def _copy_issued(self, loaded: _Loaded, run: SwapRun, ticket: CopyTicket, parts: int) -> None:
        """The GPU has all of part number `parts` - 1: what needs no later part can be given to it, behind that copy."""
        if run.error is None and not ticket.issued:
            run.error = ticket.error or MisuseError(
                f"The weights of tenant {run.tenant!r} were cancelled on their way."
            )
        self._issued(loaded, run, parts, ticket)

    def _issued(self, loaded: _Loaded, run: SwapRun, parts: int, ticket: CopyTicket | None = None) -> None:
        model = loaded.model
        last = parts >= len(model.parts)
        if run.error is None:
            try:
                if ticket is not None:
                    ticket.gate(loaded.stream)
                self._launch(loaded, run, len(loaded.plan) if last else model.parts[parts].first)
            except MissileError as error:  # this tenant's trouble, not the copy engine's, which is calling us
                run.error = error
        if last:
            loaded.loading = None
            loaded.launched = 0
            if run.error is not None:
                self._end(run, run.error)

    def _launch(self, loaded: _Loaded, run: SwapRun, until: int) -> None:
        """Give the GPU the plan's operations up to number `until`; the run's end when they are all."""
        begin = loaded.launched if loaded.loading is run else 0
        for operation in loaded.plan[begin:until]:
            loaded.stream.launch(operation)
        if loaded.loading is run:
            loaded.launched = max(begin, until)
        if until >= len(loaded.plan):
            run.end = self._events.pop() if self._events else self._gpu.create_event(timing=False)
            loaded.stream.record(run.end)

    def _copy_done(self, run: SwapRun, ticket: CopyTicket) -> None:
        if ticket.state is CopyState.DONE:
            run.weights_ns = max(run.weights_ns, ticket.finished_ns)

    def _end(self, run: SwapRun, error: MissileError | None) -> None:
        self._running.remove(run)
        if run.end is not None:
            self._events.append(run.end)
            run.end = None
        run.error = error
        run.finished_ns = self._gpu.now_ns()
        self._extents.release(run.tenant)
        if error is not None:
            self._extents.drop(run.tenant)
