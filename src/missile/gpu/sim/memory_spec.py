"""The `[memory]` table of a simulated GPU's spec: what its memory looks like to someone who measures it.

An example with every kind of entry (masks are over *physical address* bits; bit 0 is the lowest):

    [memory]
    note = "made up"                       # where the numbers come from
    page_bytes = 2097152                   # physical pages; contiguous only within one
    slices_per_channel = 2                 # slices s and s+1 of one channel stand next to each other

    [memory.hash]
    masks = [0x40000B3000, 0x18A000]       # linear bits: parity(address & mask); bit i counts 2**i
    [[memory.hash.digits]]                 # then the digits, each counting (2**masks x the bases before it)
    base = 5
    folds = [0x2400, 0x4800, 0x9100]       # v = sum of parity(address & folds[i]) << i
    weights = [1, 2, 4]                    # "sum": digit = sum of weights[i] * parity(address & folds[i]) mod base
    [[memory.hash.digits]]
    base = 3
    folds = [0x2400, 0x4800, 0x9100, 0x80100]
    table_seed = 7                         # "table": digit = a balanced random table of v; no formula at all
    shifts = [0x200000]                    # either kind: digit += 1 for every odd parity(address & shifts[i])

    [memory.latency]                       # SM clock cycles
    base = 270.0                           # the nearest slice
    half = 30.0                            # more for a slice of the other half of the chip (0: one half)
    spread = 8.0                           # standard deviation of (SM group, slice) offsets: the way across the chip
    groups = 8                             # groups of SMs that stand together
    noise = 0.5                            # standard deviation of one chain's mean latency
    drift = 1.0                            # amplitude of slow drift when all SMs measure at once
    disturbance = 0.0                      # share of the measurements that other work on the GPU hits
    coincide = 1                           # this many neighbouring slices answer alike from every SM

    [memory.rates]                         # bytes per SM clock cycle and hertz
    slice_read = 64.0
    slice_write = 32.0
    channel = 24.0
    sm = 64.0
    clock_hz = 1.5e9
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from missile.errors import MisuseError
from missile.validation import first_problem

__all__ = ["DigitSpec", "HashSpec", "LatencySpec", "MemorySpec", "RateSpec", "parse_memory_spec"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DigitSpec(_Frozen):
    """One digit of the slice number that is not XOR-linear. Exactly one of `weights` and `table_seed` is given."""

    base: int = Field(ge=2, le=256)
    folds: tuple[int, ...] = Field(min_length=1, max_length=24)
    weights: tuple[int, ...] | None = None
    table_seed: int | None = None
    shifts: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> DigitSpec:
        if (self.weights is None) == (self.table_seed is None):
            raise ValueError("a digit has either weights or a table_seed")
        if self.weights is not None and len(self.weights) != len(self.folds):
            raise ValueError("a digit has as many weights as folds")
        if self.table_seed is not None and 1 << len(self.folds) < self.base:
            raise ValueError("a table needs at least log2(base) folds")
        return self


class HashSpec(_Frozen):
    """Physical address to slice: linear bits, then digits. `masks` over physical address bits."""

    masks: tuple[int, ...] = ()
    digits: tuple[DigitSpec, ...] = ()

    @property
    def slices(self) -> int:
        count = 1 << len(self.masks)
        for digit in self.digits:
            count *= digit.base
        return count


class LatencySpec(_Frozen):
    """Latency of one load past L1, SM clock cycles."""

    base: float = Field(default=270.0, gt=0)
    half: float = Field(default=30.0, ge=0)
    spread: float = Field(default=8.0, ge=0)
    groups: int = Field(default=8, ge=1)
    noise: float = Field(default=0.5, ge=0)
    drift: float = Field(default=1.0, ge=0)
    disturbance: float = Field(default=0.0, ge=0, le=1)
    coincide: int = Field(default=1, ge=1)


class RateSpec(_Frozen):
    """What slices, channels and SMs move, bytes per cycle of `clock_hz`."""

    slice_read: float = Field(default=64.0, gt=0)
    slice_write: float = Field(default=32.0, gt=0)
    channel: float = Field(default=24.0, gt=0)
    sm: float = Field(default=64.0, gt=0)
    clock_hz: float = Field(default=1.5e9, gt=0)


class MemorySpec(_Frozen):
    """The memory side of a simulated GPU. Sizes in bytes; two of them come from the spec's other tables."""

    note: str = ""
    page_bytes: int = Field(default=2 << 20, ge=4096)
    memory_bytes: int = Field(gt=0)
    l2_bytes: int = Field(gt=0)
    slices_per_channel: int = Field(default=1, ge=1)
    hash: HashSpec
    latency: LatencySpec = LatencySpec()
    rates: RateSpec = RateSpec()

    @field_validator("page_bytes")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("page_bytes is a power of two")
        return value

    @model_validator(mode="after")
    def _divides(self) -> MemorySpec:
        if self.memory_bytes % self.page_bytes:
            raise ValueError("memory_bytes is a whole number of pages")
        if self.hash.slices % self.slices_per_channel:
            raise ValueError("slices_per_channel divides the number of slices")
        return self

    @property
    def slices(self) -> int:
        return self.hash.slices

    @property
    def channels(self) -> int:
        return self.slices // self.slices_per_channel


def parse_memory_spec(table: dict[str, Any], where: str, *, memory_bytes: int, l2_bytes: int) -> MemorySpec:
    """The `[memory]` table of the spec at `where`. MisuseError names the first field that is wrong.

    `memory_bytes` (what is over a whole number of pages is left out) and `l2_bytes` come from the spec's other tables.
    """
    page_bytes = table.get("page_bytes", MemorySpec.model_fields["page_bytes"].default)
    if isinstance(page_bytes, int) and page_bytes > 0:
        memory_bytes -= memory_bytes % page_bytes
    try:
        return MemorySpec.model_validate({**table, "memory_bytes": memory_bytes, "l2_bytes": l2_bytes})
    except ValidationError as error:
        raise MisuseError(f"{where}: {first_problem(error, 'memory')}.") from error
