"""From fingerprints to balls: sets of granules that answer alike from every SM, without being told how many there are.

Granules of one slice answer alike, so their fingerprints form a ball whose radius is noise; the balls' distance is the
way across the chip. A threshold between the two scales cuts the nearest-neighbour tree. A cut is accepted only where it
is clear (a gap between the longest edge kept and the shortest cut), where nothing but noise is left inside the balls,
and where the balls hold about as many granules each (or small multiples: twins, which `relation` tells apart), as a hash
that spreads traffic evenly makes them. Else `NoisyGpuError` says what was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist

from missile.errors import NoisyGpuError

__all__ = ["Balls", "find_balls", "principal_axes", "spectral_strength", "walsh"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MIN_GAP = 1.5  # shortest edge between balls over longest inside one
MAX_SPREAD = 1.6  # root mean square of what is left inside a ball, over noise
MAX_SIZE_RATIO = 4.5  # largest ball over smallest: up to four slices that answer alike
_STRAY = 0.01  # share of granules that may stand alone (disturbed while measured)
_MAX_CUTS = 40


@dataclass(frozen=True, slots=True)
class Balls:
    """centres: float32, shape (balls, SMs), cycles. axes: float32, shape (SMs, k), orthonormal: the directions in which
    they differ. labels: int64, shape (granules,), of the page they were found in. radius: distance from the centre,
    along the axes, within which 99% of a ball's granules lie. separation: distance of the two nearest centres.
    gap: see `MIN_GAP`. noise: standard deviation of one entry of those fingerprints, cycles.
    """

    centres: Floats
    axes: Floats
    labels: Ints
    radius: float
    separation: float
    gap: float
    noise: float

    @property
    def count(self) -> int:
        return len(self.centres)

    def refined(self, fingerprints: Floats, noise: float) -> Balls:
        """The same balls, described anew by better fingerprints of the same granules."""
        return _describe(fingerprints, self.labels.copy(), self.gap, noise)

    def nearest(self, fingerprints: Floats) -> Ints:
        """Ball of each fingerprint, shape (n, SMs): -1 unless it is twice as far from the next ball as from its own."""
        distance = self._distances(fingerprints)
        two = np.partition(distance, 1, axis=1)
        return np.where(two[:, 1] >= 2 * two[:, 0], distance.argmin(axis=1), -1)

    def expected(self, fingerprints: Floats) -> Floats:
        """Centre of the ball nearest to each fingerprint, shape (n, SMs)."""
        return np.asarray(self.centres[self._distances(fingerprints).argmin(axis=1)], np.float32)

    def _distances(self, fingerprints: Floats) -> Doubles:
        origin = self.centres.mean(axis=0)
        return np.asarray(cdist((fingerprints - origin) @ self.axes, (self.centres - origin) @ self.axes), np.float64)


def find_balls(fingerprints: Floats, noise: float) -> Balls:
    """Balls of the granules of one page; fingerprints float32, shape (granules, SMs), noise of one entry in cycles.

    Raises NoisyGpuError, saying why, where no cut is sure.
    """
    origin = fingerprints.mean(axis=0, dtype=np.float64)
    points = _principal(fingerprints - origin, noise)
    tree = linkage(points, "single")
    lengths = tree[:, 2]
    # Noise spreads a ball over every direction that is kept: nothing shorter than this is a cut.
    floor = noise * max(1.0, points.shape[1] ** 0.5 / 2)
    ratios = lengths[1:] / np.maximum(lengths[:-1], floor)
    reason = "no gap stands out between distances inside a slice and between slices"
    for position in np.flatnonzero(ratios >= MIN_GAP)[-_MAX_CUTS:]:
        labels = np.asarray(fcluster(tree, (lengths[position] + lengths[position + 1]) / 2, "distance"), np.int64) - 1
        kept = _sizeable(labels)
        if kept is None:
            continue
        inside = _spread(fingerprints, kept)
        if inside > MAX_SPREAD * noise:
            reason = f"{kept.max() + 1} groups stand out but differ within ({inside:.2f} cycles, noise is {noise:.2f})"
            continue
        return _describe(fingerprints, kept, float(ratios[position]), noise)
    raise NoisyGpuError(
        f"The fingerprints of {len(fingerprints)} granules don't fall into clearly separate slices: {reason}; "
        "probe again while nothing else runs on the GPU."
    )


def spectral_strength(points: Doubles, masks: Sequence[int]) -> list[float]:
    """How strongly the fingerprints follow the parity of each mask over granule index bits: energy over the median's.

    points: shape (granules, components), granules in index order. A Walsh-Hadamard transform of every component: it
    needs no slices, so it can contradict them.
    """
    energy = (walsh(points - points.mean(axis=0)) ** 2).sum(axis=1)
    floor = max(float(np.median(energy)), 1e-12)
    return [float(energy[mask]) / floor for mask in masks]


def walsh(values: Doubles) -> Doubles:
    """Walsh-Hadamard transform along axis 0 (a power of two long): the mean of (-1)^parity(index & mask) x value."""
    out = np.array(values, np.float64)
    step = 1
    while step < len(out):
        pairs = out.reshape(-1, 2, step, *out.shape[1:])
        low, high = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
        out = np.stack([low, high], axis=1).reshape(out.shape)
        step *= 2
    return out / len(out)


def principal_axes(points: Doubles, noise: float) -> Doubles:
    """Orthonormal directions, shape (SMs, k), along which centred `points` (n, SMs) spread by more than noise can."""
    _, scale, axes = np.linalg.svd(points, full_matrices=False)
    keep = scale > 1.5 * noise * (len(points) ** 0.5 + points.shape[1] ** 0.5)
    keep[:1] = True
    return np.asarray(axes[keep].T, np.float64)


def _principal(points: Doubles, noise: float) -> Doubles:
    return np.asarray(points @ principal_axes(points, noise), np.float64)


def _sizeable(labels: Ints) -> Ints | None:
    """`labels` renumbered with strays as -1; None where there are too many of them or the sizes are too different."""
    sizes = np.bincount(labels)
    usual = float(np.median(np.repeat(sizes, sizes)))
    large = sizes > usual / (2 * MAX_SIZE_RATIO)
    if large.sum() < 2 or sizes[~large].sum() > _STRAY * len(labels):
        return None
    if sizes[large].max() > MAX_SIZE_RATIO * sizes[large].min():
        return None
    renumber = np.full(len(sizes), -1, np.int64)
    renumber[large] = np.arange(large.sum())
    return np.asarray(renumber[labels], np.int64)


def _spread(fingerprints: Floats, labels: Ints) -> float:
    """Root mean square distance from the centre in the widest ball, per entry."""
    return max(
        float(np.median((part - part.mean(axis=0)).std(axis=1)))
        for part in (fingerprints[labels == which] for which in range(labels.max() + 1))
    )


def _describe(fingerprints: Floats, labels: Ints, gap: float, noise: float) -> Balls:
    centres = np.array([np.median(fingerprints[labels == b], axis=0) for b in range(labels.max() + 1)], np.float32)
    origin = centres.mean(axis=0)
    sizes = np.bincount(labels[labels >= 0])
    axes = principal_axes((centres - origin).astype(np.float64), noise / float(sizes.mean()) ** 0.5).astype(np.float32)
    known = labels >= 0
    distance = np.linalg.norm((fingerprints[known] - centres[labels[known]]) @ axes, axis=1)
    apart = cdist((centres - origin) @ axes, (centres - origin) @ axes)
    np.fill_diagonal(apart, np.inf)
    balls = Balls(centres, axes, labels, float(np.percentile(distance, 99)), float(apart.min()), gap, noise)
    strays = np.flatnonzero(~known)
    labels[strays] = balls.nearest(fingerprints[strays])
    return balls
