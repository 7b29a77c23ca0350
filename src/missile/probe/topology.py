"""Where SMs stand, from the latency of every slice as they see it. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage

from missile.probe.channel_map import Topology

__all__ = ["find_topology"]

Floats = npt.NDArray[np.float32]

_CLEAR = 0.3  # in a chip of two halves, no slice's step from half to half is less than this share of the usual one
_MIN_STEP = 5.0  # cycles


def find_topology(centres: Floats, sms: Sequence[int]) -> Topology:
    """From the latency of each slice (rows) to each of `sms` (columns), cycles: groups of SMs and halves of the chip."""
    profile = centres - centres.mean(axis=0) - centres.mean(axis=1, keepdims=True) + centres.mean()
    groups = _groups(profile.T, sms)
    axis = np.linalg.svd(profile, full_matrices=False)[2][0]
    half = (axis > 0).astype(np.int64)
    if 0 < half.sum() < len(half):
        step = centres[:, half == 1].mean(axis=1) - centres[:, half == 0].mean(axis=1)
        usual = float(np.median(np.abs(step)))
        if usual >= _MIN_STEP and np.abs(step).min() >= _CLEAR * usual:
            near = (step < 0).astype(np.int64)
            return Topology(tuple(sms), groups, tuple(half.tolist()), tuple(near.tolist()), round(usual, 2))
    return Topology(tuple(sms), groups, (0,) * len(sms), (-1,) * len(centres), 0.0)


def _groups(profiles: Floats, sms: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """SMs whose profiles are near each other, cut where merging gets suddenly more expensive."""
    if len(sms) < 3:
        return (tuple(sms),)
    tree = linkage(profiles, "average")
    heights = tree[:, 2]
    most = len(sms) // 2
    # From 2 groups to half as many as SMs: the cut before the greatest relative jump.
    candidates = np.arange(len(heights) - most, len(heights))
    jumps = heights[candidates] / np.maximum(heights[candidates - 1], 1e-6)
    cut = candidates[int(jumps.argmax())]
    labels = fcluster(tree, (heights[cut] + heights[cut - 1]) / 2, "distance")
    members = [tuple(sms[int(i)] for i in np.flatnonzero(labels == label)) for label in np.unique(labels)]
    return tuple(sorted(members))
