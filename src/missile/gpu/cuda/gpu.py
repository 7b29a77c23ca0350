"""`Gpu` on NVIDIA hardware: opens the device and makes the objects of its neighbours."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError, OutOfMemoryError, UnsupportedError
from missile.gpu.calls import DriverCalls
from missile.gpu.cuda import info as device_info
from missile.gpu.cuda import partitions
from missile.gpu.cuda.buffers import CudaBuffer, CudaHostBuffer, CudaPage, CudaRange, near
from missile.gpu.cuda.calls import driver_calls
from missile.gpu.cuda.clock import EventClock
from missile.gpu.cuda.driver import Driver, load
from missile.gpu.cuda.graphs import CudaGraph
from missile.gpu.cuda.lab import MemoryLab
from missile.gpu.cuda.latches import CudaLatch
from missile.gpu.cuda.modules import CudaModule
from missile.gpu.cuda.preempt import CONTROL_BYTES, CudaPreemptControl
from missile.gpu.cuda.streams import CudaEvent, CudaStream
from missile.gpu.interface import (
    ContentionResult,
    Copy,
    Event,
    Fill,
    GpuInfo,
    Launch,
    Level,
    Priority,
    SmPartition,
    SmSplit,
    Traffic,
)
from missile.gpu.memory import Ledger

__all__ = ["CudaGpu"]

_SLEEP_ABOVE_NS = 500_000  # a shorter wait is spun: the host's scheduler would oversleep it
_WAKE_EARLY_NS = 200_000


class _Closable(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T", bound=_Closable)


class CudaGpu:
    """GPU number `ordinal`, opened in its primary context (the one that PyTorch uses too).

    `ledger` says which tenant has how many bytes of device memory (buffers and pages).
    UnsupportedError when there is no such GPU, no driver or no bindings.
    """

    def __init__(self, ordinal: int = 0) -> None:
        api = load()
        self._cu = cu = Driver(api, self._suspects)
        count = cu("cuDeviceGetCount")
        if ordinal >= count:
            raise UnsupportedError(f"There is no GPU cuda:{ordinal}: this machine has {count}.")
        self._device = cu("cuDeviceGet", ordinal)
        self._streams: dict[int, CudaStream] = {}
        self._owned: dict[int, Callable[[], None]] = {}
        self._graphs: weakref.WeakSet[CudaGraph] = weakref.WeakSet()  # that may have executables for the split
        self._split: SmSplit | None = None
        self._lab: MemoryLab | None = None
        self._closed = False
        self.ledger = Ledger()
        self._context = cu("cuDevicePrimaryCtxRetain", self._device)
        try:
            cu.context = self._context
            cu.enter("cuCtxSetCurrent")
            self._info, self._sm_limits = device_info.describe(cu, self._device, ordinal)
            attribute = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            self._shared_limit = int(cu("cuDeviceGetAttribute", attribute, self._device))
            least, greatest = cu("cuCtxGetStreamPriorityRange")
            self._priorities = {Priority.LOW: least, Priority.HIGH: greatest}
            self._own_stream = self._native_stream(Priority.HIGH, None)
            self._clock = EventClock(cu, self._own_stream)
        except BaseException:
            cu.release("cuDevicePrimaryCtxRelease", self._device)
            raise

    @property
    def info(self) -> GpuInfo:
        return self._info

    # --- time
    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def wait(self, events: Sequence[Event], deadline_ns: int | None = None) -> None:
        if not events and deadline_ns is None:
            raise MisuseError("Waiting for neither an event nor a deadline would never end.")
        now = time.perf_counter_ns
        if not events and deadline_ns is not None:
            if (left := deadline_ns - now()) > _SLEEP_ABOVE_NS:
                time.sleep((left - _WAKE_EARLY_NS) * 1e-9)
            while now() < deadline_ns:
                pass
            self._check()
            return
        while True:
            for event in events:
                if event.done():
                    return
            if deadline_ns is not None and now() >= deadline_ns:
                return

    def synchronize(self) -> None:
        marks = [(stream, stream.launched) for stream in self._streams.values()]
        self._cu("cuCtxSynchronize")
        # Work on green contexts is not the primary context's.
        for stream, mark in marks:
            if stream.partition is not None:
                stream.synchronize()
            else:
                stream.finished(mark)

    def _check(self) -> None:
        """Raise what running work has raised: any query answers with it."""
        (status,) = self._cu.api.cuStreamQuery(self._own_stream)
        if status and status != self._cu.api.CUresult.CUDA_ERROR_NOT_READY:
            raise self._cu.failure("cuStreamQuery", status)
        self._cu.enter("cuStreamQuery")

    def _suspects(self) -> tuple[str, ...]:
        names = dict.fromkeys(name for stream in self._streams.values() for name in stream.unfinished_tenants())
        return tuple(name for name in names if name)

    def driver_calls(self) -> DriverCalls:
        """For `missile.gpu.calls.HasDriverCalls`: copies without Python."""
        return driver_calls(self._cu)

    # --- execution
    def create_stream(self, *, priority: Priority = Priority.LOW, partition: SmPartition | None = None) -> CudaStream:
        if partition is not None:
            self._require_current(partition)
        native = self._native_stream(priority, partition)
        stream = CudaStream(self._cu, native, priority, partition, self._forget)
        self._streams[id(stream)] = stream
        return stream

    def create_event(self, *, timing: bool = True) -> CudaEvent:
        return self._own(CudaEvent(self._cu, self._clock, timing=timing, on_close=self._disown))

    def create_latch(self) -> CudaLatch:
        word = self.allocate(4)
        self._cu("cuMemsetD8", word.address, 0, 4)
        return CudaLatch(word)

    def load_module(self, image: bytes, *, name: str = "") -> CudaModule:
        return self._own(CudaModule(self._cu, image, name, self._shared_limit, self._disown))

    def create_graph(
        self, operations: Sequence[Launch | Fill | Copy], *, within: Sequence[Launch | Fill | Copy] | None = None
    ) -> CudaGraph:
        graph = self._own(CudaGraph(self._cu, operations, self._capture, self._disown))
        self._graphs.add(graph)
        return graph

    def create_preempt_control(self) -> CudaPreemptControl:
        with contextlib.ExitStack() as undo:
            block = self.allocate(CONTROL_BYTES)
            undo.callback(block.free)
            answer = self.allocate_host(CONTROL_BYTES)
            undo.callback(answer.free)
            native = self._native_stream(Priority.HIGH, None)
            undo.callback(self._cu.release, "cuStreamDestroy", native)
            control = CudaPreemptControl(self._cu, native, block, answer, self._disown)
            undo.pop_all()
        return self._own(control)

    def split_sms(self, counts: Sequence[int]) -> SmSplit:
        if self._sm_limits is None:
            raise UnsupportedError(f"{self._info.name} with CUDA driver {self._info.driver} has no SM partitions.")
        if any(stream.partition is not None for stream in self._streams.values()):
            raise MisuseError("The SMs are split already; close the streams of that split before splitting again.")
        partitions.groups_for(counts, self._sm_limits)  # refused before the former split is given up
        self._drop_split()
        self._split = partitions.split(self._cu, self._device, counts, self._sm_limits)
        return self._split

    def _forget(self, stream: CudaStream) -> None:
        self._streams.pop(id(stream), None)

    def _native_stream(self, priority: Priority, partition: SmPartition | None) -> Any:
        flag = self._cu.api.CUstream_flags.CU_STREAM_NON_BLOCKING
        level = self._priorities[priority]
        if partition is None:
            return self._cu("cuStreamCreateWithPriority", flag, level)
        return self._cu("cuGreenCtxStreamCreate", partition.handle.green, flag, level)

    def _capture(self, operations: Sequence[Launch | Fill | Copy], partition: SmPartition | None) -> Any:
        """A CUgraph of `operations`, whose nodes belong to `partition`'s context."""
        if partition is not None:
            self._require_current(partition)
        native = self._native_stream(Priority.LOW, partition)
        stream = CudaStream(self._cu, native, Priority.LOW, partition, lambda _: None)
        try:
            self._cu(
                "cuStreamBeginCapture", native, self._cu.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            )
            try:
                for operation in operations:
                    stream.launch(operation)
            except BaseException:
                # What was captured is given up; the first error is the one to tell.
                _, graph = self._cu.api.cuStreamEndCapture(native)
                if int(graph):
                    self._cu.release("cuGraphDestroy", graph)
                raise
            return self._cu("cuStreamEndCapture", native)
        finally:
            stream.close()

    def _require_current(self, partition: SmPartition) -> None:
        known = () if self._split is None else (*self._split.parts, self._split.remainder)
        if not any(partition is part for part in known):
            raise MisuseError(f"SM partition {partition.index} is not of the GPU's current split.")

    def _drop_split(self) -> None:
        if self._split is not None:
            split, self._split = self._split, None
            for part in (*split.parts, *([split.remainder] if split.remainder else [])):
                for graph in self._graphs:
                    graph.forget(part)
                self._cu.release("cuGreenCtxDestroy", part.handle.green)

    # --- memory
    def allocate(self, nbytes: int, *, tenant: str = "") -> CudaBuffer:
        if nbytes < 1:
            raise MisuseError(f"Can't allocate {nbytes} bytes.")
        try:
            buffer = CudaBuffer(self._cu, nbytes, tenant, self._refund)
        except OutOfMemoryError as error:
            raise self._out_of_memory(nbytes, tenant) from error
        self._charge(buffer, buffer.free)
        return buffer

    def allocate_host(self, nbytes: int, *, tenant: str = "") -> CudaHostBuffer:
        if nbytes < 1:
            raise MisuseError(f"Can't allocate {nbytes} bytes.")
        try:
            with near(self._info.extra["pci_address"]):
                buffer = CudaHostBuffer(self._cu, nbytes, tenant, self._disown)
        except OutOfMemoryError as error:
            who = f"tenant {tenant!r} asked for {nbytes} bytes" if tenant else f"{nbytes} bytes were asked for"
            raise OutOfMemoryError(f"Pinned host memory ran out: {who}.", requested=nbytes, tenant=tenant) from error
        self._owned[id(buffer)] = buffer.free
        return buffer

    def memory_free(self) -> int:
        return int(self._cu("cuMemGetInfo")[0])

    def create_page(self, *, tenant: str = "") -> CudaPage:
        nbytes = self._require_pages()
        prop = device_info.allocation_properties(self._cu, self._device)
        try:
            page = CudaPage(self._cu, nbytes, prop, tenant, self._refund)
        except OutOfMemoryError as error:
            raise self._out_of_memory(nbytes, tenant) from error
        self._charge(page, page.release)
        return page

    def reserve(self, nbytes: int) -> CudaRange:
        page = self._require_pages()
        if nbytes < 1:
            raise MisuseError(f"Can't reserve {nbytes} bytes of addresses.")
        span = CudaRange(self._cu, nbytes, page, device_info.access_description(self._cu, self._device), self._disown)
        self._owned[id(span)] = span.free
        return span

    def _require_pages(self) -> int:
        if not self._info.page_bytes:
            raise UnsupportedError(f"{self._info.name} has no virtual memory management.")
        return self._info.page_bytes

    def _out_of_memory(self, nbytes: int, tenant: str) -> OutOfMemoryError:
        available = self.memory_free()
        who = f"tenant {tenant!r} asked for {nbytes} bytes" if tenant else f"{nbytes} bytes were asked for"
        return OutOfMemoryError(
            f"GPU memory ran out: {who}, {available} are free.",
            requested=nbytes,
            available=available,
            tenant=tenant,
        )

    # --- memory lab
    def sm_ids(self) -> tuple[int, ...]:
        return self._memory_lab().sm_ids()

    def measure_latency(
        self,
        addresses: npt.NDArray[np.int64],
        sms: Sequence[int],
        *,
        loads: int = 4,
        repeats: int = 2,
        concurrent: int | None = None,
    ) -> npt.NDArray[np.float32]:
        return self._memory_lab().latency(addresses, sms, loads, repeats, concurrent)

    def measure_contention(
        self,
        victim: Traffic | None,
        aggressor: Traffic | None = None,
        *,
        repeats: int = 20,
        passes: int = 1,
        mode: Literal["bandwidth", "latency"] = "bandwidth",
    ) -> ContentionResult:
        return self._memory_lab().contention(victim, aggressor, repeats, passes, mode)

    def _memory_lab(self) -> MemoryLab:
        if self._info.level < Level.MEMORY_LAB:
            raise UnsupportedError(f"{self._info.name} offers no memory measurements here.")
        if self._lab is None:
            self._lab = MemoryLab(self, self._cu)
        return self._lab

    # --- ownership
    def _own(self, thing: _T) -> _T:
        self._owned[id(thing)] = thing.close
        return thing

    def _charge(self, thing: CudaBuffer | CudaPage, close: Callable[[], None]) -> None:
        self._owned[id(thing)] = close
        self.ledger.charge(thing.tenant, thing.nbytes)

    def _refund(self, thing: CudaBuffer | CudaPage) -> None:
        self._disown(thing)
        self.ledger.refund(thing.tenant, thing.nbytes)

    def _disown(self, thing: object) -> None:
        self._owned.pop(id(thing), None)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        cu = self._cu
        with contextlib.ExitStack() as last_first:
            last_first.callback(cu.release, "cuDevicePrimaryCtxRelease", self._device)
            last_first.callback(self._drop_split)
            last_first.callback(cu.release, "cuStreamDestroy", self._own_stream)
            last_first.callback(self._clock.close)
            for close in self._owned.values():
                last_first.callback(close)
            for stream in self._streams.values():
                last_first.callback(stream.close)
            if cu.lost is None:
                self.synchronize()

    def __enter__(self) -> CudaGpu:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
