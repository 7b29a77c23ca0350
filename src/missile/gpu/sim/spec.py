"""The spec of a simulated GPU: what a TOML file says, checked. docs/simulator.md explains every field with an example."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from missile.errors import MisuseError
from missile.validation import first_problem

__all__ = ["Faults", "GpuSpec", "builtin_specs", "load_spec"]

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SmTable(_Table):
    """The streaming multiprocessors. Operations count a multiply-add as two."""

    count: Count
    clock_mhz: Positive
    operations_per_clock: Positive  # per SM, single precision
    tensor_operations_per_clock: Positive  # per SM, dense half precision on the matrix units (no units: the plain rate)
    granularity: Count = 8  # partitions come in multiples of this
    minimum: Count = 8
    max_threads: Count = 2048
    max_blocks: Annotated[int, Field(gt=0, le=64)] = 32
    shared_kib: Count = 96


class L2Table(_Table):
    mib: Positive
    bandwidth_gb_s: Positive
    colors: Annotated[int, Field(ge=1, le=64)] = 8  # equal parts of L2 and VRAM that launches may be confined to


class VramTable(_Table):
    gib: Positive
    bandwidth_gb_s: Positive  # the datasheet's
    efficiency: Annotated[float, Field(gt=0, le=1)] = 0.92  # share of it that kernels can have


class LinkTable(_Table):
    """The host link. A copy holds its engine for `overhead_ns + bytes / rate`; `latency_ns` passes before it may start."""

    h2d_gb_s: Positive
    d2h_gb_s: Positive
    overhead_ns: NonNegative = 2600
    latency_ns: NonNegative = 3000
    switch_ns: NonNegative = 3600  # between a kernel or a copy and the stream's next copy, on another engine
    busy_switch_ns: NonNegative = 5500  # the same while kernels of other streams run


class HostTable(_Table):
    """What calls cost the host thread, and how long work takes from the call to the GPU. All in ns.

    The calls' defaults were measured through `missile.gpu.cuda` on an H200's host (driver 580, Python 3.12).
    """

    launch_ns: NonNegative = 5200
    graph_ns: NonNegative = 2500
    copy_ns: NonNegative = 2850
    record_ns: NonNegative = 1900
    query_ns: NonNegative = 670
    latency_ns: NonNegative = 2500

    def slower(self, factor: float) -> HostTable:
        """With calls that cost `factor` times as much; the way from the call to the GPU stays as long."""
        calls = ("launch_ns", "graph_ns", "copy_ns", "record_ns", "query_ns")
        return self.model_copy(update={name: getattr(self, name) * factor for name in calls})


class SharingTable(_Table):
    """Constants of the contention model (docs/simulator.md gives the formulas)."""

    graph_gap_ns: NonNegative = 700  # between two kernels of a graph
    overlapped_gap_ns: NonNegative = 270  # the same, where the second may start while the first runs
    stream_gap_ns: NonNegative = 1200  # between two launches in a stream
    frontend_ns: NonNegative = 5000  # gap added per neighbour that does nothing but launch
    code_fetch_ns: NonNegative = 450  # what a launch takes longer whose code L2 held when alone and holds no more
    headroom: Annotated[float, Field(ge=0, lt=1)] = (
        0.9  # share of a bandwidth-bound kernel's time that more SMs don't shorten
    )
    crowding: NonNegative = 0.15  # time that one more block of a kernel on an SM costs, over that of its first wave
    queueing_ns: NonNegative = 60  # added to each memory round trip at half of VRAM's rate
    queueing_limit: Annotated[float, Field(gt=0, lt=1)] = 0.97  # load beyond which queues grow no more
    write_load: NonNegative = 0.25  # what a written byte adds to the load of VRAM beyond what a read one does
    memory_latency_ns: Positive = 600
    loads_in_flight: Positive = 40  # 16-byte loads that one thread keeps in flight


class NoiseTable(_Table):
    """Standard deviations of log-normal factors on durations. 0 switches noise off."""

    kernel: Annotated[float, Field(ge=0, le=1)] = 0.01
    copy_: Annotated[float, Field(ge=0, le=1, alias="copy")] = 0.01


class KernelFault(_Table):
    """The `launch`-th launch (from 1) of kernels called `kernel` faults when it runs; the context is lost."""

    kernel: str
    launch: Count = 1


class CopyFault(_Table):
    """The `copy_number`-th copy (from 1) in `direction` fails in its call; everything else works on."""

    direction: Literal["h2d", "d2h"]
    copy_number: Count = 1


class Faults(_Table):
    """Faults to inject, so that error paths can be tried without hardware."""

    kernels: tuple[KernelFault, ...] = ()
    copies: tuple[CopyFault, ...] = ()


class GpuSpec(_Table):
    """One simulated GPU."""

    name: Annotated[str, Field(min_length=1)]
    compute_capability: tuple[int, int]
    sm: SmTable
    l2: L2Table
    vram: VramTable
    link: LinkTable
    host: HostTable = HostTable()
    sharing: SharingTable = SharingTable()
    noise: NoiseTable = NoiseTable()
    faults: Faults = Faults()
    memory: dict[str, Any] | None = None  # the address hash: see `memory_spec`

    @property
    def memory_bytes(self) -> int:
        return int(self.vram.gib * 2**30)

    @property
    def l2_bytes(self) -> int:
        return int(self.l2.mib * 2**20)

    @property
    def vram_rate(self) -> float:
        """Bytes per ns that kernels can have from VRAM."""
        return self.vram.bandwidth_gb_s * self.vram.efficiency

    def operation_rate(self, tensor: bool) -> float:
        """Operations per ns of the whole GPU."""
        per_clock = self.sm.tensor_operations_per_clock if tensor else self.sm.operations_per_clock
        return self.sm.count * per_clock * self.sm.clock_mhz / 1000


def load_spec(name_or_path: str) -> GpuSpec:
    """The spec called `name_or_path` ("h100"), or in that file (when it ends in ".toml").

    Raises MisuseError for an unknown name (naming the known), a missing or broken file and a bad field (naming it).
    """
    if not name_or_path.endswith(".toml"):
        known = builtin_specs()
        if name_or_path not in known:
            raise MisuseError(f"Unknown simulated GPU {name_or_path!r}; known: {', '.join(known)}, or PATH.toml.")
        return known[name_or_path]
    try:
        text = Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"Spec {name_or_path} can't be read: {error}.") from error
    return _parse(text, name_or_path)


@functools.cache
def builtin_specs() -> dict[str, GpuSpec]:
    """The specs that ship with Missile, by name."""
    directory = resources.files("missile.gpu.sim").joinpath("specs")
    files = sorted((f for f in directory.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): _parse(f.read_text(encoding="utf-8"), f.name) for f in files}


def _parse(text: str, source: str) -> GpuSpec:
    try:
        return GpuSpec.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise MisuseError(f"Spec {source} is not TOML: {error}.") from error
    except ValidationError as error:
        raise MisuseError(f"Spec {source}: {first_problem(error)}.") from error
