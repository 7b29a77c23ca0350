"""What the parts of one simulated GPU share: clock, SMs, copy engines, memory, noise and injected faults."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Literal

import numpy as np

from missile.errors import GpuError, InternalError, KernelFaultError, MisuseError
from missile.gpu.interface import Copy, Fill, Launch
from missile.gpu.sim.compute import Compute
from missile.gpu.sim.copies import CopyEngine
from missile.gpu.sim.cost import kernel_cost, missing_share
from missile.gpu.sim.memory import DeviceMemory
from missile.gpu.sim.preempt import SimPreemptControl
from missile.gpu.sim.spec import Faults, GpuSpec
from missile.gpu.sim.streams import PreparedKernel
from missile.gpu.sim.timeline import Timeline
from missile.gpu.work import KernelWork

__all__ = ["Engine"]

_NOISE_SAMPLES = 8191
_REMEMBERED = 1 << 16  # launches whose cost is kept at hand
_BLOCK_BYTES = 64 << 10  # a fill's or copy's block handles this much


class Engine:
    """The inside of a `SimulatedGpu`; streams and events hold it."""

    def __init__(self, spec: GpuSpec, memory: DeviceMemory, faults: Faults, seed: int) -> None:
        self.spec = spec
        self.memory = memory
        self.compute = Compute(spec)
        self.timeline = Timeline(self.compute)
        rng = np.random.default_rng(seed)
        self.kernel_noise = _factors(rng, spec.noise.kernel)
        copy_noise = _factors(rng, spec.noise.copy_)
        link = spec.link
        self.h2d = CopyEngine(self.timeline, link.h2d_gb_s, link.overhead_ns, copy_noise)
        self.d2h = CopyEngine(self.timeline, link.d2h_gb_s, link.overhead_ns, copy_noise)
        self.paces: dict[str, float] = {}  # by tenant: how long its kernels take, over their costs; others 1
        self._faults = faults
        self._brought = 0.0  # bytes that kernels have brought into L2 so far
        self._fetched: dict[tuple[str, str], float] = {}  # by code, what that was when it was last launched
        self._launches: Counter[str] = Counter()
        self._copies: Counter[str] = Counter()
        self._lost: KernelFaultError | None = None
        self._prepared: dict[tuple[int, float, bool], tuple[KernelWork, PreparedKernel]] = {}
        self.closed = False

    # --- time
    def check(self) -> None:
        """Raise what running work has raised, and refuse a closed GPU."""
        if self._lost is not None:
            raise self._lost
        if self.closed:
            raise MisuseError("The GPU was closed.")

    def spend(self, ns: float) -> None:
        """A call takes the host `ns`."""
        self.check()
        self.timeline.spend(ns)
        if self._lost is not None:
            raise self._lost

    def run_until(self, reached: Callable[[], bool], deadline: float = math.inf) -> None:
        """Advance the clock until `reached()` or `deadline`. InternalError when neither can ever come."""
        self.check()
        timeline = self.timeline
        timeline.catch_up()
        seen = -1
        while True:
            if timeline.changes != seen:
                seen = timeline.changes
                self.check()
                if reached():
                    return
            time = timeline.next_ns()
            if time > deadline or time == math.inf:
                break
            timeline.step(time)
            timeline.host = max(timeline.host, time)
        if deadline == math.inf:
            raise InternalError("Waiting for an event that can never be reached: nothing is left to run on the GPU.")
        timeline.host = max(timeline.host, deadline)

    # --- work
    def prepare(self, operation: Launch | Fill | Copy, keeps: float = 0.0, *, early: bool = False) -> PreparedKernel:
        """What `operation` costs here. keeps: the working set of the sequence that it belongs to, bytes. early: it may be
        launched while the kernel before it runs."""
        self.check()
        if not isinstance(operation, Launch):
            return self._prepare_move(operation, keeps)
        if operation.work is None:
            raise MisuseError(f"Kernel {operation.kernel.name!r} has no work; the simulated GPU can't tell its cost.")
        # Engines launch the same work over and over; its identity is its key, held so that it stays one.
        key = (id(operation.work), keeps, early)
        if operation.preempt is not None:
            return self._prepare_preemptible(operation, operation.work, keeps)
        known = self._prepared.get(key)
        tenant = getattr(operation.kernel, "tenant", "")
        if known is not None and (known[1].name, known[1].tenant) == (operation.kernel.name, tenant):
            return known[1]
        if len(self._prepared) >= _REMEMBERED:
            self._prepared.clear()
        cost = kernel_cost(operation.work, self.spec, keeps)
        prepared = PreparedKernel(cost, operation.kernel.name, tenant, None, early=early)
        self._prepared[key] = (operation.work, prepared)
        return prepared

    def _prepare_preemptible(self, operation: Launch, work: KernelWork, keeps: float) -> PreparedKernel:
        looked_at = operation.preempt
        if looked_at is None or not isinstance(looked_at.control, SimPreemptControl):
            raise MisuseError("The launch looks at a control of another GPU.")
        tenant = getattr(operation.kernel, "tenant", "")
        cost = kernel_cost(work, self.spec, keeps)
        return PreparedKernel(cost, operation.kernel.name, tenant, None, (looked_at.control, looked_at.step))

    def _prepare_move(self, operation: Fill | Copy, keeps: float) -> PreparedKernel:
        memory = self.memory
        if isinstance(operation, Fill):
            fill = operation
            memory.check(fill.address, fill.nbytes)
            if not 0 <= fill.value <= 255:
                raise MisuseError(f"A fill's value is a byte (0 to 255), not {fill.value}.")
            work = move_work(0, fill.nbytes)
            return PreparedKernel(
                kernel_cost(work, self.spec, keeps),
                "fill",
                "",
                lambda: memory.fill(fill.address, fill.nbytes, fill.value),
            )
        copy = operation
        memory.check(copy.target, copy.nbytes)
        memory.check(copy.source, copy.nbytes)
        work = move_work(copy.nbytes, copy.nbytes)
        return PreparedKernel(
            kernel_cost(work, self.spec, keeps), "copy", "", lambda: memory.copy(copy.target, copy.source, copy.nbytes)
        )

    def fetch_ns(self, kernel: PreparedKernel) -> float:
        """What the launch of `kernel`, which begins now, waits for its code: others may have driven it out of L2 since it
        ran last. Where its own sequence does that already, the wait is in its measured time."""
        cost = kernel.cost
        since = self._brought - self._fetched.get(kernel.code, 0.0)
        self._brought += cost.brings
        self._fetched[kernel.code] = self._brought
        missing = missing_share(since, self.spec.l2_bytes) - cost.missing
        return self.spec.sharing.code_fetch_ns * missing if missing > 0.0 else 0.0

    def kernel_ended(self, kernel: PreparedKernel) -> None:
        """Effects of a kernel's end: on memory, and an injected fault when this launch has one."""
        if kernel.effect is not None:
            kernel.effect()
        if not self._faults.kernels:
            return
        self._launches[kernel.name] += 1
        for fault in self._faults.kernels:
            if fault.kernel == kernel.name and fault.launch == self._launches[kernel.name] and self._lost is None:
                detail = f"kernel {kernel.name!r}, injected"
                self._lost = KernelFaultError(
                    "cuStreamSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS", tenant=kernel.tenant, detail=detail
                )
                self.timeline.changes += 1

    def count_copy(self, direction: Literal["h2d", "d2h"]) -> None:
        """One copy more in `direction`. GpuError when it is one that is to fail."""
        self._copies[direction] += 1
        for fault in self._faults.copies:
            if fault.direction == direction and fault.copy_number == self._copies[direction]:
                call = "cuMemcpyHtoDAsync" if direction == "h2d" else "cuMemcpyDtoHAsync"
                raise GpuError(call, "CUDA_ERROR_INVALID_VALUE", detail="injected")


def move_work(read: int, written: int) -> KernelWork:
    """The work of a fill or device-to-device copy."""
    blocks = max(1, -(-written // _BLOCK_BYTES))
    return KernelWork(blocks, 256, 8, read_bytes=read, write_bytes=written, footprint_bytes=read + written)


def _factors(rng: np.random.Generator, sigma: float) -> Callable[[], float]:
    """A supply of log-normal factors of mean 1; drawn in advance and used in turn, because drawing one is slow."""
    if not sigma:
        return lambda: 1.0
    samples: list[float] = np.exp(rng.normal(-0.5 * sigma * sigma, sigma, _NOISE_SAMPLES)).tolist()
    at = 0

    def draw() -> float:
        nonlocal at
        at = (at + 1) % _NOISE_SAMPLES
        return samples[at]

    return draw
