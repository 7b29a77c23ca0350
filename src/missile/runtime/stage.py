"""What a run needs on the GPU, made before its clock starts: lanes as streams, events, segments, and every graph run once.

Host-device copies of requests are issued in `_copy_in` and `_copy_out` and nowhere else: on the stream of the request's
lane, or, with `copies`, through the link's scheduler in that stream's order. Weights from the host are `Residency`'s matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from missile.errors import GpuError, InternalError
from missile.gpu.interface import Event, Gpu, Graph, Left, SmPartition, Stream
from missile.pcie.streamed import StreamedCopies
from missile.pcie.ticket import Direction
from missile.runtime.loading import LoadedTenant, RunnableModel
from missile.runtime.pieces import MOST_PIECES, Cut, Piece, control_of, make_cut, operations_of, weight_pieces
from missile.runtime.policies.interface import Layout, TenantBrief
from missile.runtime.residency import ColdStart, Residency
from missile.runtime.segments import cut

__all__ = ["MOST_PIECES", "Slot", "Stage"]

_REHEARSALS = 3  # the first ones of a process took up to seven times as long as later ones
_REHEARSAL_LOOK_NS = 50_000
_PATIENCE_NS = 10_000_000_000


class Slot(NamedTuple):
    """Events of one request in flight; a later request uses them again."""

    start: Event
    end: Event
    done: Event


class Stage:
    """Streams for a layout's lanes and slots for the tenants' requests. Owns both until `close`; models stay the roster's.

    Tenants and lanes go by number. `rehearse` comes before everything else; from then on a tenant's requests take turns from
    0, as they are given to the GPU, and turn n uses its host buffers n modulo its depth. After an error in construction
    nothing is held.
    """

    def __init__(
        self, gpu: Gpu, tenants: Sequence[LoadedTenant], layout: Layout, copies: StreamedCopies | None = None
    ) -> None:
        """copies: the tenants' way to the link, the stage's from here on; None: copies go as their streams reach them."""
        self._gpu = gpu
        self._copies = copies
        self._tenants = tuple(tenants)
        self._models: tuple[RunnableModel, ...] = tuple(t.model for t in tenants if t.model is not None)
        if len(self._models) != len(self._tenants):
            raise InternalError("A tenant without a model was brought to a run.")
        self._wanted = layout.segment_ns or (None,) * len(self._tenants)
        with ExitStack() as undo:
            if copies is not None:
                undo.callback(copies.close)
            self._streams = tuple(_streams(gpu, layout, undo))
            # More than can be in flight: a finished request's times are read after the next one has been started.
            self._slots = tuple(tuple(_slot(gpu, undo) for _ in range(2 * t.depth + 1)) for t in tenants)
            names, weights = [t.tenant.name for t in tenants], [t.weights for t in tenants]
            self._residency = Residency(gpu, names, weights, copies)
            undo.callback(self._residency.close)
            self._resources = undo.pop_all()
        self._cuts: list[Cut | None] = [None] * len(self._tenants)
        self._pieces: list[tuple[Piece, ...]] = [()] * len(self._tenants)
        self._operations = tuple(operations_of(model) for model in self._models)
        self._controls = tuple(control_of(operations) for operations in self._operations)
        self._forget()

    def _forget(self) -> None:
        """As if nothing had run: no tenant has been on a lane."""
        count = len(self._tenants)
        self._lane_of: list[int | None] = [None] * count
        self._tail: list[Event | None] = [None] * count  # the end of the last thing that each tenant was given
        self._end: list[Event | None] = [None] * count  # of the kernels of its last whole request
        self._residency.forget()
        self._latest = [-1] * count  # the last request that each tenant was given
        self._turn = [-1] * count  # how many were before it
        self._left: list[Left | None] = [None] * count  # where a stopped tenant goes on

    def enqueue(self, tenant: int, lane: int, request: int) -> tuple[Slot, int]:
        """Give request number `request` of `tenant` to the GPU: input copy, kernels, output copy. Never blocks.

        Returns its slot, and the host's time (ns, the GPU's clock) when its kernels had been launched. Requests of a tenant
        run one after another even when its lane changes: its buffers exist once.
        """
        self._take_turn(tenant, request)
        slot, stream = self._slot_of(tenant), self._streams[lane]
        if self._lane_of[tenant] != lane:
            self._change_lane(tenant, lane)
        self._copy_in(tenant, stream)
        if (control := self._controls[tenant]) is not None:
            control.begin(stream)
        stream.record(slot.start)
        self._residency.bring(tenant, self._tail)
        if self._residency.settled(tenant):
            stream.launch_graph(self._models[tenant].graph)
        else:
            for piece in self._pieces[tenant]:
                self._residency.gate(tenant, stream, piece.until)
                stream.launch_graph(piece.graph)
        launched = self._gpu.now_ns()
        stream.record(slot.end)
        self._copy_out(tenant, stream)
        stream.record(slot.done)
        self._tail[tenant] = slot.done
        self._end[tenant] = slot.end
        return slot, launched

    def advance(
        self, tenant: int, lane: int, request: int, first: int, last: int, after: Sequence[int] = ()
    ) -> tuple[Slot, Event, int]:
        """Give segments [first, last) of the cut tenant's request to the GPU, after what it was given before. Never blocks.

        Returns the request's slot, the event at this piece's end (the slot's `done` where it ends the request), and the
        host's time when its kernels had been launched. A segment may be given again after it was preempted; the input is
        not copied again, since kernels may have worked in place on it. after: tenants whose whole requests, as far as they
        were given, have their kernels end first; a new request's input copy does not wait for them.
        """
        mine = self._cuts[tenant]
        if mine is None:
            raise InternalError(f"Tenant number {tenant} was advanced and is not cut into segments.")
        if fresh := self._latest[tenant] != request:
            self._take_turn(tenant, request)
        slot, stream = self._slot_of(tenant), self._streams[lane]
        if self._lane_of[tenant] != lane:
            self._change_lane(tenant, lane)
        control, left = self._controls[tenant], self._left[tenant]
        if control is not None and left is not None:
            control.resume(stream, left)
            self._left[tenant] = None
        if fresh:
            self._copy_in(tenant, stream)
            if control is not None:
                control.begin(stream)
            self._await(stream, after)
            stream.record(slot.start)
        else:
            self._await(stream, after)
        self._residency.bring(tenant, self._tail)
        for segment, graph in zip(mine.segments[first:last], mine.graphs[first:last], strict=True):
            self._residency.gate(tenant, stream, segment.last)
            stream.launch_graph(graph)
        launched = self._gpu.now_ns()
        if last == len(mine.graphs):
            stream.record(slot.end)
            self._copy_out(tenant, stream)
            mark = slot.done
        else:
            mark = mine.next_mark()
        stream.record(mark)
        self._tail[tenant] = mark
        return slot, mark, launched

    def segments(self, tenant: int) -> int:
        """Into how many segments the tenant's model is cut; 0 where its requests are started whole."""
        mine = self._cuts[tenant]
        return 0 if mine is None else len(mine.segments)

    def preempt(self, tenant: int) -> bool:
        """Make the tenant's blocks leave as they start. False, and nothing done, where its kernels don't look at a flag, or
        wait for its weights.

        `settle` follows when what it has on the GPU has ended; until then it is given nothing. All of that is one request's:
        the next one's input would be copied over that of a request that is not whole.
        """
        control = self._controls[tenant]
        if control is None or self._cuts[tenant] is None:
            return False
        if self._residency.arriving(tenant):
            # It is on no SM. With the flag up it would leave when its weights have come, and others would displace them.
            return False
        control.raise_flag()
        return True

    def settle(self, tenant: int) -> int | None:
        """What the preempted tenant had on the GPU has ended. The first segment that is not whole; None: all are.

        `advance` goes on there.
        """
        control, mine = self._controls[tenant], self._cuts[tenant]
        if control is None or mine is None:
            raise InternalError(f"Tenant number {tenant} was settled and can't be preempted.")
        control.lower_flag()
        left = self._left[tenant] = control.left()
        return None if left is None else mine.segment_of[left.step]

    def cold_starts(self, tenant: int) -> tuple[ColdStart, ...]:
        """Those of the tenant since `rehearse`, as far as they are over."""
        return self._residency.cold_starts(tenant)

    def take_cold_starts(self, tenant: int) -> int:
        """How many of the tenant were over since the last call; for runs without an end, they are not kept."""
        return self._residency.take_cold_starts(tenant)

    def _take_turn(self, tenant: int, request: int) -> None:
        """Slots and host buffers go by turn. By number, which refused requests have too, one in flight could be met."""
        self._latest[tenant] = request
        self._turn[tenant] += 1

    def _slot_of(self, tenant: int) -> Slot:
        """Of the tenant's latest request."""
        slots = self._slots[tenant]
        return slots[self._turn[tenant] % len(slots)]

    def _await(self, stream: Stream, tenants: Sequence[int]) -> None:
        for tenant in tenants:
            if (end := self._end[tenant]) is not None:
                stream.wait(end)

    def _change_lane(self, tenant: int, lane: int) -> None:
        tail = self._tail[tenant]
        if tail is not None:
            self._streams[lane].wait(tail)
        self._lane_of[tenant] = lane

    def _copy_in(self, tenant: int, stream: Stream) -> None:
        loaded = self._tenants[tenant]
        if not loaded.inputs:
            return
        address, source = self._models[tenant].input_address, loaded.inputs[self._turn[tenant] % loaded.depth]
        if self._copies is None:
            stream.copy_to_device(address, source)
        else:
            self._copies.to_device(loaded.tenant.name, stream, address, source, after=self._tail[tenant])

    def _copy_out(self, tenant: int, stream: Stream) -> None:
        loaded = self._tenants[tenant]
        if not loaded.outputs:
            return
        target, address = loaded.outputs[self._turn[tenant] % loaded.depth], self._models[tenant].output_address
        if self._copies is None:
            stream.copy_to_host(target, address)
        else:
            self._copies.to_host(loaded.tenant.name, stream, target, address)

    def wait(self, events: Sequence[Event], deadline_ns: int) -> None:
        """As `Gpu.wait`, with scheduled copies going on; may return early."""
        if self._copies is None:
            self._gpu.wait(events, deadline_ns)
        else:
            self._copies.wait(events, deadline_ns)

    def _wait_for(self, tenant: int, over: Callable[[], bool]) -> None:
        """Until `over` says so and everything else has ended. GpuError when it does not."""
        give_up = self._gpu.now_ns() + _PATIENCE_NS
        while not over():
            if self._gpu.now_ns() >= give_up:
                what = f"Waiting {_PATIENCE_NS // 1_000_000_000} s for a rehearsal"
                raise GpuError(what, "TIMEOUT", tenant=self._tenants[tenant].tenant.name, usable="nothing")
            self.wait([], self._gpu.now_ns() + _REHEARSAL_LOOK_NS)
        self._gpu.synchronize()

    # --- before the clock starts
    def rehearse(self) -> list[TenantBrief]:
        """Cut what the layout wants cut, and run every model in every partition that there is a lane for. Blocks.

        Instantiates all graphs. A GpuError names the tenant.
        """
        briefs = []
        for tenant, loaded in enumerate(self._tenants):
            try:
                briefs.append(self._rehearse(tenant))
            except GpuError as error:
                error.tenant = error.tenant or loaded.tenant.name
                raise
        self._forget()
        return briefs

    def _rehearse(self, tenant: int) -> TenantBrief:
        model, wanted = self._models[tenant], self._wanted[tenant]
        service: dict[int, int] = {}  # by partition
        if (weights := self._tenants[tenant].weights) is not None:
            self._pieces[tenant] = weight_pieces(self._gpu, self._operations[tenant], weights.parts, self._resources)
            self._residency.bring(tenant, self._tail)
            self._wait_for(tenant, lambda: not self._residency.arriving(tenant))
            self._launch_first(tenant, [piece.graph for piece in self._pieces[tenant]])
            slot, _ = self.enqueue(tenant, self._places()[0][1], 0)  # what follows waits for no part of the weights
            self._wait_for(tenant, slot.done.done)
        self._launch_first(tenant, [model.graph])
        for stream, lane in self._places():
            took = []
            for _repeat in range(_REHEARSALS):
                slot, _ = self.enqueue(tenant, lane, 0)
                self._wait_for(tenant, slot.done.done)
                took.append(slot.end.time_ns() - slot.start.time_ns())
            service[id(stream.partition)] = max(min(took), 1)
        by_lane = tuple(float(service[id(stream.partition)]) for stream in self._streams)
        operations = self._operations[tenant]
        segments = cut(operations, min(by_lane), wanted)
        if wanted is not None:
            mine = self._cuts[tenant] = make_cut(self._gpu, model.graph, operations, segments, self._resources)
            self._launch_first(tenant, mine.graphs)
            for _, lane in self._places():
                self._latest[tenant] = -1
                slot, _, _ = self.advance(tenant, lane, 0, 0, len(segments))
                self._wait_for(tenant, slot.done.done)
        return TenantBrief(
            by_lane, segments, self._controls[tenant] is not None, exclusive=self._residency.has_rivals(tenant)
        )

    def _launch_first(self, tenant: int, graphs: Sequence[Graph]) -> None:
        """Run `graphs`, which are the tenant's model together, in every partition, before a latch holds them up there.

        A graph's first launch may make the driver wait for all that the GPU has (to make room for its kernels' stacks, for
        one). If that waited for a copy of which this thread has to look after the rest, it would be for ever.
        """
        loaded = self._tenants[tenant]
        waits = self._copies is not None and any(
            self._copies.schedules(Direction.H2D, buffer.nbytes) for buffer in loaded.inputs
        )
        if not waits and not self._residency.hosts(tenant):
            return
        for stream, _ in self._places():
            if loaded.inputs:
                stream.copy_to_device(self._models[tenant].input_address, loaded.inputs[0])
            if (control := self._controls[tenant]) is not None:
                control.begin(stream)
            for graph in graphs:
                stream.launch_graph(graph)
            self._gpu.synchronize()

    def _places(self) -> list[tuple[Stream, int]]:
        """One lane of each partition, the whole GPU counting as one."""
        lanes = {id(stream.partition): lane for lane, stream in reversed(list(enumerate(self._streams)))}
        return [(self._streams[lane], lane) for lane in sorted(lanes.values())]

    def clear(self) -> None:
        """Leave no control with its flag up or in the middle of a request: the models outlive the stage.

        Nothing that was preempted may be on the GPU. Scheduled copies are let go, wanted or not: streams wait for them.
        """
        if self._copies is not None:
            self._copies.drain(self._gpu.now_ns() + _PATIENCE_NS)
        for tenant, control in enumerate(self._controls):
            lane = self._lane_of[tenant]
            if control is None or lane is None:
                continue
            control.lower_flag()
            left = self._left[tenant] or control.left()
            if left is not None:
                control.resume(self._streams[lane], left)

    def close(self) -> None:
        """Give streams, events and segments back. Idempotent. The caller has made sure that nothing runs on them."""
        self._resources.close()


def _streams(gpu: Gpu, layout: Layout, undo: ExitStack) -> list[Stream]:
    partitions: list[SmPartition | None] = []
    if layout.partitions:
        split = gpu.split_sms(layout.partitions)
        partitions = [*split.parts, split.remainder]
    streams = []
    for lane in layout.lanes:
        partition = None if lane.partition is None else partitions[lane.partition]
        if lane.partition is not None and partition is None:
            raise InternalError(f"Lane {lane.name!r} is on the remainder of an SM split that left none.")
        stream = gpu.create_stream(priority=lane.priority, partition=partition)
        undo.callback(stream.close)
        streams.append(stream)
    return streams


def _slot(gpu: Gpu, undo: ExitStack) -> Slot:
    slot = Slot(gpu.create_event(), gpu.create_event(), gpu.create_event(timing=False))
    for event in slot:
        undo.callback(event.close)
    return slot
