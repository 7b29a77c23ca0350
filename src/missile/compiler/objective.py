"""The situations that launches are tuned for. Imports nothing, so that a scenario can name one."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Objective", "OverlapChoice"]


class Objective(StrEnum):
    """What it was measured to be fastest in."""

    ALONE = "alone"  # nothing else runs on the GPU
    BESIDE = "beside"  # on a part of the SMs, beside a BE model on the others


class OverlapChoice(StrEnum):
    """What a user may say about the launches of LS models: an objective's name, or that they don't overlap."""

    ALONE = "alone"
    BESIDE = "beside"
    OFF = "off"

    @property
    def objective(self) -> Objective | None:
        """What loading takes for it."""
        return None if self is OverlapChoice.OFF else Objective(self.value)
