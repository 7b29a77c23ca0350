"""From fingerprints to slices, without being told how many there are.

Granules of one slice answer alike, so their fingerprints form a ball whose radius is noise; the balls' distance is the
way across the chip. A threshold between the two scales cuts the nearest-neighbour graph into slices. It is accepted
only where the cut is clear (a gap between the longest edge inside and the shortest between) and the pieces have about
the same size, as a hash that spreads traffic evenly makes them; else `NoisyGpuError` says what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist

from missile.errors import NoisyGpuError
from missile.probe.gf2 import parity

__all__ = ["Cut", "Slices", "cluster", "cut_tree", "spectrum"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

MIN_GAP = 1.5  # shortest edge between slices over longest inside one
MIN_SEPARATION = 3.0  # distance to the nearest other centre over the radius within which 99% of a slice's granules lie
_EVEN = 1.5  # largest slice over smallest, in granules
_STRAY = 0.02  # share of granules that may stand alone (disturbed while measured)
_MAX_SPLITS = 6


@dataclass(frozen=True, slots=True)
class Slices:
    """labels: int64, shape (granules,), slice of each granule, -1 where it is not sure.

    centres: float32, shape (slices, SMs), cycles. radius: distance from the centre within which 99% of a slice's granules lie.
    separation: distance between the two nearest centres. gap: see `MIN_GAP`. splits: masks (over granule index bits)
    by which granules were separated before clustering; empty where fingerprints alone sufficed.
    """

    labels: Ints
    centres: Floats
    radius: float
    separation: float
    gap: float
    splits: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return len(self.centres)

    def nearest(self, fingerprints: Floats) -> Ints:
        """Slice of each fingerprint, shape (n, SMs); -1 where none is near enough or two are."""
        return nearest(fingerprints, self.centres, self.radius)


@dataclass(frozen=True, slots=True)
class Cut:
    """labels: component of each point, -1 for strays. gap: shortest edge cut over longest edge kept."""

    labels: Ints
    count: int
    gap: float


def nearest(fingerprints: Floats, centres: Floats, radius: float) -> Ints:
    """Index of the nearest of `centres` (slices, SMs) to each fingerprint (n, SMs), -1 where that is not sure.

    Sure: within 3 radii of the nearest centre, and at least twice as far from the next.
    """
    out = np.empty(len(fingerprints), np.int64)
    norms = (centres**2).sum(axis=1)
    for start in range(0, len(fingerprints), 1 << 17):
        part = fingerprints[start : start + (1 << 17)]
        squared = norms - 2.0 * (part @ centres.T)
        first = squared.argmin(axis=1)
        rows = np.arange(len(part))
        size = (part**2).sum(axis=1)
        best = np.maximum(squared[rows, first] + size, 0.0)
        squared[rows, first] = np.inf
        second = np.maximum(squared.min(axis=1) + size, 0.0) if len(centres) > 1 else np.full(len(part), np.inf)
        sure = (best <= (3 * radius) ** 2) & (second >= 4 * best)
        out[start : start + len(part)] = np.where(sure, first, -1)
    return out


def cluster(fingerprints: Floats, noise: float) -> Slices:
    """Slices of the granules of one page, in index order; fingerprints float32, shape (granules, SMs).

    noise: standard deviation of one entry, cycles. Raises NoisyGpuError, saying why, where no cut is sure.
    """
    points = fingerprints.astype(np.float64) - fingerprints.mean(axis=0, dtype=np.float64)
    points = _principal(points, noise)
    direct = cut_tree(points, noise)
    if direct is not None:
        return _finish(fingerprints, direct.labels, direct.count, direct.gap, ())
    masks = spectrum(points)
    for splits in range(1, min(_MAX_SPLITS, len(masks)) + 1):
        found = _split_cut(points, masks[:splits], noise)
        if found is not None:
            return _finish(fingerprints, found.labels, found.count, found.gap, tuple(masks[:splits]))
    raise NoisyGpuError(
        f"The fingerprints of {len(points)} granules don't fall into clearly separate slices of even size "
        f"(noise {noise:.2f} cycles); probe again while nothing else runs on the GPU."
    )


def spectrum(points: npt.NDArray[np.float64]) -> list[int]:
    """Masks over granule index bits whose parity the fingerprints follow most, strongest first, linearly independent.

    A Walsh-Hadamard transform of every component over the index; energy well above the median is a heavy coefficient.
    """
    energy = (walsh(points) ** 2).sum(axis=1)
    energy[0] = 0.0
    floor = float(np.median(energy))
    masks: list[int] = []
    spanned = {0}
    for mask in np.argsort(-energy)[:64]:
        if energy[mask] < 20 * floor or len(masks) == 2 * _MAX_SPLITS:
            break
        if int(mask) not in spanned:
            masks.append(int(mask))
            spanned |= {int(mask) ^ other for other in spanned}
    return masks


def walsh(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Walsh-Hadamard transform along axis 0 (a power of two long), divided by its length: the mean of (-1)^parity x value."""
    out = np.array(values, np.float64)
    step = 1
    while step < len(out):
        pairs = out.reshape(-1, 2, step, *out.shape[1:])
        low, high = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
        out = np.stack([low, high], axis=1).reshape(out.shape)
        step *= 2
    return out / len(out)


