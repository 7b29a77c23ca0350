"""When requests arrive: specifications, and the pure function from (specification, seed, tenant) to times.

The same seed gives the same arrivals under every policy and on every platform: each tenant draws from a PCG64 stream of
its own, keyed by its name, so adding or reordering tenants changes nobody's arrivals, and a longer run begins with the
arrivals of a shorter one.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from missile.errors import MisuseError
from missile.workloads.traces import DisbWorkload, disb_tasks, load_trace

__all__ = [
    "Arrivals",
    "BurstArrivals",
    "ClosedLoop",
    "DisbArrivals",
    "PeriodicArrivals",
    "PoissonArrivals",
    "TraceArrivals",
    "arrival_times",
    "effective",
    "tenant_stream",
]

Times = npt.NDArray[np.int64]

_SECOND = 1e9
_SPREAD = 1e9  # copies of a recorded arrival lie at most this far behind it, ns
_CHUNK = 4096
_Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PoissonArrivals(_Spec):
    """Independent arrivals at a mean rate (requests per second)."""

    kind: Literal["poisson"] = "poisson"
    rate_per_s: _Rate


class PeriodicArrivals(_Spec):
    """One arrival per period of 1/rate_per_s seconds.

    jitter: each arrival is late by a uniform share of a period in [0, jitter). phase: the first one's place in its
    period; None draws it from the seed, so that tenants of one rate don't arrive in step.
    """

    kind: Literal["periodic"] = "periodic"
    rate_per_s: _Rate
    jitter: float = Field(default=0.0, ge=0, le=1)
    phase: float | None = Field(default=None, ge=0, lt=1)


class ClosedLoop(_Spec):
    """`depth` requests are always outstanding: the next is issued `think_ms` after one is done."""

    kind: Literal["closed"] = "closed"
    depth: int = Field(default=2, ge=1, le=64)
    think_ms: float = Field(default=0.0, ge=0, le=1e6)


class BurstArrivals(_Spec):
    """A Poisson process that switches between two rates (Markov-modulated): quiet and burst.

    The time in each state is exponential with the given mean. The run starts in either with its long-run probability.
    """

    kind: Literal["bursts"] = "bursts"
    quiet_per_s: float = Field(ge=0, le=1e6)
    burst_per_s: _Rate
    mean_quiet_s: _Seconds
    mean_burst_s: _Seconds

    @property
    def rate_per_s(self) -> float:
        """The long-run mean rate."""
        weighted = self.quiet_per_s * self.mean_quiet_s + self.burst_per_s * self.mean_burst_s
        return weighted / (self.mean_quiet_s + self.mean_burst_s)


class TraceArrivals(_Spec):
    """Recorded arrivals: a window of trace `name`, repeated when the run is longer.

    start_s, length_s: the window, in the recording's seconds (None: to its end).
    rate_scale: changes how many arrive and keeps when: below 1 each arrival is kept with that probability; above 1 each
      is joined by copies placed uniformly before the next one (at most a recorded second behind it).
    compression: changes how fast time passes and keeps how many: 2 plays the window in half its time.
    rate_per_s: instead of `compression`, plays the window at the speed that gives this mean rate.
    """

    kind: Literal["trace"] = "trace"
    name: str
    start_s: float = Field(default=0.0, ge=0)
    length_s: _Seconds | None = None
    rate_scale: float = Field(default=1.0, gt=0, le=1000)
    compression: float = Field(default=1.0, gt=0, le=1e6)
    rate_per_s: _Rate | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            load_trace(name)
        except MisuseError as error:
            raise ValueError(str(error)) from None
        return name

    @model_validator(mode="after")
    def _consistent(self) -> TraceArrivals:
        if self.rate_per_s is not None and self.compression != 1.0:
            raise ValueError("give rate_per_s or compression, not both")
        start, end = self.window_ns
        if end <= start or load_trace(self.name).count(start, end) < 1:
            raise ValueError(f"the window of trace {self.name!r} at start_s={self.start_s} has no arrivals")
        return self

    @property
    def window_ns(self) -> tuple[int, int]:
        """The window's start and end in the recording, ns."""
        span = load_trace(self.name).span_ns
        start = int(self.start_s * _SECOND)
        end = span if self.length_s is None else min(span, start + int(self.length_s * _SECOND))
        return start, end

    @property
    def speed(self) -> float:
        """Recorded seconds that pass per second."""
        if self.rate_per_s is None:
            return self.compression
        start, end = self.window_ns
        recorded_per_s = load_trace(self.name).count(start, end) * _SECOND / (end - start)
        return self.rate_per_s / (recorded_per_s * self.rate_scale)


class DisbArrivals(_Spec):
    """The load of one task of a DISB workload, such as workload "A", task "vgg19_rt"."""

    kind: Literal["disb"] = "disb"
    workload: DisbWorkload
    task: str

    @model_validator(mode="after")
    def _known(self) -> DisbArrivals:
        known = [task.id for task in disb_tasks(self.workload)]
        if self.task not in known:
            raise ValueError(f"DISB workload {self.workload} has no task {self.task!r}; known: {', '.join(known)}")
        return self


