"""From a few latency fingerprints a page to its constants, with a margin that says how sure that is.

Two steps, since neighbouring slices can answer so alike that one sample does not tell them apart. Which samples share a
slice depends on the index XOR alone: for the right one, all pairs that it puts on one slice have near fingerprints.
The names then follow by likelihood, summed over all samples, from the list of permutations that pages were seen to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.errors import UnsupportedError
from missile.probe.pages import NO_PAGE, PageModel
from missile.probe.relation import name_page
from missile.probe.slices import Balls, principal_axes

__all__ = ["Matcher", "Metric", "learn_page"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

MARGIN = 25.0  # least difference in squared distance over variance to the next best explanation: e^-12 to be wrong
_CLIP = 60.0  # most that one disturbed sample may count
_NEAR_SHARE = 0.8  # of the pairs that an index XOR puts on one slice, those that must look it
_MISFIT = 4.0  # most by which a sample may on average fit worse than its nearest centre
_MIN_PAIRS = 4
_DRAWS = 8
_CANDIDATES = 4
_SHORTLIST = 16
_FIRST = 12
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Metric:
    """What one pass over the SMs used for pages looks like for each slice.

    sms: SM ids, ascending. centres: float32, shape (balls, SMs), cycles. ball: int64, shape (slices,): which of them each
    slice answers like. sigma: standard deviation of one entry around its centre, cycles. radius: distance from its
    centre, along the directions in which centres differ, within which 99% of the fingerprints lie.
    """

    sms: tuple[int, ...]
    centres: Floats
    ball: Ints
    sigma: float
    radius: float

    @classmethod
    def calibrated(cls, balls: Balls, ball: Ints, sms: Sequence[int], all_sms: Sequence[int], passes: Floats) -> Metric:
        """For `sms` among `all_sms`, from single passes (passes, granules, all SMs) over the page that gave `balls`."""
        columns = [all_sms.index(sm) for sm in sms]
        centres = balls.centres[:, columns]
        known = balls.labels >= 0
        residual = passes[:, known][:, :, columns] - centres[balls.labels[known]]
        sigma = float(np.median(np.abs(residual))) / 0.6745
        axes = _axes(centres)
        radius = float(np.percentile(np.linalg.norm(residual.reshape(-1, len(columns)) @ axes, axis=1), 99))
        return cls(tuple(sms), centres, np.asarray(ball, np.int64), max(sigma, 0.05), max(radius, 0.05))

    def project(self, fingerprints: Floats) -> Floats:
        """Fingerprints (*, SMs) along the directions in which centres differ, from their mean: (*, k)."""
        return np.asarray((fingerprints - self.centres.mean(axis=0)) @ _axes(self.centres), np.float32)

    def costs(self, fingerprints: Floats) -> Floats:
        """Squared distance over variance to every centre, clipped above the least, shape (*, balls)."""
        points, centres = self.project(fingerprints), self.project(self.centres)
        squared = (points**2).sum(axis=-1)[..., None] - 2 * points @ centres.T + (centres**2).sum(axis=1)
        scaled = np.maximum(squared, 0.0) / self.sigma**2
        return np.asarray(np.minimum(scaled, scaled.min(axis=-1, keepdims=True) + _CLIP), np.float32)

    @property
    def near(self) -> float:
        """Distance within which two fingerprints may be of one slice."""
        return 2.0 * self.radius


def _axes(centres: Floats) -> Floats:
    centred = (centres - centres.mean(axis=0)).astype(np.float64)
    return principal_axes(centred, 0.02).astype(np.float32)


class Matcher:
    """Finds constants of pages from samples at granules `indices`, the same in every page.

    The granules are chosen at random, at least `samples`, until each index XOR puts enough pairs of them on one slice.
    """

    def __init__(self, model: PageModel, metric: Metric, samples: int, rng: np.random.Generator) -> None:
        self.model = model
        self.metric = metric
        while True:
            for _ in range(_DRAWS):
                self.indices = np.sort(rng.choice(model.granules, min(samples, model.granules), replace=False))
                if self._prepare():
                    return
            if samples >= model.granules:
                raise UnsupportedError("Not even all granules of a page tell its constants on this GPU.")
            samples += samples // 4

    def match(self, fingerprints: Floats) -> Ints:
        """Constants from fingerprints of shape (pages, samples, SMs); NO_PAGE in rows where none are sure.

        Sure: no sample contradicts, and the next best explanation is worse by `MARGIN`.
        """
        constants = np.full((len(fingerprints), 3), NO_PAGE, np.int64)
        for start in range(0, len(fingerprints), _CHUNK):
            constants[start : start + _CHUNK] = self._match(fingerprints[start : start + _CHUNK])
        return constants

    def _prepare(self) -> bool:
        count = len(self.indices)
        self._left, self._right = np.triu_indices(count, 1)
        origins, weights = [], []
        for which, pattern in enumerate(self.model.patterns):
            shifts = self.model.shifts(which)
            base = pattern[self.indices[None, :] ^ shifts[:, None]].astype(np.int16)
            weights.append((base[:, self._left] == base[:, self._right]).astype(np.float32))
            origins.append(np.stack([np.full(len(shifts), which), shifts], axis=1))
        self.origins, pairs = np.concatenate(origins), np.concatenate(weights)
        total = pairs.sum(axis=1)
        if total.min() < min(_MIN_PAIRS, count // 2):
            return False
        self._weights = (pairs / total[:, None]).T.copy()
        return True

    def _match(self, fingerprints: Floats) -> Ints:
        pages = len(fingerprints)
        constants = np.full((pages, 3), NO_PAGE, np.int64)
        scores = self.scores(fingerprints)
        candidates = min(_CANDIDATES, len(self.origins))
        order = np.argpartition(-scores, candidates - 1, axis=1)[:, :candidates]
        costs = self.metric.costs(fingerprints)
        found: list[tuple[Ints, Ints, Ints, npt.NDArray[np.float64]]] = []
        for column in range(candidates):
            choice = order[:, column]
            rows = np.flatnonzero(scores[np.arange(pages), choice] >= _NEAR_SHARE)
            if rows.size:
                names, cost = self._names(costs[rows], choice[rows])
                found.append((rows, choice[rows], names, cost))
        best = np.full((pages, 2), np.inf)
        for rows, choice, names, cost in found:
            better = cost[:, 0] < best[rows, 0]
            # The loser of the two, or the runner-up under the winner's own shift, is the next best explanation.
            best[rows, 1] = np.minimum(np.maximum(best[rows, 0], cost[:, 0]), np.minimum(best[rows, 1], cost[:, 1]))
            best[rows, 0] = np.minimum(best[rows, 0], cost[:, 0])
            won = rows[better]
            constants[won, :2] = self.origins[choice[better]]
            constants[won, 2] = names[better]
        ideal = costs.min(axis=2).sum(axis=1)
        count = len(self.indices)
        # Infinite where no origin was a candidate at all.
        some = np.isfinite(best[:, 0])
        sure = some & (best[:, 0] - ideal <= _MISFIT * count)
        sure[some] &= best[some, 1] - best[some, 0] >= MARGIN
        constants[~sure] = NO_PAGE
        return constants

    def scores(self, fingerprints: Floats) -> Floats:
        """Share of the pairs that each origin puts on one slice whose fingerprints are near, shape (pages, origins)."""
        centred = self.metric.project(fingerprints)
        squares = (centred**2).sum(axis=2)
        inner = centred @ centred.transpose(0, 2, 1)
        squared = squares[:, self._left] + squares[:, self._right] - 2 * inner[:, self._left, self._right]
        return np.asarray((squared <= self.metric.near**2).astype(np.float32) @ self._weights, np.float32)

    def _names(self, costs: Floats, choice: Ints) -> tuple[Ints, npt.NDArray[np.float64]]:
        """The best permutation for each page under one origin each, and the costs of the best two, shape (rows, 2)."""
        patterns, permutations = np.array(self.model.patterns), self.metric.ball[np.array(self.model.permutations)]
        origin = self.origins[choice]
        base = patterns[origin[:, 0, None], self.indices[None, :] ^ origin[:, 1, None]]
        every = np.arange(len(costs))
        rows = every[:, None]
        short = np.broadcast_to(np.arange(len(permutations)), (len(costs), len(permutations)))
        if len(permutations) > _SHORTLIST:
            first = np.zeros((len(costs), len(permutations)), np.float32)
            for sample in range(min(_FIRST, len(self.indices))):
                first += costs[rows, sample, permutations[:, base[:, sample]].T]
            short = np.argpartition(first, _SHORTLIST - 1, axis=1)[:, :_SHORTLIST]
        total = np.zeros_like(short, np.float64)
        for sample in range(len(self.indices)):
            total += costs[rows, sample, permutations[short, base[:, sample, None]]]
        if len(permutations) == 1:
            return short[:, 0].copy(), np.stack([total[:, 0], np.full(len(total), np.inf)], axis=1)
        two = np.argpartition(total, 1, axis=1)[:, :2]
        two = np.take_along_axis(two, np.take_along_axis(total, two, 1).argsort(axis=1), 1)
        return short[every, two[:, 0]], np.take_along_axis(total, two, 1)


def learn_page(model: PageModel, metric: Metric, fingerprints: Floats) -> Ints | None:
    """Constants of a wholly measured page (granules, SMs), adding the permutation that it uses; None where nothing fits.

    All granules of a slice together name it: sums over them are sharp where single fingerprints are not.
    """
    every = np.arange(model.granules)
    matcher = Matcher(model, metric, min(128, model.granules), np.random.default_rng(model.granules))
    scores = matcher.scores(fingerprints[None, matcher.indices])[0]
    costs = metric.costs(fingerprints)
    for choice in np.argsort(-scores)[:8]:
        if scores[choice] < _NEAR_SHARE:
            break
        which, shift = (int(value) for value in matcher.origins[choice])
        base = model.patterns[which][every ^ shift]
        summed = np.zeros((model.slices, costs.shape[1]))
        np.add.at(summed, base, costs)
        images = summed.argmin(axis=1)
        two = np.partition(summed, 1, axis=1)[:, :2] if summed.shape[1] > 1 else np.array([[0.0, np.inf]])
        # A sample far from where the model puts it contradicts it, however well the others fit.
        excess = costs[every, images[base]] - costs.min(axis=1)
        if (two[:, 1] - two[:, 0] < MARGIN).any() or (excess >= _CLIP).mean() > 0.002 or excess.mean() > _MISFIT:
            continue
        name = name_page(model, metric.ball, images)
        if name != NO_PAGE:
            return np.array([which, shift, name])
    return None
