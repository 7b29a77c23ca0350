"""The memory lab: latency of chosen addresses from chosen SMs, and what two sides do to each other's bandwidth.

Behaviour relied upon, observed on an H100 and an H200: a block that takes an SM's whole shared memory is alone on it, and
a grid of as many blocks as SMs, launched on a GPU that is otherwise idle, puts one on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError, NoisyGpuError
from missile.gpu.cuda import nvrtc
from missile.gpu.cuda.driver import Driver
from missile.gpu.cuda.modules import CudaKernel
from missile.gpu.interface import Access, ContentionResult, Fill, Launch, Traffic

if TYPE_CHECKING:
    from missile.gpu.cuda.buffers import CudaBuffer
    from missile.gpu.cuda.gpu import CudaGpu

__all__ = ["MemoryLab", "choose_sms"]

_N = TypeVar("_N", bound=np.number[Any])

_UNIT = 256
_THREADS = 1024
_WINDOW_NS = 20_000_000  # how long an aggressor alone is timed
_ACCESS = {Access.READ: 0, Access.READ_WRITE: 1, Access.WRITE: 2}
_STATE_BYTES = 40
_MOST_LOADS = 1024


def choose_sms(victim: Traffic | None, aggressor: Traffic | None, ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """SM ids of each side. Exact ids are taken as they are; counts are filled from what is left, spread evenly. Pure.

    MisuseError for ids that don't exist, an overlap, a count below 1 or more SMs than there are.
    """
    sides: list[list[int] | None] = []
    for traffic in (victim, aggressor):
        wanted = () if traffic is None else traffic.sms
        sides.append(None if isinstance(wanted, int) else list(wanted))
    fixed = [sm for side in sides if side for sm in side]
    if unknown := sorted(set(fixed) - set(ids)):
        raise MisuseError(f"There is no SM {unknown[0]}; the ids are {min(ids)} to {max(ids)}.")
    if len(set(fixed)) != len(fixed):
        raise MisuseError("An SM can't be both the victim's and the aggressor's, nor twice on one side.")
    free = [sm for sm in ids if sm not in set(fixed)]
    for index, traffic in enumerate((victim, aggressor)):
        if sides[index] is not None or traffic is None or not isinstance(traffic.sms, int):
            continue
        count = traffic.sms
        if not 1 <= count <= len(free):
            raise MisuseError(f"Traffic asks for {count} SMs; {len(free)} are left.")
        picked = {free[i * len(free) // count] for i in range(count)}
        sides[index] = sorted(picked)
        free = [sm for sm in free if sm not in picked]
    return sides[0] or [], sides[1] or []


class MemoryLab:
    """Measurements on one GPU, which must be otherwise idle. Keeps its kernels and scratch memory until the GPU closes."""

    def __init__(self, gpu: CudaGpu, cu: Driver) -> None:
        major, minor = gpu.info.compute_capability
        self._gpu = gpu
        self._cu = cu
        self._arch = f"sm_{major}{minor}"
        self._kernels: dict[str, CudaKernel] = {}
        self._scratch: dict[str, CudaBuffer] = {}
        self._stream = gpu.create_stream()
        self._sm_ids: tuple[int, ...] = ()

    def sm_ids(self) -> tuple[int, ...]:
        if not self._sm_ids:
            count = self._gpu.info.sms
            kernel = self._kernel("latency", "which_sm", LOADS=1)
            arrived, out = self._zeros("arrived", 4), self._memory("out", 4 * count)
            self._run(kernel, count, 32, _pointer(arrived), _pointer(out))
            found = self._read(out, np.dtype(np.uint32), count)
            ids = tuple(sorted({int(sm) for sm in found}))
            if len(ids) != count:
                raise NoisyGpuError(f"{count} blocks ran on {len(ids)} SMs: something else uses the GPU.")
            self._sm_ids = ids
        return self._sm_ids

    # --- latency
    def latency(
        self, addresses: npt.NDArray[np.int64], sms: Sequence[int], loads: int, repeats: int, concurrent: int | None
    ) -> npt.NDArray[np.float32]:
        """See `Gpu.measure_latency`."""
        targets = np.ascontiguousarray(addresses, np.int64)
        if targets.ndim != 1 or np.any(targets % 4):
            raise MisuseError("Latency is measured at a list of addresses that are multiples of 4.")
        if not 1 <= loads <= _MOST_LOADS or repeats < 1 or (concurrent is not None and concurrent < 1):
            raise MisuseError(f"Latency needs 1 to {_MOST_LOADS} loads, at least 1 repeat and 1 SM at a time.")
        if len(set(sms)) != len(sms) or not set(sms) <= set(self.sm_ids()):
            raise MisuseError(f"SMs {list(sms)} are not distinct ids out of 0 to {max(self.sm_ids())}.")
        result = np.empty((len(sms), len(targets)), np.float32)
        if not result.size:
            return result
        kernel = self._kernel("latency", "latency", LOADS=loads)
        where = self._upload("addresses", targets)
        group = concurrent or len(sms)
        for first in range(0, len(sms), group):
            some = sms[first : first + group]
            cycles = self._latency_of(kernel, where, len(targets), some, repeats)
            np.divide(cycles, loads, out=result[first : first + len(some)], casting="same_kind")
        return result

    def _latency_of(
        self, kernel: CudaKernel, where: CudaBuffer, count: int, sms: Sequence[int], repeats: int
    ) -> npt.NDArray[np.uint32]:
        slots = np.full(max(self.sm_ids()) + 1, -1, np.int32)
        slots[list(sms)] = np.arange(len(sms), dtype=np.int32)
        table = self._upload("table", slots)
        out = self._memory("out", 4 * count * len(sms))
        self._run(
            kernel,
            self._gpu.info.sms,
            32,
            _pointer(where),
            _i64(count),
            _pointer(table),
            _i32(len(slots)),
            _i32(len(sms)),
            _i32(repeats),
            _i32(0),
            _pointer(self._zeros("arrived", 4)),
            _pointer(out),
        )
        return self._read(out, np.dtype(np.uint32), count * len(sms)).reshape(len(sms), count)

    # --- contention
    def contention(
        self,
        victim: Traffic | None,
        aggressor: Traffic | None,
        repeats: int,
        passes: int,
        mode: Literal["bandwidth", "latency"],
    ) -> ContentionResult:
        """See `Gpu.measure_contention`."""
        if victim is None and aggressor is None:
            raise MisuseError("Contention needs a victim or an aggressor.")
        if repeats < 1 or passes < 1:
            raise MisuseError("Contention needs at least 1 repeat and 1 pass.")
        ids = self.sm_ids()
        ours, theirs = choose_sms(victim, aggressor, ids)
        roles = np.zeros(max(ids) + 1, np.int32)
        roles[ours] = np.arange(1, len(ours) + 1, dtype=np.int32)
        roles[theirs] = -np.arange(1, len(theirs) + 1, dtype=np.int32)
        kernel = self._kernel("contention", "contention")
        shared = kernel.largest_shared_bytes
        state = self._zeros("state", _STATE_BYTES)
        times = self._memory("times", max(1, 16 * repeats * len(ours)))
        self._run(
            kernel,
            self._gpu.info.sms,
            _THREADS,
            _pointer(state),
            _pointer(self._upload("table", roles)),
            _i32(len(roles)),
            self._side("victim", victim, len(ours)),
            self._side("aggressor", aggressor, len(theirs)),
            _i32(repeats),
            _i32(passes),
            _i32(mode == "latency"),
            _i64(0 if victim is not None else _WINDOW_NS),
            _i64(shared // 4),
            _i64(0),
            _pointer(times),
            _i64(times.address + 8 * repeats * len(ours)),
        )
        counters = self._read(state, np.dtype(np.uint64), _STATE_BYTES // 8)
        units, timed_ns = int(counters[2]), int(counters[3])
        theirs_rate = units * _UNIT * 1e9 / timed_ns if timed_ns else 0.0
        if victim is None:
            return ContentionResult(np.empty(0), 0.0, theirs_rate)
        stamps = self._read(times, np.dtype(np.uint64), 2 * repeats * len(ours)).reshape(2, repeats, len(ours))
        durations = (stamps[1].max(axis=1) - stamps[0].min(axis=1)).astype(np.float64)
        moved = victim.addresses.size * _UNIT * passes
        rate = moved * 1e9 / float(np.median(durations))
        return ContentionResult(durations, rate, theirs_rate if aggressor is not None else 0.0)

    def _side(self, name: str, traffic: Traffic | None, blocks: int) -> bytes:
        """`struct Side` of contention.cu."""
        if traffic is None:
            return _i64(0) * 3 + _i32(0) * 2
        addresses = np.asarray(traffic.addresses, np.int64)
        if addresses.ndim != 1 or not addresses.size or np.any(addresses % _UNIT):
            raise MisuseError(f"The {name} needs a non-empty list of addresses that are multiples of {_UNIT}.")
        base = int(addresses.min())
        units = (addresses - base) // _UNIT
        if int(units.max()) >> 32:
            raise MisuseError(f"The {name}'s addresses are more than {_UNIT << 32} bytes apart.")
        where = self._upload(name, units.astype(np.uint32))
        return b"".join(
            (_i64(base), _pointer(where), _i64(addresses.size), _i32(blocks), _i32(_ACCESS[traffic.access]))
        )

    # --- plumbing
    def _kernel(self, source: str, entry: str, **defines: int) -> CudaKernel:
        key = f"{source}:{entry}:{defines}"
        if key not in self._kernels:
            image = nvrtc.cubin(source, self._arch, defines)
            self._kernels[key] = self._gpu.load_module(image, name=f"missile/{source}").kernel(entry)
        return self._kernels[key]

    def _run(self, kernel: CudaKernel, blocks: int, threads: int, *params: bytes) -> None:
        """One block per SM: each takes all the shared memory that there is."""
        grid, block = (blocks, 1, 1), (threads, 1, 1)
        self._stream.launch(Launch(kernel, grid, block, kernel.largest_shared_bytes, params))
        self._stream.synchronize()

    def _memory(self, name: str, nbytes: int) -> CudaBuffer:
        buffer = self._scratch.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            if buffer is not None:
                buffer.free()
            buffer = self._scratch[name] = self._gpu.allocate(nbytes)
        return buffer

    def _zeros(self, name: str, nbytes: int) -> CudaBuffer:
        buffer = self._memory(name, nbytes)
        self._stream.launch(Fill(buffer.address, nbytes))
        return buffer

    def _upload(
        self, name: str, data: npt.NDArray[np.int64] | npt.NDArray[np.int32] | npt.NDArray[np.uint32]
    ) -> CudaBuffer:
        buffer = self._memory(name, max(data.nbytes, 1))
        # Pageable memory: the driver has its own copy when the call returns.
        self._cu("cuMemcpyHtoDAsync", buffer.address, data.ctypes.data, data.nbytes, self._stream.handle)
        return buffer

    def _read(self, buffer: CudaBuffer, dtype: np.dtype[_N], count: int) -> npt.NDArray[_N]:
        out = np.empty(count, dtype)
        self._cu("cuMemcpyDtoHAsync", out.ctypes.data, buffer.address, out.nbytes, self._stream.handle)
        self._stream.synchronize()
        return out


def _pointer(buffer: CudaBuffer) -> bytes:
    return buffer.address.to_bytes(8, "little")


def _i64(value: int) -> bytes:
    return value.to_bytes(8, "little", signed=True)


def _i32(value: int) -> bytes:
    return int(value).to_bytes(4, "little", signed=True)
