"""The situations that launches are tuned for. Imports nothing, so that a scenario can name one."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Objective"]


class Objective(StrEnum):
    """What it was measured to be fastest in."""

    ALONE = "alone"  # nothing else runs on the GPU
    BESIDE = "beside"  # on a part of the SMs, beside a BE model on the others
