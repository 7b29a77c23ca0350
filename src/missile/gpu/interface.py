"""What the rest of Missile may ask of a GPU. Two implementations: `gpu/cuda` (the driver) and `gpu/sim` (simulated).

Rules that hold for both:

- Every time is an `int` in nanoseconds on the GPU object's own clock (`Gpu.now_ns`): the host's monotonic clock on
  hardware, the simulated clock on the simulator. Nothing above this seam reads another clock.
- Work given to a stream runs in order; streams run concurrently. Calls that enqueue work never block.
- Objects belong to their creator: `close()`/`free()` is idempotent, and closing the `Gpu` closes what is left.
- Not thread-safe unless a docstring says so: one engine thread owns a `Gpu`.
- Driver errors surface as `missile.errors.GpuError` (see docs/errors.md) from whichever later call meets them.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from missile.gpu.work import KernelWork

__all__ = [
    "Access",
    "AddressRange",
    "ContentionResult",
    "Copy",
    "DeviceBuffer",
    "Event",
    "Fill",
    "Gpu",
    "GpuInfo",
    "Graph",
    "HostBuffer",
    "Kernel",
    "Latch",
    "Launch",
    "Left",
    "Level",
    "Module",
    "PhysicalPage",
    "PreemptControl",
    "Preemption",
    "Priority",
    "SmPartition",
    "SmSplit",
    "Stream",
    "Traffic",
]


class Level(enum.IntEnum):
    """Capability ladder: what an implementation offers beyond running kernels and copies (each includes those below)."""

    CORE = 0  # streams, events, kernels, copies, memory
    PRIORITIES = 1  # more than one stream priority
    PARTITIONS = 2  # SM partitions
    PAGES = 3  # virtual memory management with pages of its own choice
    MEMORY_LAB = 4  # latency and contention measurements at chosen addresses and SMs


class Priority(enum.IntEnum):
    """Stream priority; a pending block of a higher one is placed first. Running blocks are never displaced."""

    LOW = 0
    HIGH = 1


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """What was found. Sizes in bytes, rates in bytes/s, as the device reports them (0: it does not say)."""

    name: str
    device: str  # "cuda:0", "sim:h100"
    simulated: bool
    level: Level
    sms: int
    l2_bytes: int
    memory_bytes: int
    page_bytes: int  # granularity of physical pages
    sm_granularity: int  # SM partitions come in multiples of this
    sm_minimum: int
    copy_engines: int
    compute_capability: tuple[int, int]
    clock_hz: float = 0.0
    driver: str = ""
    runtime: str = ""
    uuid: str = ""
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SmPartition:
    """A set of SMs that streams can be bound to. `handle` is the implementation's own; `index` its place in the split."""

    index: int
    sms: int
    handle: Any = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class SmSplit:
    """One disjoint split of all SMs: the parts asked for, in order, and the remainder (None when nothing is left)."""

    parts: tuple[SmPartition, ...]
    remainder: SmPartition | None


class DeviceBuffer(Protocol):
    """A range of device memory. Owned by whoever allocated it."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def free(self) -> None:
        """Give the memory back. Idempotent. The caller has made sure that no work uses it."""


class HostBuffer(Protocol):
    """Pinned host memory, usable as the source or target of asynchronous copies."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The bytes, shape (nbytes,); a view, valid until `free`."""

    def free(self) -> None: ...


class Event(Protocol):
    """A point in a stream's work. Reusable: recording again replaces the former point."""

    def done(self) -> bool:
        """True when the work before the last record has finished (also when it was never recorded). Never blocks."""

    def time_ns(self) -> int:
        """When it was reached, on `Gpu.now_ns`'s clock. Only for events created with timing and done; else MisuseError."""

    def synchronize(self) -> None: ...
    def close(self) -> None: ...


class Latch(Protocol):
    """A number on the GPU, 0 at first, that only grows (below 2^31): streams raise it, and wait until it is high enough.

    Unlike for an event, a stream may wait for what nobody has been asked to do yet: so work can be given to a stream before
    it is known when the copy that it needs will be its turn. Who waits for a value that never comes waits for ever.
    """

    @property
    def address(self) -> int:
        """Of its 32-bit word in device memory; 0 on a simulated GPU."""

    def close(self) -> None: ...


class Kernel(Protocol):
    """An entry point of a loaded module."""

    @property
    def name(self) -> str: ...
    @property
    def registers(self) -> int:
        """Registers per thread (0 where it has no meaning)."""

    def blocks_per_sm(self, threads: int, shared_bytes: int) -> int:
        """How many blocks of this shape fit on one SM at once."""


class Module(Protocol):
    """Loaded device code."""

    def kernel(self, name: str) -> Kernel:
        """The entry point `name`; MisuseError when the module has none of that name (names those it has, if known)."""

    def close(self) -> None: ...


class Left(NamedTuple):
    """Where a preempted model stands: blocks of `step` have left, and so have all of what was launched after it.

    request: what `PreemptControl.begin` had returned for it, modulo 65,536.
    """

    request: int
    step: int


