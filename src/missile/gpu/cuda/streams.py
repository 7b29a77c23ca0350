"""Streams and events of the CUDA driver, and the memory of what each stream has not finished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from missile.errors import MisuseError
from missile.gpu.cuda.buffers import CudaHostBuffer
from missile.gpu.cuda.clock import EventClock
from missile.gpu.cuda.driver import Driver
from missile.gpu.cuda.graphs import CudaGraph
from missile.gpu.cuda.modules import CudaKernel
from missile.gpu.interface import Copy, Event, Fill, Graph, HostBuffer, Latch, Launch, Priority, SmPartition

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CudaEvent", "CudaStream"]


class CudaEvent:
    """A CUevent that remembers which stream it was recorded on, and how far that stream was."""

    def __init__(
        self, cu: Driver, clock: EventClock, *, timing: bool, on_close: Callable[[object], None] = lambda _: None
    ) -> None:
        flags = cu.api.CUevent_flags
        self._cu = cu
        self._on_close = on_close
        self._query = cu.api.cuEventQuery
        self._not_ready = cu.api.CUresult.CUDA_ERROR_NOT_READY
        self._clock = clock
        self._timing = timing
        self._stream: CudaStream | None = None
        self._mark = 0
        self._pending = False
        self.handle = cu("cuEventCreate", flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING)

    def recorded(self, stream: CudaStream, mark: int) -> None:
        self._stream, self._mark, self._pending = stream, mark, True

    def done(self) -> bool:
        if not self._pending:
            return True
        self._cu.enter("cuEventQuery")
        (status,) = self._query(self.handle)
        if status == self._not_ready:
            return False
        if status:
            raise self._cu.failure("cuEventQuery", status)
        self._finish()
        return True

    def time_ns(self) -> int:
        if not self._timing:
            raise MisuseError("This event was created without timing, so it has no time.")
        if self._stream is None:
            raise MisuseError("This event was never recorded, so it has no time.")
        if not self.done():
            raise MisuseError("This event has not been reached yet, so it has no time.")
        return self._clock.host_ns(self.handle)

    def synchronize(self) -> None:
        if self._pending:
            self._cu("cuEventSynchronize", self.handle)
            self._finish()

    def close(self) -> None:
        if self.handle is not None:
            handle, self.handle, self._pending = self.handle, None, False
            self._on_close(self)
            self._cu.release("cuEventDestroy", handle)

    def _finish(self) -> None:
        self._pending = False
        if self._stream is not None:
            self._stream.finished(self._mark)


class CudaStream:
    """A CUstream on the whole GPU or on one partition. Create it with `CudaGpu.create_stream`."""

    def __init__(
        self,
        cu: Driver,
        native: Any,
        priority: Priority,
        partition: SmPartition | None,
        on_close: Callable[[CudaStream], None],
    ) -> None:
        self._cu = cu
        self._native = native
        self._priority = priority
        self._partition = partition
        self._on_close = on_close
        self._launched = 0
        self._behind_kernel = False  # what it was given last is a launch, which a dependent one can overlap with
        self._unfinished: dict[str, int] = {}  # tenant -> number of its last launch here

    @property
    def priority(self) -> Priority:
        return self._priority

    @property
    def partition(self) -> SmPartition | None:
        return self._partition

    @property
    def handle(self) -> int:
        return int(self._native)

    @property
    def launched(self) -> int:
        """How many launches (of kernels and graphs) this stream was given so far."""
        return self._launched

    # --- enqueue
    def launch(self, operation: Launch | Fill | Copy) -> None:
        if isinstance(operation, Launch):
            kernel = operation.kernel
            assert isinstance(kernel, CudaKernel)
            kernel.launch(self._native, operation, early=operation.overlaps and self._behind_kernel)
            self._launched += 1
            self._unfinished[kernel.tenant] = self._launched
            self._behind_kernel = True
            return
        self._behind_kernel = False
        if isinstance(operation, Fill):
            self._cu("cuMemsetD8Async", operation.address, operation.value, operation.nbytes, self._native)
        else:
            self._cu("cuMemcpyDtoDAsync", operation.target, operation.source, operation.nbytes, self._native)

    def launch_graph(self, graph: Graph) -> None:
        assert isinstance(graph, CudaGraph)
        self._behind_kernel = False
        graph.launch(self._native, self._partition)
        self._launched += 1
        for tenant in graph.tenants:
            self._unfinished[tenant] = self._launched

    def copy_to_device(self, target: int, source: HostBuffer, *, offset: int = 0, nbytes: int | None = None) -> None:
        self._behind_kernel = False
        address, size = _window(source, offset, nbytes)
        self._cu("cuMemcpyHtoDAsync", target, address, size, self._native)

    def copy_to_host(self, target: HostBuffer, source: int, *, offset: int = 0, nbytes: int | None = None) -> None:
        self._behind_kernel = False
        address, size = _window(target, offset, nbytes)
        self._cu("cuMemcpyDtoHAsync", address, source, size, self._native)

    def record(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._behind_kernel = False
        self._cu("cuEventRecord", event.handle, self._native)
        event.recorded(self, self._launched)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._behind_kernel = False
        self._cu("cuStreamWaitEvent", self._native, event.handle, 0)

    def raise_latch(self, latch: Latch, value: int) -> None:
        self._behind_kernel = False
        self._cu("cuStreamWriteValue32", self._native, latch.address, value, 0)

    def wait_latch(self, latch: Latch, value: int) -> None:
        self._behind_kernel = False
        at_least = self._cu.api.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        self._cu("cuStreamWaitValue32", self._native, latch.address, value, int(at_least))

    # --- state
    def idle(self) -> bool:
        self._cu.enter("cuStreamQuery")
        (status,) = self._cu.api.cuStreamQuery(self._native)
        if status == self._cu.api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if status:
            raise self._cu.failure("cuStreamQuery", status)
        self.finished(self._launched)
        return True

    def synchronize(self) -> None:
        self._cu("cuStreamSynchronize", self._native)
        self.finished(self._launched)

    def close(self) -> None:
        if self._native is not None:
            native, self._native = self._native, None
            self._unfinished.clear()
            self._on_close(self)
            self._cu.release("cuStreamDestroy", native)

    def finished(self, mark: int) -> None:
        """Everything up to launch number `mark` has finished (called by events)."""
        if self._unfinished:
            self._unfinished = {tenant: last for tenant, last in self._unfinished.items() if last > mark}

    def unfinished_tenants(self) -> tuple[str, ...]:
        """Tenants whose kernels, as far as is known, have not finished here."""
        return tuple(self._unfinished)


def _window(buffer: HostBuffer, offset: int, nbytes: int | None) -> tuple[int, int]:
    assert isinstance(buffer, CudaHostBuffer)
    size = buffer.nbytes - offset if nbytes is None else nbytes
    if offset < 0 or size < 0 or offset + size > buffer.nbytes:
        raise MisuseError(f"Copy of {size} bytes from offset {offset} leaves the host buffer of {buffer.nbytes} bytes.")
    return buffer.address + offset, size