def cut_tree(points: npt.NDArray[np.float64], noise: float) -> Cut | None:
    """The finest clear and even cut of `points`, shape (n, components); None where there is none."""
    tree = linkage(points, "single")
    lengths = tree[:, 2]
    # Nothing shorter than noise can make in one slice is a cut.
    floor = noise * 1.5
    ratios = lengths[1:] / np.maximum(lengths[:-1], floor)
    for position in np.flatnonzero((ratios >= MIN_GAP) & (lengths[1:] > 2 * floor)):
        limit = (lengths[position] + lengths[position + 1]) / 2
        labels = fcluster(tree, limit, criterion="distance") - 1
        cut = _even(np.asarray(labels, np.int64), float(ratios[position]))
        if cut is not None:
            return cut
    return None


def _even(labels: Ints, gap: float) -> Cut | None:
    sizes = np.bincount(labels)
    usual = float(np.median(np.repeat(sizes, sizes)))
    large = sizes > usual / 4
    if large.sum() < 2 or sizes[~large].sum() > _STRAY * len(labels):
        return None
    if sizes[large].max() > _EVEN * sizes[large].min():
        return None
    renumber = np.full(len(sizes), -1, np.int64)
    renumber[large] = np.arange(large.sum())
    return Cut(renumber[labels], int(large.sum()), gap)


def _split_cut(points: npt.NDArray[np.float64], masks: list[int], noise: float) -> Cut | None:
    """Cut each class of equal parities by itself; None unless all classes cut alike and no two pieces coincide."""
    index = np.arange(len(points))
    classes = sum((parity(index, mask) << i for i, mask in enumerate(masks)), np.zeros(len(points), np.int64))
    labels = np.full(len(points), -1, np.int64)
    count, gap = 0, np.inf
    counts = set()
    for which in range(1 << len(masks)):
        members = np.flatnonzero(classes == which)
        if len(members) < 16:
            return None
        cut = cut_tree(points[members], noise)
        if cut is None:
            return None
        labels[members] = np.where(cut.labels >= 0, cut.labels + count, -1)
        count += cut.count
        counts.add(cut.count)
        gap = min(gap, cut.gap)
    if len(counts) != 1:
        return None
    centres = np.array([points[labels == slice_].mean(axis=0) for slice_ in range(count)])
    apart = cdist(centres, centres)
    np.fill_diagonal(apart, np.inf)
    # The same slice in two classes would have one centre, up to the error of a mean.
    error = noise * (2 * points.shape[1] * count / len(points)) ** 0.5
    return None if apart.min() < 6 * error else Cut(labels, count, gap)


def _finish(fingerprints: Floats, labels: Ints, count: int, gap: float, splits: tuple[int, ...]) -> Slices:
    centres = np.array([np.median(fingerprints[labels == slice_], axis=0) for slice_ in range(count)], np.float32)
    known = labels >= 0
    distance = np.linalg.norm(fingerprints[known] - centres[labels[known]], axis=1)
    radius = float(np.percentile(distance, 99))
    apart = cdist(centres, centres)
    np.fill_diagonal(apart, np.inf)
    separation = float(apart.min())
    if not splits:
        labels = np.where(known, labels, nearest(fingerprints, centres, radius))
    return Slices(labels, centres, radius, separation, gap, splits)


def _principal(points: npt.NDArray[np.float64], noise: float) -> npt.NDArray[np.float64]:
    """Coordinates along the principal components that stand out of the noise: what is left is noise to leave out."""
    axes, scale, _ = np.linalg.svd(points, full_matrices=False)
    keep = scale > 2.0 * noise * (len(points) ** 0.5 + points.shape[1] ** 0.5)
    keep[:1] = True
    return np.asarray(axes[:, keep] * scale[keep], np.float64)
