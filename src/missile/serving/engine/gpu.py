"""The GPU device: compiled packages on streams, LS at high priority or on SMs of its own.

A batch is: inputs into pinned memory, one copy to the device, the model's graph, one copy back, outputs out of pinned
memory. A package is compiled for one batch size; smaller batches run padded. What isolates here is what the policies
`priority` and `partition` isolate: stream priorities, and one static split of the SMs. Colors, elastic SMs and the copy
scheduler are not behind this executor. It has been run on the simulated GPU only.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from missile.compiler.bind import BoundModel, bind
from missile.compiler.library import find_package
from missile.compiler.package import BufferKind, ModelPackage, TensorSpec
from missile.errors import MisuseError, UnsupportedError
from missile.gpu.interface import Event, Gpu, HostBuffer, Level, Priority, SmPartition, Stream
from missile.serving.config import TenantConfig
from missile.serving.engine.executor import Batch, DeviceFacts, Loaded, TenantFacts
from missile.serving.tensors import DATATYPES, ModelSignature, TensorSignature

__all__ = ["GpuExecutor", "copy_tensor", "package_signature", "tensor_view"]

_LOOK_NS = 20_000  # how long a poll may wait for a running batch
_FEW_CHANNELS = 8
_BY_TORCH = {d.torch: d for d in DATATYPES.values()}


@dataclass(slots=True)
class _Model:
    tenant: TenantConfig
    signature: ModelSignature
    bound: BoundModel
    stream: Stream
    sms: int
    inputs: HostBuffer | None
    outputs: HostBuffer | None
    input_views: tuple[npt.NDArray[Any], ...]
    output_views: tuple[npt.NDArray[Any], ...]
    started: Event
    ended: Event
    done: Event
    resources: ExitStack


class GpuExecutor:
    """Owns `gpu`. policy: "priority" or "partition"; ls_share: share of the SMs for all LS tenants under "partition".

    UnsupportedError when the GPU has no such thing.
    """

    def __init__(self, arena: memoryview, gpu: Gpu, *, policy: str, ls_share: float = 0.25) -> None:
        self._arena = np.frombuffer(arena, np.uint8)
        self._gpu = gpu
        self._policy = policy
        self._models: dict[int, _Model] = {}
        self._running: deque[tuple[Batch, _Model]] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._parts: dict[bool, SmPartition | None] = {True: None, False: None}
        if gpu.info.level < Level.PRIORITIES:
            raise UnsupportedError(f"Serving needs stream priorities, which {gpu.info.name} does not have.")
        if policy == "partition":
            self._split(ls_share)

    def _split(self, ls_share: float) -> None:
        info = self._gpu.info
        if info.level < Level.PARTITIONS:
            raise UnsupportedError(f"Policy 'partition' needs SM partitions, which {info.name} does not have.")
        unit = max(info.sm_granularity, 1)
        count = max(info.sm_minimum, round(ls_share * info.sms / unit) * unit)
        split = self._gpu.split_sms([count])
        if split.remainder is None:
            raise MisuseError(f"server.ls_share = {ls_share:g} leaves no SMs for BE tenants.")
        self._parts = {True: split.parts[0], False: split.remainder}

    @property
    def facts(self) -> DeviceFacts:
        info = self._gpu.info
        if self._policy == "partition":
            sides = [part.sms for part in self._parts.values() if part is not None]
            isolation = f"SMs split {sides[0]} (LS) + {sides[1]} (BE); caches, memory and link are shared"
        else:
            isolation = "LS streams have priority; SMs, caches, memory and link are shared"
        return DeviceFacts(info.device, info.name, info.simulated, isolation, sms=info.sms, policy=self._policy)

    @property
    def bell(self) -> int:
        return self._bell

    @property
    def polling(self) -> bool:
        return bool(self._running)

    # --- models

    def prepare(self, tenant: TenantConfig, folder: Path) -> tuple[ModelPackage, Path | None]:
        """The tenant's package, compiled now when there is none yet (minutes; what runs is disturbed meanwhile)."""
        if tenant.model.endswith(".pt2") or tenant.weights or tenant.options or tenant.inputs:
            raise UnsupportedError(
                f"Tenant {tenant.name!r}: .pt2 files, weights, options and inputs of one's own are for the CPU device; on a "
                "GPU, name a zoo model, a package directory or module:factory."
            )
        if tenant.residency == "host":
            raise UnsupportedError(f"Tenant {tenant.name!r}: residency = host is not served yet.")
        if not tenant.batched:
            raise UnsupportedError(f"Tenant {tenant.name!r}: models without a batch axis are for the CPU device.")
        local = folder / tenant.model
        if (local / "package.json").is_file():
            return find_package(str(local), tenant.batch.max, self._gpu.info)
        if ":" in tenant.model and str(folder) not in sys.path:
            sys.path.append(str(folder))
        return find_package(tenant.model, tenant.batch.max, self._gpu.info)

    def install(self, slot: int, tenant: TenantConfig, prepared: tuple[ModelPackage, Path | None]) -> Loaded:
        package, directory = prepared
        if any(buffer.kind is BufferKind.STATE for buffer in package.buffers):
            raise UnsupportedError(f"Tenant {tenant.name!r}: its model keeps state from request to request.")
        signature = package_signature(package)
        latency_sensitive = tenant.tenant_class == "LS"
        gpu, partition = self._gpu, self._parts[latency_sensitive]
        with ExitStack() as undo:
            bound = bind(package, directory, gpu, tenant=tenant.name)
            undo.callback(bound.close)
            priority = Priority.HIGH if latency_sensitive else Priority.LOW
            stream = gpu.create_stream(priority=priority, partition=partition)
            undo.callback(stream.close)
            started, ended, done = gpu.create_event(), gpu.create_event(), gpu.create_event(timing=False)
            for event in (started, ended, done):
                undo.callback(event.close)
            inputs = self._pinned(bound.input_bytes, tenant, undo)
            outputs = self._pinned(bound.output_bytes, tenant, undo)
            model = _Model(
                tenant=tenant,
                signature=signature,
                bound=bound,
                stream=stream,
                sms=partition.sms if partition is not None else gpu.info.sms,
                inputs=inputs,
                outputs=outputs,
                input_views=tuple(
                    tensor_view(inputs, s, _place(bound, s, bound.input_address)) for s in package.inputs
                ),
                output_views=tuple(
                    tensor_view(outputs, s, _place(bound, s, bound.output_address)) for s in package.outputs
                ),
                started=started,
                ended=ended,
                done=done,
                resources=undo.pop_all(),
            )
        try:
            self._enqueue(model)  # the first run instantiates the graph
            model.stream.synchronize()
        except BaseException:
            model.resources.close()
            raise
        self._models[slot] = model
        notes = (f"compiled for a batch of {package.batch}; smaller ones run padded",) if package.batch > 1 else ()
        return Loaded(signature, bound.nbytes, notes)

    def _pinned(self, nbytes: int, tenant: TenantConfig, undo: ExitStack) -> HostBuffer | None:
        if not nbytes:
            return None
        buffer = self._gpu.allocate_host(nbytes, tenant=tenant.name)
        undo.callback(buffer.free)
        buffer.array[:] = 0
        return buffer

    def unload(self, slot: int) -> None:
        model = self._models.pop(slot, None)
        if model is not None:
            model.stream.synchronize()
            model.resources.close()

    def tune(self, slot: int, tenant: TenantConfig) -> None:
        self._models[slot].tenant = tenant

    def tenant_facts(self, slot: int) -> TenantFacts:
        model = self._models[slot]
        return TenantFacts(memory_bytes=model.bound.nbytes, sms_granted=float(model.sms))

    # --- batches

    def free(self, latency_sensitive: bool) -> bool:
        return True

    def start(self, batch: Batch, *, latency_sensitive: bool) -> None:
        model = self._models[batch.slot]
        batch.start_ns = time.monotonic_ns()
        row = 0
        for call, layout in zip(batch.calls, batch.layouts, strict=True):
            for view, offset, size in zip(model.input_views, layout.inputs, layout.input_sizes, strict=True):
                start = call.offset + offset
                rows = view[row : row + call.batch]
                copy_tensor(rows, self._arena[start : start + size].view(view.dtype).reshape(rows.shape))
            row += call.batch
        self._enqueue(model)
        self._running.append((batch, model))

    def _enqueue(self, model: _Model) -> None:
        stream, bound = model.stream, model.bound
        if model.inputs is not None:
            stream.copy_to_device(bound.input_address, model.inputs)
        stream.record(model.started)
        stream.launch_graph(bound.graph)
        stream.record(model.ended)
        if model.outputs is not None:
            stream.copy_to_host(model.outputs, bound.output_address)
        stream.record(model.done)

    def poll(self) -> list[Batch]:
        if not self._running:
            return []
        self._gpu.wait([model.done for _, model in self._running], self._gpu.now_ns() + _LOOK_NS)
        ended = []
        for _ in range(len(self._running)):
            batch, model = self._running.popleft()
            if model.done.done():
                self._finish(batch, model)
                ended.append(batch)
            else:
                self._running.append((batch, model))
        return ended

    def _finish(self, batch: Batch, model: _Model) -> None:
        row = 0
        for call, layout in zip(batch.calls, batch.layouts, strict=True):
            for view, offset, size in zip(model.output_views, layout.outputs, layout.output_sizes, strict=True):
                start = call.offset + offset
                rows = view[row : row + call.batch]
                copy_tensor(self._arena[start : start + size].view(view.dtype).reshape(rows.shape), rows)
            row += call.batch
        batch.end_ns = time.monotonic_ns()
        started, ended = model.started.time_ns(), model.ended.time_ns()
        # Event times are on the host's clock, but only to within its calibration: keep the parts in order.
        batch.execute_ns = min(max(started, batch.start_ns), batch.end_ns)
        batch.executed_ns = min(max(ended, batch.execute_ns), batch.end_ns)

    def close(self) -> None:
        self._gpu.synchronize()
        for slot in list(self._models):
            self.unload(slot)
        self._gpu.close()


