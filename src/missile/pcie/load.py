"""A load on the link, driven through any copier: bulk tenants in closed loops, latency-sensitive ones by arrival times."""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError
from missile.gpu.interface import Gpu
from missile.pcie.direct import Copier
from missile.pcie.engine import CopyEngine
from missile.pcie.lane import ChunkRecord
from missile.pcie.runner import Sleeper
from missile.pcie.ticket import CopyState, CopyTicket, Direction
from missile.pcie.weights import MIB, Share

__all__ = ["Bulk", "LoadResult", "Requests", "run_load"]

_FOREVER = 1 << 62
_EARLY_NS = 100_000  # the load is awake when a copy arrives, as an engine is that has just received a request


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

    latency_ns: by tenant, arrival to seen done, in order of arrival; only copies that were done. unfinished: by tenant.
    chunks: by tenant and direction ("name h2d"), shape (n, 2): when each chunk (whole copy, without the scheduler) was
    seen to have arrived, and its bytes. cpu_seconds: of the driving thread, which also makes the load, and of the
    engine's own threads (`engine_cpu_seconds`, 0 where there are none).
    """

    duration_ns: int
    latency_ns: dict[str, npt.NDArray[np.int64]]
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
    gpu: Gpu, copier: Copier, bulk: Sequence[Bulk], requests: Sequence[Requests], *, duration_s: float, seed: int = 0
) -> LoadResult:
    """Run for `duration_s` seconds of the GPU's clock; the copier's thread is this one. The copier is closed afterwards.

    MisuseError for a load that makes no sense. Latencies count from the moment of arrival, whenever the loop got to it.
    """
    if not duration_s > 0 or not (bulk or requests):
        raise MisuseError("A load on the link needs a positive duration and at least one tenant.")
    return _Run(gpu, copier, bulk, requests, round(duration_s * 1e9), seed).run()


class _Run:
    def __init__(
        self, gpu: Gpu, copier: Copier, bulk: Sequence[Bulk], requests: Sequence[Requests], duration_ns: int, seed: int
    ) -> None:
        self._gpu = gpu
        self._copier = copier
        self._bulk = bulk
        self._requests = requests
        self._duration = duration_ns
        size = max([loop.nbytes for loop in bulk] + [tenant.nbytes for tenant in requests])
        used = {tenant.direction for tenant in requests}.union(*(loop.directions for loop in bulk))
        self._host = {direction: gpu.allocate_host(size) for direction in used}
        for memory in self._host.values():
            memory.array[:] = 1
        self._device = {direction: gpu.allocate(size) for direction in used}
        self._latency: dict[str, list[int]] = {tenant.name: [] for tenant in requests}
        self._issued = dict.fromkeys(self._latency, 0)
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
            early = 0 if gpu.info.simulated else _EARLY_NS
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
                sleeper.wait(copier.events(), max(until, soon))
            cpu = time.thread_time() - cpu
            engine_cpu = 0.0
            if isinstance(copier, CopyEngine):
                engine_cpu = copier.cpu_seconds
                copier.step()
                for record in copier.recorded_chunks():
                    self._arrived(record)
        finally:
            gc.enable()
            copier.close()
            gpu.synchronize()
            for memory in (*self._host.values(), *self._device.values()):
                memory.free()
        return LoadResult(
            duration_ns=self._duration,
            latency_ns={name: np.array(times, np.int64) for name, times in self._latency.items()},
            unfinished={name: self._issued[name] - len(times) for name, times in self._latency.items()},
            chunks={name: np.array(rows, np.int64).reshape(-1, 2) for name, rows in self._chunks.items()},
            cpu_seconds=cpu + engine_cpu,
            engine_cpu_seconds=engine_cpu,
            steps=steps,
        )

    def _let_in(self) -> None:
        while self._arrivals and self._start + self._arrivals[-1][0] <= self._gpu.now_ns():
            at, tenant = self._arrivals.pop()
            arrival = self._start + at
            self._issued[tenant.name] += 1

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
