"""A load on the link, driven through any copier: bulk tenants in closed loops, latency-sensitive ones by arrival times.

Who makes the latency-sensitive copies is part of what is measured, so there are three ways (`Source`).
"""

from __future__ import annotations

import enum
import gc
import threading
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError
from missile.gpu.interface import DeviceBuffer, Gpu, HostBuffer
from missile.pcie.direct import Copier
from missile.pcie.engine import CopyEngine
from missile.pcie.lane import ChunkRecord
from missile.pcie.native.lane import ROW, NativeLane
from missile.pcie.runner import Sleeper
from missile.pcie.ticket import CopyState, CopyTicket, Direction
from missile.pcie.weights import MIB, Share

__all__ = ["Bulk", "LoadResult", "Requests", "Source", "run_load"]

_FOREVER = 1 << 62
_EARLY_NS = 100_000  # the load is awake when a copy arrives, as an engine is that has just received a request


class Source(enum.StrEnum):
    """Who submits latency-sensitive copies and sees their ends.

    SLEEPING and SPINNING: the copier's owner, a loop in Python that sleeps until shortly before an arrival, or that never
    sleeps, as the runtime's engine loop on hardware. NATIVE: a loop in C that never sleeps (`native/source.c`), through the
    entry that Python's submit uses; for a `CopyEngine` with the hot loop in C only. What it measures is the scheduler and
    the link; its own CPU time is not counted.
    """

    SLEEPING = "sleeping"
    SPINNING = "spinning"
    NATIVE = "native"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bulk:
    """A tenant that always has `outstanding` copies of `nbytes` waiting, in each of `directions`."""

    name: str
    share: Share = field(default_factory=Share)
    nbytes: int = 256 * MIB
    outstanding: int = 2
    directions: tuple[Direction, ...] = (Direction.H2D,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """A latency-sensitive tenant whose copies of `nbytes` arrive by a Poisson process of `rate` per second."""

    name: str
    share: Share = field(default_factory=lambda: Share(latency_sensitive=True))
    nbytes: int = MIB
    rate: float = 300.0
    direction: Direction = Direction.H2D


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Raw times of one run, ns since its start.

    latency_ns: by tenant, arrival to seen done, in order of their ends; only copies that were done. unfinished: by tenant.
    late_ns: by tenant, arrival until the source called the copier (part of the former), of every copy that was submitted.
    chunks: by tenant and direction ("name h2d"), shape (n, 2): when each chunk (whole copy, without the scheduler) was
    seen to have arrived, and its bytes. cpu_seconds: of the driving thread, which also makes the load, and of the
    engine's own threads (`engine_cpu_seconds`, 0 where there are none).
    """

    duration_ns: int
    latency_ns: dict[str, npt.NDArray[np.int64]]
    late_ns: dict[str, npt.NDArray[np.int64]]
    unfinished: dict[str, int]
    chunks: dict[str, npt.NDArray[np.int64]]
    cpu_seconds: float
    engine_cpu_seconds: float
    steps: int

    def rate(self, direction: Direction) -> float:
        """Bytes/s that arrived in one direction, all tenants."""
        total = sum(int(rows[:, 1].sum()) for key, rows in self.chunks.items() if key.endswith(f" {direction}"))
        return total * 1e9 / self.duration_ns


def run_load(
    gpu: Gpu,
    copier: Copier,
    bulk: Sequence[Bulk],
    requests: Sequence[Requests],
    *,
    duration_s: float,
    seed: int = 0,
    source: Source = Source.SLEEPING,
) -> LoadResult:
    """Run for `duration_s` seconds of the GPU's clock; the copier's thread is this one. The copier is closed afterwards.

    MisuseError for a load that makes no sense. Latencies count from the moment of arrival, whenever the loop got to it.
    """
    if not duration_s > 0 or not (bulk or requests):
        raise MisuseError("A load on the link needs a positive duration and at least one tenant.")
    if source is Source.NATIVE and not (isinstance(copier, CopyEngine) and copier.native):
        raise MisuseError("Only the scheduler with its hot loop in C can be given copies by a source in C.")
    return _Run(gpu, copier, bulk, requests, round(duration_s * 1e9), seed, source).run()


class _Run:
    def __init__(
        self,
        gpu: Gpu,
        copier: Copier,
        bulk: Sequence[Bulk],
        requests: Sequence[Requests],
        duration_ns: int,
        seed: int,
        source: Source,
    ) -> None:
        self._gpu = gpu
        self._copier = copier
        self._bulk = bulk
        self._requests = requests
        self._duration = duration_ns
        self._source = source
        self._native: list[_NativeSource] = []
        size = max([loop.nbytes for loop in bulk] + [tenant.nbytes for tenant in requests])
        used = {tenant.direction for tenant in requests}.union(*(loop.directions for loop in bulk))
        self._host = {direction: gpu.allocate_host(size) for direction in used}
        for memory in self._host.values():
            memory.array[:] = 1
        self._device = {direction: gpu.allocate(size) for direction in used}
        self._latency: dict[str, list[int]] = {tenant.name: [] for tenant in requests}
        self._late: dict[str, list[int]] = {tenant.name: [] for tenant in requests}
        self._chunks: dict[str, array[int]] = {}  # time, bytes, time, bytes ...
        self._start = self._end = 0
        rng = np.random.default_rng(seed)
        self._arrivals: list[tuple[int, Requests]] = []
        for tenant in requests:
            count = int(tenant.rate * duration_ns * 1.5e-9) + 20
            times = np.cumsum(rng.exponential(1e9 / tenant.rate, count)).astype(np.int64)
            self._arrivals += [(int(at), tenant) for at in times if at < duration_ns]
        self._arrivals.sort(key=lambda arrival: arrival[0], reverse=True)

    def run(self) -> LoadResult:
        gpu, copier = self._gpu, self._copier
        try:
            for loop in self._bulk:
                copier.admit(loop.name, loop.share)
            for tenant in self._requests:
                copier.admit(tenant.name, tenant.share)
            if isinstance(copier, CopyEngine):
                copier.record_chunks()
            gc.collect()
            gc.disable()  # a collection stops the loop for milliseconds, and so would this first one
            self._start = gpu.now_ns()
            self._end = self._start + self._duration
            sleeper = Sleeper(gpu)
            spins = self._source is Source.SPINNING
            early = 0 if gpu.info.simulated else _EARLY_NS
            if self._source is Source.NATIVE:
                self._start_native()
            cpu = time.thread_time()
            for loop in self._bulk:
                for direction in loop.directions:
                    for _ in range(loop.outstanding):
                        self._again(loop, direction)
            steps = 0
            while gpu.now_ns() < self._end:
                self._let_in()
                due = copier.step()
                steps += 1
                coming = self._start + self._arrivals[-1][0] if self._arrivals else _FOREVER
                soon = gpu.now_ns() + 1_000
                until = min(_FOREVER if due is None else due, coming - early, self._end)
                if not spins:
                    sleeper.wait(copier.events(), max(until, soon))
                elif gpu.info.simulated:
                    gpu.wait(copier.events(), max(until, soon))
            cpu = time.thread_time() - cpu
            for native in self._native:
                native.join(self._latency, self._late, self._end)
            engine_cpu = 0.0
            if isinstance(copier, CopyEngine):
                engine_cpu = copier.cpu_seconds
                copier.step()
                for record in copier.recorded_chunks():
                    self._arrived(record)
        finally:
            gc.enable()
            for native in self._native:
                native.thread.join()
            copier.close()
            gpu.synchronize()
            for memory in (*self._host.values(), *self._device.values()):
                memory.free()
        return LoadResult(
            duration_ns=self._duration,
            latency_ns={name: np.array(times, np.int64) for name, times in self._latency.items()},
            late_ns={name: np.array(times, np.int64) for name, times in self._late.items()},
            unfinished={name: len(self._late[name]) - len(times) for name, times in self._latency.items()},
            chunks={name: np.array(rows, np.int64).reshape(-1, 2) for name, rows in self._chunks.items()},
            cpu_seconds=cpu + engine_cpu,
            engine_cpu_seconds=engine_cpu,
            steps=steps,
        )

    def _start_native(self) -> None:
        """Hand all arrivals to sources in C, one for each direction."""
        assert isinstance(self._copier, CopyEngine)
        for direction in Direction:
            mine = [(at, tenant) for at, tenant in reversed(self._arrivals) if tenant.direction is direction]
            lane = self._copier.lanes[direction]
            if mine and isinstance(lane, NativeLane):
                source = _NativeSource(lane, mine, self._start)
                self._native.append(source)
                source.start(self._host[direction], self._device[direction], self._end)
        self._arrivals.clear()

    def _let_in(self) -> None:
        while self._arrivals and self._start + self._arrivals[-1][0] <= (began := self._gpu.now_ns()):
            at, tenant = self._arrivals.pop()
            arrival = self._start + at
            self._late[tenant.name].append(began - arrival)

            def done(ticket: CopyTicket, arrival: int = arrival) -> None:
                now = self._gpu.now_ns()
                if ticket.state is CopyState.DONE and now <= self._end:
                    self._latency[ticket.tenant].append(now - arrival)
                self._completed(ticket)

            self._copy(tenant.name, tenant.direction, tenant.nbytes).add_done_callback(done)

    def _again(self, loop: Bulk, direction: Direction) -> None:
        def done(ticket: CopyTicket) -> None:
            self._completed(ticket)
            if ticket.state is CopyState.DONE and self._gpu.now_ns() < self._end:
                self._again(loop, direction)

        self._copy(loop.name, direction, loop.nbytes).add_done_callback(done)

    def _copy(self, tenant: str, direction: Direction, nbytes: int) -> CopyTicket:
        host, device = self._host[direction], self._device[direction]
        if direction is Direction.H2D:
            return self._copier.to_device(tenant, device, host, nbytes=nbytes)
        return self._copier.to_host(tenant, host, device, nbytes=nbytes)

    def _arrived(self, chunk: ChunkRecord) -> None:
        if chunk.done_ns <= self._end:
            self._note(chunk.tenant, chunk.direction, chunk.done_ns, chunk.nbytes)

    def _completed(self, ticket: CopyTicket) -> None:
        """Without the scheduler there are no chunks: a copy counts whole, when it ends."""
        if not isinstance(self._copier, CopyEngine) and ticket.finished_ns <= self._end:
            self._note(ticket.tenant, ticket.direction, ticket.finished_ns, ticket.nbytes)

    def _note(self, tenant: str, direction: Direction, at_ns: int, nbytes: int) -> None:
        rows = self._chunks.get(key := f"{tenant} {direction}")
        if rows is None:
            rows = self._chunks[key] = array("q")
        rows.append(at_ns - self._start)
        rows.append(nbytes)


class _NativeSource:
    """Arrivals of one direction, submitted by `NativeLane.run_source` on a thread of its own."""

    def __init__(self, lane: NativeLane, arrivals: Sequence[tuple[int, Requests]], start_ns: int) -> None:
        self._lane = lane
        self._names = [tenant.name for _, tenant in arrivals]
        self._rows = np.zeros((len(arrivals), len(ROW)), np.int64)
        for row, (at, tenant) in zip(self._rows, arrivals, strict=True):
            row[:3] = start_ns + at, lane.flow(tenant.name), tenant.nbytes
        self._submitted = 0

    def start(self, host: HostBuffer, device: DeviceBuffer, end_ns: int) -> None:
        def run() -> None:
            self._submitted = self._lane.run_source(self._rows, host, device.address, end_ns=end_ns)

        self.thread = threading.Thread(target=run, name="missile-load", daemon=True)
        self.thread.start()

    def join(self, latency: dict[str, list[int]], late: dict[str, list[int]], end_ns: int) -> None:
        """Wait for its end, and note what happened until `end_ns`."""
        self.thread.join()
        for name, row in zip(self._names[: self._submitted], self._rows.tolist(), strict=False):
            arrival, _, _, submitted, _, _, done, state = row
            late[name].append(submitted - arrival)
            if not state and 0 < done <= end_ns:
                latency[name].append(done - arrival)
