"""What a tenant is entitled to on the link, in one direction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from missile.errors import MisuseError

__all__ = ["MIB", "NICE_ZERO", "Share", "nice_weight"]

MIB: Final = 1 << 20

NICE_ZERO: Final = 1024
"""Weight of nice 0: integer weights are multiples of 1/1024 of it."""

# Linux, kernel/sched/core.c, `sched_prio_to_weight`: nice -20 to 19. One level apart is about 1.25x,
# that is 10% of the link between two tenants.
# fmt: off
_NICE_WEIGHTS: Final = (
    88761, 71755, 56483, 46273, 36291, 29154, 23254, 18705, 14949, 11916,
    9548, 7620, 6100, 4904, 3906, 3121, 2501, 1991, 1586, 1277,
    1024, 820, 655, 526, 423, 335, 272, 215, 172, 137,
    110, 87, 70, 56, 45, 36, 29, 23, 18, 15,
)
# fmt: on


def nice_weight(nice: int) -> float:
    """Weight of a nice level, relative to nice 0 (= 1.0), after Linux's table. MisuseError outside -20..19."""
    if not -20 <= nice <= 19:
        raise MisuseError(f"Nice level {nice} is outside -20..19.")
    return _NICE_WEIGHTS[nice + 20] / NICE_ZERO


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A tenant's entitlement. Checked when made: MisuseError names the field.

    weight: relative to nice 0 = 1.0; resolution 1/1024.
    latency_sensitive: its copies go in short chunks, may be queued behind fewer bytes, and wake ahead of others.
    limit: at most this many bytes/s (None: no limit), after a burst of at most `burst_bytes`.
    minimum: at least this many bytes/s while it has copies waiting, whatever the others ask (0: none).
    """

    weight: float = 1.0
    latency_sensitive: bool = False
    limit: float | None = None
    burst_bytes: int = 16 * MIB
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise MisuseError(f"PCIe weight must be a positive number, not {self.weight}.")
        if not math.isfinite(self.minimum) or self.minimum < 0:
            raise MisuseError(f"Guaranteed PCIe minimum must be at least 0 bytes/s, not {self.minimum}.")
        if self.burst_bytes <= 0:
            raise MisuseError(f"PCIe burst must be a positive number of bytes, not {self.burst_bytes}.")
        if self.limit is None:
            return
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise MisuseError(f"PCIe rate limit must be a positive number of bytes/s, not {self.limit}.")
        if self.limit < self.minimum:
            raise MisuseError(
                f"PCIe rate limit {self.limit:g} bytes/s is below the guaranteed minimum {self.minimum:g} bytes/s."
            )

    @classmethod
    def of_nice(cls, nice: int, *, latency_sensitive: bool = False) -> Share:
        """A share with the weight of a nice level."""
        return cls(weight=nice_weight(nice), latency_sensitive=latency_sensitive)

    @property
    def units(self) -> int:
        """The weight as an integer, nice 0 = 1024, at least 1."""
        return max(1, round(self.weight * NICE_ZERO))