class PreemptControl(Protocol):
    """One model's switch: while its flag is up, blocks of launches that name it (`Launch.preempt`) leave as they start.

    What launches do whose blocks look at the control (docs/design/preemption.md has the protocol, and why it is right):

    - A block that has started for good always ends; only one that starts while the flag is up leaves, and is remembered.
    - Once a block of a step has left, all blocks of what was launched later leave too, until `resume` is reached in stream
      order: the flag may be lowered at any time, and nothing runs before what it depends on.
    - After `resume`, blocks of earlier steps leave (they have run), those of the step resumed run if they had left, those
      of later steps all run. So the same launches, and the same graph, serve to start and to resume.

    Launches of one control run one after another; where their stream changes, the new one waits for the old one.
    """

    @property
    def address(self) -> int:
        """Of the control block in device memory, which rewritten kernels take as an argument; 0 on a simulated GPU."""

    def begin(self, stream: Stream) -> int:
        """In `stream`'s order, before the first launch of every request. Returns the request's number."""

    def raise_flag(self) -> None:
        """Blocks that start from now on leave. Does not wait; takes effect within microseconds, whatever streams hold."""

    def lower_flag(self) -> None:
        """Blocks run again, but for what follows blocks that have left. Does not wait."""

    def left(self) -> Left | None:
        """Where blocks have left since the last `resume`, None where none have. Never blocks.

        Final when all launches have ended; while they run, not None says that the flag has taken hold.
        """

    def resume(self, stream: Stream, left: Left) -> None:
        """In `stream`'s order: what is launched next resumes at `left`, the answer of `left()`, which is None afterwards.

        All launches of this control have ended. Next is launched what holds `left.step`, then all that followed it; steps
        of other requests need their `begin` again.
        """

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Preemption:
    """What a launch's blocks look at when they start. step: its place in the model's plan; what comes later has more."""

    control: PreemptControl
    step: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch.

    params: each argument's bytes, little-endian, at the width the kernel declares, in order.
    work: what it asks of the GPU; the simulator needs it, hardware ignores it.
    preempt: what lets its blocks leave. The simulator obeys it; hardware ignores it, there the kernel's code does it.
    overlaps: it may be launched while the launch right before it in the stream or graph runs: its code waits itself for that
    to end, in every thread, before it touches global memory and before it ends (`compiler.ptx.overlap`). Behind anything
    else but a launch it starts as usual. Simulated GPUs do so in graphs, and with single launches never.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    params: tuple[bytes, ...] = ()
    work: KernelWork | None = None
    preempt: Preemption | None = None
    overlaps: bool = False


@dataclass(frozen=True, slots=True)
class Fill:
    """Set `nbytes` at device `address` to the byte `value`."""

    address: int
    nbytes: int
    value: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """Device-to-device copy of `nbytes`."""

    target: int
    source: int
    nbytes: int


class Graph(Protocol):
    """A fixed sequence of operations that one call starts. Belongs to no stream."""

    @property
    def kernels(self) -> int: ...
    def close(self) -> None: ...


class Stream(Protocol):
    """An in-order queue of work on the GPU, or on one SM partition of it."""

    @property
    def priority(self) -> Priority: ...
    @property
    def partition(self) -> SmPartition | None: ...
    @property
    def handle(self) -> int:
        """The implementation's native handle (a CUstream on hardware), for libraries that take one."""

    def launch(self, operation: Launch | Fill | Copy) -> None: ...
    def launch_graph(self, graph: Graph) -> None: ...
    def copy_to_device(self, target: int, source: HostBuffer, *, offset: int = 0, nbytes: int | None = None) -> None:
        """Asynchronous H2D copy of `source.array[offset:offset+nbytes]` to device address `target`."""

    def copy_to_host(self, target: HostBuffer, source: int, *, offset: int = 0, nbytes: int | None = None) -> None:
        """Asynchronous D2H copy into `target.array[offset:offset+nbytes]`."""

    def record(self, event: Event) -> None: ...
    def wait(self, event: Event) -> None:
        """Later work of this stream starts after `event`'s last record. The host does not wait."""

    def raise_latch(self, latch: Latch, value: int) -> None:
        """Set `latch` to `value` when the work before has ended."""

    def wait_latch(self, latch: Latch, value: int) -> None:
        """Later work of this stream starts when `latch` is at least `value`. The host does not wait."""

    def idle(self) -> bool: ...
    def synchronize(self) -> None: ...
    def close(self) -> None: ...


class PhysicalPage(Protocol):
    """One physical page of `GpuInfo.page_bytes`, mapped nowhere or in one or more ranges."""

    def release(self) -> None: ...