def package_signature(package: ModelPackage) -> ModelSignature:
    """What a compiled model takes and gives; the batch is dimension 0. UnsupportedError for types that can't be served."""

    def tensors(specs: tuple[TensorSpec, ...], prefix: str) -> tuple[TensorSignature, ...]:
        found = []
        for index, spec in enumerate(specs):
            datatype = _BY_TORCH.get(spec.dtype.removeprefix("torch."))
            if datatype is None:
                raise UnsupportedError(
                    f"Package {package.name!r}: {spec.name!r} is {spec.dtype}, which can't be served."
                )
            if not spec.shape or spec.shape[0] != package.batch:
                raise UnsupportedError(f"Package {package.name!r}: {spec.name!r} has no batch in dimension 0.")
            found.append(TensorSignature(spec.name or f"{prefix}{index}", datatype.name, spec.shape[1:]))
        return tuple(found)

    return ModelSignature(tensors(package.inputs, "input"), tensors(package.outputs, "output"), package.batch)


def _place(bound: BoundModel, spec: TensorSpec, base: int) -> int:
    return bound.addresses[spec.buffer] + spec.offset - base


def tensor_view(buffer: HostBuffer | None, spec: TensorSpec, offset: int) -> npt.NDArray[Any]:
    """`spec`'s elements in pinned memory that mirrors the device's range, from byte `offset`, with its strides."""
    dtype = _BY_TORCH[spec.dtype.removeprefix("torch.")].numpy
    if buffer is None:
        return np.empty(spec.shape, dtype)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.strides, strict=True))
    flat = buffer.array[offset : offset + extent * dtype.itemsize].view(dtype)
    return np.lib.stride_tricks.as_strided(flat, spec.shape, tuple(stride * dtype.itemsize for stride in spec.strides))


def copy_tensor(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """`target[...] = source`, fast also where one of the two is channels-last (dimension 1 next to each other).

    NumPy would run over few channels in its innermost loop; one channel after another is five times as fast.
    """
    if target.ndim >= 3 and 1 < target.shape[1] <= _FEW_CHANNELS and target.strides != source.strides:
        for channel in range(target.shape[1]):
            target[:, channel] = source[:, channel]
    else:
        target[...] = source
