"""What the raw link can do, measured through the GPU interface, and the chunk sizes that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from missile.errors import MisuseError
from missile.gpu.interface import DeviceBuffer, Gpu, HostBuffer, Stream
from missile.pcie.engine import EngineOptions
from missile.pcie.policy import Granularity
from missile.pcie.ticket import Direction
from missile.pcie.weights import MIB

__all__ = ["CHUNKS", "LinkProfile", "choose_options", "measure_link"]

CHUNKS: Final = tuple(1 << power for power in range(16, 27))  # 64 KiB to 64 MiB
LATENCY_SIZES: Final = (4 << 10, 64 << 10, MIB)
BYPASS_SIZES: Final = (4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10)

_HOST_NS: Final = 25_000  # between a copy's arrival and the driver's call, and from its end until the owner has seen it
_LATENCY_NS: Final = 110_000  # for the window and a short copy behind it
_SHORT: Final = MIB  # that copy
_DEPTH: Final = 2  # chunks with the GPU: the link has the next one when one ends
_STEP: Final = 256 << 10  # chunk sizes beside latency-sensitive tenants are multiples of this
_AHEAD_NS: Final = 1_200_000  # of copying, given to the GPU while nobody is latency-sensitive: a host's short stops
_BYPASS_CHUNK: Final = 4 * MIB
_BYPASS_TRIES: Final = 24
_BOTH_COPIES: Final = 32

_BYTES_PER_POINT: Final = 256 * MIB
_COPIES_PER_POINT: Final = 128


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """One GPU's link. Rates in bytes/s, medians of the repeats; latencies in ns of lone copies, host's call to seen done.

    chunk_rates: rate of back-to-back copies of a size on one stream. both: each direction's rate with the other at work.
    latency: (p50, p99) by size. bypass: the largest size, of those tried, that overtakes copies queued on another stream
    (0: none does).
    """

    gpu: str
    device: str
    simulated: bool
    chunk_rates: dict[Direction, dict[int, float]]
    both: dict[Direction, float]
    latency: dict[Direction, dict[int, tuple[float, float]]]
    bypass: dict[Direction, int]

    def raw(self, direction: Direction) -> float:
        """The best rate of one direction alone, bytes/s."""
        return max(self.chunk_rates[direction].values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_link(
    gpu: Gpu, *, chunks: Sequence[int] = CHUNKS, repeats: int = 5, progress: Callable[[str], None] | None = None
) -> LinkProfile:
    """Measure both directions, alone and together. Takes 2 x 64 MiB on either side and about half a second of copying."""
    if not chunks or min(chunks) <= 0 or repeats < 1:
        raise MisuseError("Measuring the link needs at least one positive chunk size and one repeat.")
    say = progress or (lambda _: None)
    size = max(*chunks, *LATENCY_SIZES, _BYPASS_CHUNK)
    ends: dict[Direction, _End] = {}
    try:
        for direction in Direction:
            ends[direction] = _End(gpu, direction, size)
        rates: dict[Direction, dict[int, float]] = {}
        latency: dict[Direction, dict[int, tuple[float, float]]] = {}
        for direction, end in ends.items():
            end.rate(max(chunks))  # warm-up: first touch of both sides
            rates[direction] = {}
            for chunk in chunks:
                say(f"{direction} {chunk >> 10} KiB")
                rates[direction][chunk] = statistics.median(end.rate(chunk) for _ in range(repeats))
            latency[direction] = {nbytes: end.latency(nbytes, 40 * repeats) for nbytes in LATENCY_SIZES}
        say("overtaking")
        bypass = {direction: _bypass(gpu, end) for direction, end in ends.items()}
        say("both directions")
        runs = [_both(gpu, ends, min(size, 16 * MIB)) for _ in range(repeats)]
        both = {direction: statistics.median(run[direction] for run in runs) for direction in Direction}
    finally:
        for end in ends.values():
            end.close()
    info = gpu.info
    return LinkProfile(info.name, info.device, info.simulated, rates, both, latency, bypass)


class _End:
    """One direction's stream and buffers."""

    def __init__(self, gpu: Gpu, direction: Direction, size: int) -> None:
        self._gpu = gpu
        self._direction = direction
        self.stream: Stream = gpu.create_stream()
        self._events = (gpu.create_event(), gpu.create_event())
        self._device: DeviceBuffer = gpu.allocate(size)
        self._host: HostBuffer = gpu.allocate_host(size)
        self._host.array[:] = 1  # every page is there before anything is timed

    def copy(self, nbytes: int, stream: Stream | None = None) -> None:
        stream = stream or self.stream
        if self._direction is Direction.H2D:
            stream.copy_to_device(self._device.address, self._host, nbytes=nbytes)
        else:
            stream.copy_to_host(self._host, self._device.address, nbytes=nbytes)

    def start(self, chunk: int, copies: int) -> None:
        begin, end = self._events
        self.stream.record(begin)
        for _ in range(copies):
            self.copy(chunk)
        self.stream.record(end)

    def span(self) -> tuple[int, int]:
        """When the copies of `start` began and ended, ns."""
        begin, end = self._events
        end.synchronize()
        return begin.time_ns(), end.time_ns()

    def rate(self, chunk: int) -> float:
        copies = max(4, min(_COPIES_PER_POINT, _BYTES_PER_POINT // chunk))
        self.start(chunk, copies)
        begin, end = self.span()
        return copies * chunk * 1e9 / max(1, end - begin)

    def latency(self, nbytes: int, repeats: int) -> tuple[float, float]:
        times = []
        event = self._events[1]
        for _ in range(repeats):
            begin = self._gpu.now_ns()
            self.copy(nbytes)
            self.stream.record(event)
            self._gpu.wait([event])
            times.append(float(self._gpu.now_ns() - begin))
        times.sort()
        return times[len(times) // 2], times[min(len(times) - 1, int(0.99 * len(times)))]

    def close(self) -> None:
        self.stream.close()
        for event in self._events:
            event.close()
        self._device.free()
        self._host.free()


def _both(gpu: Gpu, ends: dict[Direction, _End], chunk: int) -> dict[Direction, float]:
    """Rates while both directions copy: of the copies that ended while the other direction was at work.

    The host starts them in turn; what either does before the other has begun or after it has ended would count too much.
    """
    marks = {direction: [gpu.create_event() for _ in range(_BOTH_COPIES + 1)] for direction in ends}
    try:
        for index in range(_BOTH_COPIES + 1):
            for direction, end in ends.items():
                if index:
                    end.copy(chunk)
                end.stream.record(marks[direction][index])
        gpu.synchronize()
        times = {direction: [mark.time_ns() for mark in row] for direction, row in marks.items()}
    finally:
        for row in marks.values():
            for mark in row:
                mark.close()
    begin, stop = max(row[0] for row in times.values()), min(row[-1] for row in times.values())
    rates = {}
    for direction, ends_at in times.items():
        within = [at for at in ends_at if begin <= at <= stop]
        rates[direction] = (len(within) - 1) * chunk * 1e9 / max(1, within[-1] - within[0])
    return rates


def _bypass(gpu: Gpu, end: _End) -> int:
    """The largest of BYPASS_SIZES such that it and all smaller ones always overtake two queued chunks on another stream."""
    other, done = gpu.create_stream(), gpu.create_event(timing=False)
    ahead = [gpu.create_event(timing=False) for _ in range(3)]
    best = 0
    try:
        for size in BYPASS_SIZES:
            for _ in range(_BYPASS_TRIES):
                for event in ahead:
                    end.copy(_BYPASS_CHUNK)
                    end.stream.record(event)
                end.copy(size, other)
                other.record(done)
                gpu.wait([done])
                overtook = not ahead[1].done()
                gpu.synchronize()
                if not overtook:
                    return best
            best = size
    finally:
        other.close()
        for event in (done, *ahead):
            event.close()
    return best


def choose_options(profile: LinkProfile, *, overtake: bool = False) -> EngineOptions:
    """Chunk sizes for a measured link.

    overtake: let latency-sensitive copies of sizes that were seen to overtake do so, on a stream of their own. The median
    is shorter then and the tail longer: that stream may have to wait while the other is kept fed (docs/pcie.md).

    Without latency-sensitive tenants: the smallest chunks that reach 98.5% (alone) and 96% (shared) of the raw rate and
    take long enough (300 and 75 us) for a scheduler that sleeps between them. With such tenants: the largest chunk with
    which two of them and a copy of 1 MiB take at most 110 us, lone-copy latency included.
    """
    solo = max(_smallest(profile, direction, 0.985, 300_000) for direction in Direction)
    shared = max(_smallest(profile, direction, 0.96, 75_000) for direction in Direction)
    short = min(_largest(profile, direction) for direction in Direction)
    shared = min(shared, solo)
    return EngineOptions(
        h2d_rate=profile.raw(Direction.H2D),
        d2h_rate=profile.raw(Direction.D2H),
        granularity=Granularity(solo=solo, shared=shared, short=min(short, shared)),
        depth=_DEPTH,
        ahead=round(_AHEAD_NS * 1e-9 * profile.raw(Direction.H2D)),
        copy_ns=min(_overhead(profile, direction) for direction in Direction),
        start_ns=min(profile.latency[direction][min(LATENCY_SIZES)][0] for direction in Direction),
        h2d_bypass=profile.bypass[Direction.H2D] if overtake else 0,
        d2h_bypass=profile.bypass[Direction.D2H] if overtake else 0,
    )


def _overhead(profile: LinkProfile, direction: Direction) -> float:
    """What one of back-to-back copies takes beyond its bytes, ns."""
    chunk = min(profile.chunk_rates[direction], key=lambda size: abs(size - 2 * MIB))
    return max(0.0, chunk * 1e9 * (1 / profile.chunk_rates[direction][chunk] - 1 / profile.raw(direction)))


def _smallest(profile: LinkProfile, direction: Direction, part: float, at_least_ns: float) -> int:
    rates = profile.chunk_rates[direction]
    raw = profile.raw(direction)
    long = [chunk for chunk in rates if chunk / raw * 1e9 >= at_least_ns]
    # Where the largest are not the fastest, none may reach that part: what is longer than needed is only paid back longer.
    return min((chunk for chunk in long if rates[chunk] >= part * raw), default=min(long, default=max(rates)))


def _largest(profile: LinkProfile, direction: Direction) -> int:
    rates = profile.chunk_rates[direction]
    sizes = sorted(rates)
    times = [size / rates[size] * 1e9 for size in sizes]
    overhead = profile.latency[direction][min(LATENCY_SIZES)][0] + _HOST_NS
    left = _LATENCY_NS - overhead - _SHORT / profile.raw(direction) * 1e9
    tried = range(_STEP, sizes[-1] + 1, _STEP)
    fit = [size for size in tried if _DEPTH * float(np.interp(size, sizes, times)) <= left]
    return max(fit, default=sizes[0])
