"""What a run needs on the GPU, made before its clock starts: lanes as streams, events, and every graph run once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from missile.errors import GpuError, InternalError
from missile.gpu.interface import Event, Gpu, SmPartition, Stream
from missile.runtime.loading import LoadedTenant, RunnableModel
from missile.runtime.policies.interface import Layout

__all__ = ["Slot", "Stage"]


class Slot(NamedTuple):
    """Events of one request in flight; a later request uses them again."""

    start: Event
    end: Event
    done: Event


class Stage:
    """Streams for a layout's lanes and slots for the tenants' requests. Owns both until `close`; models stay the roster's.

    Tenants and lanes go by number. After an error in construction nothing is held.
    """

    def __init__(self, gpu: Gpu, tenants: Sequence[LoadedTenant], layout: Layout) -> None:
        self._gpu = gpu
        self._tenants = tuple(tenants)
        self._models: tuple[RunnableModel, ...] = tuple(t.model for t in tenants if t.model is not None)
        if len(self._models) != len(self._tenants):
            raise InternalError("A tenant without a model was brought to a run.")
        with ExitStack() as undo:
            self._streams = tuple(_streams(gpu, layout, undo))
            # More than can be in flight: a finished request's times are read after the next one has been started.
            self._slots = tuple(tuple(_slot(gpu, undo) for _ in range(2 * t.depth + 1)) for t in tenants)
            self._resources = undo.pop_all()
        self._lane_of: list[int | None] = [None] * len(self._tenants)

    def enqueue(self, tenant: int, lane: int, request: int) -> tuple[Slot, int]:
        """Give request number `request` of `tenant` to the GPU: input copy, kernels, output copy. Never blocks.

        Returns its slot, and the host's time (ns, the GPU's clock) when its kernels had been launched. Requests of a tenant
        run one after another even when its lane changes: its buffers exist once.
        """
        loaded, model, slots = self._tenants[tenant], self._models[tenant], self._slots[tenant]
        slot, stream = slots[request % len(slots)], self._streams[lane]
        if self._lane_of[tenant] != lane:
            if self._lane_of[tenant] is not None:
                stream.wait(slots[(request - 1) % len(slots)].done)
            self._lane_of[tenant] = lane
        if loaded.inputs:
            stream.copy_to_device(model.input_address, loaded.inputs[request % loaded.depth])
        stream.record(slot.start)
        stream.launch_graph(model.graph)
        launched = self._gpu.now_ns()
        stream.record(slot.end)
        if loaded.outputs:
            stream.copy_to_host(loaded.outputs[request % loaded.depth], model.output_address)
        stream.record(slot.done)
        return slot, launched

    def rehearse(self) -> list[int]:
        """Run every model once in every partition that there is a lane for; instantiates graphs. Blocks.

        Returns each tenant's shortest time from start to end, ns. A GpuError names the tenant.
        """
        lanes: dict[int, int] = {}
        for lane, stream in enumerate(self._streams):
            lanes.setdefault(id(stream.partition), lane)
        lengths = []
        for tenant, loaded in enumerate(self._tenants):
            seen = []
            for lane in lanes.values():
                try:
                    slot, _ = self.enqueue(tenant, lane, 0)
                    self._gpu.synchronize()
                    seen.append(slot.end.time_ns() - slot.start.time_ns())
                except GpuError as error:
                    error.tenant = error.tenant or loaded.tenant.name
                    raise
            lengths.append(max(min(seen), 1))
        self._lane_of = [None] * len(self._tenants)
        return lengths

    def close(self) -> None:
        """Give streams and events back. Idempotent. The caller has made sure that nothing runs on them."""
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
