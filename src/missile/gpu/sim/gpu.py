"""The simulated GPU: `missile.gpu.interface.Gpu` over the simulation engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError, UnsupportedError
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
from missile.gpu.sim.cost import working_set
from missile.gpu.sim.engine import Engine, move_work
from missile.gpu.sim.latches import SimLatch
from missile.gpu.sim.memory import DeviceMemory, SimAddressRange, SimDeviceBuffer, SimHostBuffer, SimPage
from missile.gpu.sim.memory_lab import MemoryLab
from missile.gpu.sim.memory_spec import parse_memory_spec
from missile.gpu.sim.modules import SimModule
from missile.gpu.sim.preempt import SimPreemptControl
from missile.gpu.sim.spec import Faults, GpuSpec, load_spec
from missile.gpu.sim.streams import SimEvent, SimGraph, SimStream
from missile.gpu.work import KernelWork

__all__ = ["SimulatedGpu"]

_PAGE_BYTES = 2 << 20
_BUSY_DISTURBANCE = 0.3  # share of latency measurements that other running work hits


class SimulatedGpu:
    """One simulated GPU. Deterministic for a spec, a seed and the calls made.

    faults: faults to inject, in place of the spec's (for tests of error paths).
    """

    def __init__(self, spec: GpuSpec, *, seed: int = 0, device: str = "", faults: Faults | None = None) -> None:
        self.spec = spec
        self._lab: MemoryLab | None = None
        page_bytes = _PAGE_BYTES
        supply: Sequence[int] = range(0, spec.memory_bytes // page_bytes * page_bytes, page_bytes)
        if spec.memory is not None:
            memory_spec = parse_memory_spec(
                spec.memory, f"Spec {spec.name}", memory_bytes=spec.memory_bytes, l2_bytes=spec.l2_bytes
            )
            self._lab = MemoryLab(memory_spec, spec.sm.count, seed)
            page_bytes, supply = memory_spec.page_bytes, self._lab.frames().tolist()
        self._memory = DeviceMemory(page_bytes, supply)
        self._engine = Engine(spec, self._memory, spec.faults if faults is None else faults, seed)
        self._streams: list[SimStream] = []
        self._handles = itertools.count(1)
        self._split: tuple[SmPartition, ...] = ()
        self._info = GpuInfo(
            name=spec.name,
            device=device or f"sim:{spec.name}",
            simulated=True,
            level=Level.MEMORY_LAB if self._lab is not None else Level.PAGES,
            sms=spec.sm.count,
            l2_bytes=spec.l2_bytes,
            memory_bytes=self._memory.total_bytes,
            page_bytes=page_bytes,
            sm_granularity=spec.sm.granularity,
            sm_minimum=spec.sm.minimum,
            copy_engines=2,
            compute_capability=spec.compute_capability,
            clock_hz=spec.sm.clock_mhz * 1e6,
            driver="simulated",
            runtime="simulated",
            notes=("simulated: a model, not a measurement",),
            extra={"memory_bytes_per_s": spec.vram.bandwidth_gb_s * 1e9},
        )

    @classmethod
    def open(cls, name_or_path: str, *, seed: int = 0, faults: Faults | None = None) -> SimulatedGpu:
        """The GPU of a spec that ships with Missile ("h100") or of a spec file ("my.toml"). MisuseError: no such spec."""
        return cls(load_spec(name_or_path), seed=seed, device=f"sim:{name_or_path}", faults=faults)

    @property
    def info(self) -> GpuInfo:
        return self._info

    @property
    def busy_sm_ns(self) -> float:
        """SM-time that blocks have held so far."""
        return self._engine.compute.busy_sm_ns

    # --- time
    def now_ns(self) -> int:
        return math.ceil(self._engine.timeline.host)

    def wait(self, events: Sequence[Event], deadline_ns: int | None = None) -> None:
        if not events and deadline_ns is None:
            raise MisuseError("Waiting needs an event or a deadline.")
        mine = [event for event in events if isinstance(event, SimEvent)]
        if len(mine) != len(events):
            raise MisuseError("An event belongs to another GPU.")
        deadline = math.inf if deadline_ns is None else float(deadline_ns)
        self._engine.run_until(lambda: any(event.reached for event in mine), deadline)

    def synchronize(self) -> None:
        self._engine.run_until(lambda: all(stream.empty for stream in self._streams))

    # --- execution
    def create_stream(self, *, priority: Priority = Priority.LOW, partition: SmPartition | None = None) -> SimStream:
        self._engine.check()
        parts = tuple(range(max(len(self._split), 1)))
        if partition is not None:
            if not any(partition.handle is mine.handle for mine in self._split):
                raise MisuseError("The SM partition does not belong to this GPU's current split.")
            parts = (partition.index,)
        stream = SimStream(self._engine, next(self._handles), Priority(priority), partition, parts)
        self._streams = [s for s in self._streams if not (s.closed and s.empty)]
        self._streams.append(stream)
        return stream

    def create_event(self, *, timing: bool = True) -> SimEvent:
        self._engine.check()
        return SimEvent(self._engine, timing)

    def create_latch(self) -> SimLatch:
        self._engine.check()
        return SimLatch()

    def load_module(self, image: bytes, *, name: str = "") -> SimModule:
        self._engine.check()
        return SimModule(image, name, self.spec)

    def create_graph(
        self, operations: Sequence[Launch | Fill | Copy], *, within: Sequence[Launch | Fill | Copy] | None = None
    ) -> SimGraph:
        keeps = working_set([_work_of(operation) for operation in (operations if within is None else within)])
        kernels = []
        behind_launch = False
        for operation in operations:
            early = behind_launch and isinstance(operation, Launch) and operation.overlaps
            kernels.append(self._engine.prepare(operation, keeps, early=early))
            behind_launch = isinstance(operation, Launch)
        return SimGraph(kernels)

    def create_preempt_control(self) -> SimPreemptControl:
        self._engine.check()
        return SimPreemptControl(self._engine)

    def split_sms(self, counts: Sequence[int]) -> SmSplit:
        self._engine.check()
        sizes = _rounded(counts, self.spec)
        if any(s.partition is not None and not s.closed for s in self._streams):
            raise MisuseError("The SMs are split already and streams of that split are open; close them first.")
        self.synchronize()
        left = self.spec.sm.count - sum(sizes)
        sizes = [*sizes, left] if left else sizes
        self._split = tuple(SmPartition(index, sms, object()) for index, sms in enumerate(sizes))
        self._engine.compute.divide(sizes)
        everywhere = tuple(range(len(sizes)))
        for stream in self._streams:
            stream.parts = everywhere
        return SmSplit(self._split[: len(counts)], self._split[-1] if left else None)

    # --- memory
    def allocate(self, nbytes: int, *, tenant: str = "") -> SimDeviceBuffer:
        self._engine.check()
        return self._memory.allocate(nbytes, tenant)

    def allocate_host(self, nbytes: int, *, tenant: str = "") -> SimHostBuffer:
        self._engine.check()
        return self._memory.allocate_host(nbytes)

    def slow_host(self, factor: float) -> None:
        """From now on, calls cost the host thread `factor` times what they did: another machine, or one with more to do."""
        self._engine.spec = self.spec = self.spec.model_copy(update={"host": self.spec.host.slower(factor)})

    def pace_kernels(self, tenant: str, factor: float) -> None:
        """From now on, the tenant's kernels and the gaps before them take `factor` times what they did: other code for the
        same work. What they ask of memory in all stays the same, what they ask at a time too."""
        self._engine.paces[tenant] = factor * self._engine.paces.get(tenant, 1.0)

    def memory_free(self) -> int:
        return self._memory.free_bytes

    def create_page(self, *, tenant: str = "") -> SimPage:
        self._engine.check()
        return self._memory.create_page(tenant)

    def reserve(self, nbytes: int) -> SimAddressRange:
        self._engine.check()
        return self._memory.reserve(nbytes)

    # --- memory lab
    def sm_ids(self) -> tuple[int, ...]:
        self._need_lab()
        return tuple(range(self.spec.sm.count))

    def measure_latency(
        self,
        addresses: npt.NDArray[np.int64],
        sms: Sequence[int],
        *,
        loads: int = 4,
        repeats: int = 2,
        concurrent: int | None = None,
    ) -> npt.NDArray[np.float32]:
        lab = self._need_lab()
        physical = self._memory.physical(np.asarray(addresses, np.int64))
        cycles, took = lab.measure_latency(physical, sms, loads=loads, repeats=repeats, concurrent=concurrent)
        self._engine.spend(took)
        return cycles

    def measure_contention(
        self,
        victim: Traffic | None,
        aggressor: Traffic | None = None,
        *,
        repeats: int = 20,
        passes: int = 1,
        mode: Literal["bandwidth", "latency"] = "bandwidth",
    ) -> ContentionResult:
        lab = self._need_lab()
        result, took = lab.measure_contention(
            self._physical_traffic(victim),
            self._physical_traffic(aggressor),
            repeats=repeats,
            passes=passes,
            mode=mode,
        )
        self._engine.spend(took)
        return result

    def _physical_traffic(self, traffic: Traffic | None) -> Traffic | None:
        if traffic is None:
            return None
        return Traffic(self._memory.physical(np.asarray(traffic.addresses, np.int64)), traffic.sms, traffic.access)

    def _need_lab(self) -> MemoryLab:
        self._engine.check()
        if self._lab is None:
            raise UnsupportedError(
                f"The spec of {self._info.device} has no [memory] table, so nothing can be measured."
            )
        idle = self._engine.compute.idle
        quiet = self._lab.spec.latency.disturbance
        self._lab.disturbance = quiet if idle else max(quiet, _BUSY_DISTURBANCE)
        return self._lab

    def close(self) -> None:
        self._engine.closed = True

    def __enter__(self) -> SimulatedGpu:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _work_of(operation: Launch | Fill | Copy) -> KernelWork:
    if isinstance(operation, Launch):
        return operation.work or KernelWork(blocks=1)
    return move_work(operation.nbytes if isinstance(operation, Copy) else 0, operation.nbytes)


def _rounded(counts: Sequence[int], spec: GpuSpec) -> list[int]:
    """Counts rounded up to what the GPU can give. MisuseError when they are none, below 1 or more than there is."""
    if not counts:
        raise MisuseError("An SM split needs at least one count.")
    if min(counts) < 1:
        raise MisuseError(f"An SM partition needs at least 1 SM, not {min(counts)}.")
    unit, least = spec.sm.granularity, spec.sm.minimum
    sizes = [max(-(-count // unit) * unit, least) for count in counts]
    if sum(sizes) > spec.sm.count:
        raise MisuseError(
            f"SM partitions {list(counts)} need {sum(sizes)} SMs after rounding up to multiples of {unit}; "
            f"the GPU has {spec.sm.count}."
        )
    return sizes