class AddressRange(Protocol):
    """A reserved range of device addresses; pages are mapped into it and it owns the mappings, not the pages."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def map(self, offset: int, pages: Sequence[PhysicalPage]) -> None:
        """Map `pages` one after another from `offset` (a multiple of the page size), readable and writable."""

    def unmap(self, offset: int, nbytes: int) -> None: ...
    def free(self) -> None:
        """Unmap what is mapped and give the addresses back."""


class Access(enum.StrEnum):
    """What contention traffic does to its addresses."""

    READ = "read"
    READ_WRITE = "read_write"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Traffic:
    """A looping reader/writer over chosen memory on chosen SMs.

    addresses: int64, shape (n,): device addresses of 256-byte units, each read or written whole by one warp.
    sms: how many SMs it gets (disjoint from the other traffic's in one measurement), or the exact SM ids.
    """

    addresses: npt.NDArray[np.int64]
    sms: int | tuple[int, ...]
    access: Access = Access.READ


@dataclass(frozen=True, slots=True)
class ContentionResult:
    """victim_ns: duration of each timed pass over the victim's addresses, ns, shape (repeats,).
    victim_bytes_per_s: from the median pass. aggressor_bytes_per_s: while the victim ran (0.0 without one)."""

    victim_ns: npt.NDArray[np.float64]
    victim_bytes_per_s: float
    aggressor_bytes_per_s: float


@runtime_checkable
class Gpu(Protocol):
    """One GPU, opened. Create it with `missile.gpu.open_gpu(device)`; close it, or use it as a context manager."""

    @property
    def info(self) -> GpuInfo: ...

    # --- time
    def now_ns(self) -> int: ...
    def wait(self, events: Sequence[Event], deadline_ns: int | None = None) -> None:
        """Return as soon as at least one event is done or the clock has reached `deadline_ns`, whichever is first.

        With no events, waits for the deadline. Hardware polls (and may spin); the simulator advances its clock.
        Raises what running work has raised. With neither events nor a deadline: MisuseError.
        """

    def synchronize(self) -> None:
        """Wait until all work of all streams has finished."""

    # --- execution
    def create_stream(self, *, priority: Priority = Priority.LOW, partition: SmPartition | None = None) -> Stream: ...
    def create_event(self, *, timing: bool = True) -> Event: ...
    def create_latch(self) -> Latch: ...
    def load_module(self, image: bytes, *, name: str = "") -> Module:
        """Load PTX text or a cubin. `name` appears in errors: "TENANT" or "TENANT/WHAT", of which faults name the tenant."""

    def create_graph(
        self, operations: Sequence[Launch | Fill | Copy], *, within: Sequence[Launch | Fill | Copy] | None = None
    ) -> Graph:
        """A graph that runs `operations` one after another.

        within: the sequence that they are a piece of, if they are; the simulator takes its working set, hardware ignores it.
        """

    def create_preempt_control(self) -> PreemptControl:
        """A control with its flag down and nothing left."""

    def split_sms(self, counts: Sequence[int]) -> SmSplit:
        """Split all SMs once into disjoint partitions of at least `counts` SMs (rounded up to the granularity).

        One split holds at a time for the whole GPU object: two independent splits would overlap, so a second call while
        streams of the first exist is a MisuseError. Counts that don't fit: MisuseError naming what is available.
        """

    # --- memory
    def allocate(self, nbytes: int, *, tenant: str = "") -> DeviceBuffer:
        """Device memory, aligned to at least 512 bytes. Contents undefined. OutOfMemoryError names the tenant."""

    def allocate_host(self, nbytes: int, *, tenant: str = "") -> HostBuffer:
        """Pinned host memory, page-aligned, near the GPU where the host has several NUMA nodes."""

    def memory_free(self) -> int:
        """Free device memory, bytes."""

    def create_page(self, *, tenant: str = "") -> PhysicalPage: ...
    def reserve(self, nbytes: int) -> AddressRange:
        """Reserve device addresses, aligned to the page size. Maps nothing."""

    # --- memory lab (Level.MEMORY_LAB)
    def sm_ids(self) -> tuple[int, ...]:
        """The SM ids that kernels of this process can run on, ascending."""

    def measure_latency(
        self,
        addresses: npt.NDArray[np.int64],
        sms: Sequence[int],
        *,
        loads: int = 4,
        repeats: int = 2,
        concurrent: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Latency of one load past L1 from each SM to each address, in SM clock cycles, shape (len(sms), len(addresses)).

        Each value is the minimum over `repeats` of a chain of `loads` dependent loads, divided by `loads`. Only reads.
        `concurrent`: how many SMs measure at the same time (None: all of `sms`); fewer disturb each other less.
        """

    def measure_contention(
        self,
        victim: Traffic | None,
        aggressor: Traffic | None = None,
        *,
        repeats: int = 20,
        passes: int = 1,
        mode: Literal["bandwidth", "latency"] = "bandwidth",
    ) -> ContentionResult:
        """Time `victim` passing over its addresses `passes` times, `repeats` times, while `aggressor` loops over its own.

        `latency` mode makes each victim warp chase one load at a time. With no victim, `victim_ns` is empty and the
        aggressor's own bandwidth is measured over a fixed time.
        """

    def close(self) -> None: ...
    def __enter__(self) -> Gpu: ...
    def __exit__(self, *exc: object) -> None: ...
