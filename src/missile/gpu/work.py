"""What a kernel launch asks of a GPU, in hardware-independent terms: the common currency of profiles and the simulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["KernelWork"]


@dataclass(frozen=True, slots=True)
class KernelWork:
    """The work of one kernel launch.

    blocks: thread blocks in the grid.
    threads: threads in a block.
    blocks_per_sm: how many of its blocks fit on one SM at once (occupancy), at least 1.
    read_bytes, write_bytes: bytes that cross the L2 (requested by the SMs, past L1), per launch.
    footprint_bytes: distinct bytes touched; what an L2 that held nothing would fetch from VRAM.
    operations: arithmetic operations (a multiply-add counts two), per launch.
    tensor_ops: True when the operations run on the matrix units.
    solo_ns: measured duration alone on the whole GPU, nanoseconds; 0.0 when never measured.
    recorded_on: the GPU whose graph it was measured in, launch gap included; "" where it is the kernel's time alone.
    bytes_by_color: share of the footprint in each color, for colored launches; empty means all colors evenly.
    """

    blocks: int
    threads: int = 128
    blocks_per_sm: int = 1
    read_bytes: int = 0
    write_bytes: int = 0
    footprint_bytes: int = 0
    operations: int = 0
    tensor_ops: bool = False
    solo_ns: float = 0.0
    recorded_on: str = ""
    bytes_by_color: Mapping[int, float] = field(default_factory=dict)