Arrivals = Annotated[
    PoissonArrivals | PeriodicArrivals | ClosedLoop | BurstArrivals | TraceArrivals | DisbArrivals,
    Field(discriminator="kind"),
]
_Effective = PoissonArrivals | PeriodicArrivals | ClosedLoop | BurstArrivals | TraceArrivals


def effective(spec: Arrivals) -> _Effective:
    """`spec` with names of DISB tasks replaced by the load they stand for. Continuous DISB loads are closed loops."""
    if not isinstance(spec, DisbArrivals):
        return spec
    task = next(task for task in disb_tasks(spec.workload) if task.id == spec.task)
    if task.load == "periodic":
        return PeriodicArrivals(rate_per_s=task.rate_per_s)
    if task.load == "poisson":
        return PoissonArrivals(rate_per_s=task.rate_per_s)
    if task.load == "trace":
        return TraceArrivals(name=f"disb-real/{task.id}")
    return ClosedLoop(depth=1 if task.latency_sensitive else 2)


def tenant_stream(seed: int, tenant: str) -> np.random.Generator:
    """The random stream of one tenant: PCG64, keyed by `seed` and the tenant's name."""
    digest = hashlib.sha256(tenant.encode()).digest()
    key = tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def arrival_times(spec: Arrivals, *, seed: int, tenant: str, horizon_ns: int) -> Times:
    """Arrivals in [0, horizon_ns), int64 ns, sorted. Empty for a closed loop, whose arrivals follow its completions."""
    rng = tenant_stream(seed, tenant)
    spec = effective(spec)
    match spec:
        case PoissonArrivals():
            times = _poisson(spec.rate_per_s, horizon_ns, rng)
        case PeriodicArrivals():
            times = _periodic(spec, horizon_ns, rng)
        case BurstArrivals():
            times = _bursts(spec, horizon_ns, rng)
        case TraceArrivals():
            times = _replay(spec, horizon_ns, rng)
        case ClosedLoop():
            return np.empty(0, np.int64)
    return times[times < horizon_ns]


def _poisson(rate_per_s: float, horizon_ns: int, rng: np.random.Generator) -> Times:
    chunks: list[npt.NDArray[np.float64]] = []
    last = 0.0
    while last < horizon_ns:
        # Fixed-size draws: the stream of gaps, and so every rounded sum, is the same whatever the horizon.
        chunk = last + np.cumsum(rng.exponential(_SECOND / rate_per_s, _CHUNK))
        chunks.append(chunk)
        last = float(chunk[-1])
    return np.concatenate(chunks).astype(np.int64) if chunks else np.empty(0, np.int64)


def _periodic(spec: PeriodicArrivals, horizon_ns: int, rng: np.random.Generator) -> Times:
    period = _SECOND / spec.rate_per_s
    drawn = rng.random()
    phase = drawn if spec.phase is None else spec.phase
    count = int(horizon_ns / period) + 1
    late = rng.random(count) * spec.jitter if spec.jitter else 0.0
    return ((np.arange(count) + phase + late) * period).astype(np.int64)


def _bursts(spec: BurstArrivals, horizon_ns: int, rng: np.random.Generator) -> Times:
    means = (spec.mean_quiet_s * _SECOND, spec.mean_burst_s * _SECOND)
    rates = (spec.quiet_per_s / _SECOND, spec.burst_per_s / _SECOND)
    state = int(rng.random() < means[1] / (means[0] + means[1]))
    parts = [np.empty(0)]
    now = 0.0
    while now < horizon_ns:
        stay = rng.exponential(means[state])
        parts.append(now + np.sort(rng.random(rng.poisson(rates[state] * stay))) * stay)
        now += stay
        state = 1 - state
    return np.concatenate(parts).astype(np.int64)


def _replay(spec: TraceArrivals, horizon_ns: int, rng: np.random.Generator) -> Times:
    trace = load_trace(spec.name)
    start, end = spec.window_ns
    speed = spec.speed
    placing, scaling = rng.spawn(2)  # apart, so that how much one draws never shifts the other
    parts = [np.empty(0)]
    played = 0.0  # ns of the run that are filled
    while played < horizon_ns:
        # Further than needed: copies are spread up to the next arrival, which must be known at the cut.
        stop = min(end, start + int((horizon_ns - played) * speed) + 2 * int(_SPREAD))
        points = _scale(trace.times(start, stop, placing), stop - start, spec.rate_scale, scaling)
        parts.append(played + points / speed)
        played += (end - start) / speed
    return np.concatenate(parts).astype(np.int64)


def _scale(points: Times, span_ns: int, scale: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """`points` in [0, span_ns), thinned or joined by copies to `scale` times as many in the mean; sorted."""
    if scale == 1.0:
        return points.astype(np.float64)
    # Two numbers per point, drawn together, so that a longer window keeps the fate of its earlier points.
    whole = int(scale)
    drawn = rng.random((len(points), whole + 2))
    copies = whole + (drawn[:, 0] < scale - whole)
    gaps = np.minimum(np.diff(points, append=span_ns), _SPREAD)
    index = np.arange(whole + 1)
    offset = np.where(index == 0, 0.0, drawn[:, 1:]) * gaps[:, None]
    return np.sort((points[:, None] + offset)[index[None, :] < copies[:, None]])
