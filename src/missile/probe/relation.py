"""Slices from several wholly measured pages, and how the pages relate: what latency alone can't tell apart, this can.

Two slices that stand side by side may answer alike from every SM: a *ball* of fingerprints then holds both. Another
page, its index shifted by the right XOR, puts the same sets of granules on other slices, and hardly all of them on such
twins: the common refinement of the pages' balls is the slices. Pure arithmetic.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.errors import NoisyGpuError
from missile.probe.pages import NO_PAGE, PageModel

__all__ = ["Related", "name_page", "relate"]

Ints = npt.NDArray[np.int64]

_EVEN = 1.5  # largest slice over smallest, in granules
_PROBE = 512
_MAX_SHIFTS = 24  # index XORs of one page that are used to refine
_MAX_NAMINGS = 4096
_GROUP_LIMITS = (32, 128, 512, 1024)  # small groups are sought first: large ones take long to generate
_CLEARLY = 2  # times as many permutations as the right naming generates, any other must


@dataclass(frozen=True, slots=True)
class Related:
    """model: what the pages have in common. ball: int64, shape (slices,), which ball each slice is in.

    constants: int64, shape (pages, 3), of the pages given; NO_PAGE where a page fits nothing.
    """

    model: PageModel
    ball: Ints
    constants: Ints


def relate(balls: Ints) -> Related:
    """From the ball of every granule of some pages, shape (pages, granules), to slices and the pages' constants.

    Raises NoisyGpuError when the slices come out uneven: then some still hide behind others.
    """
    count = int(balls.max()) + 1
    unit = int(np.bincount(balls[0], minlength=count).min())
    classes = balls[0]
    for page in balls:
        for shift in _shifts(balls[0], page, unit)[:_MAX_SHIFTS]:
            cells = _joint(classes, page[np.arange(len(page)) ^ shift])
            if np.bincount(cells).min() * 2 > unit:
                classes = cells
    sizes = np.bincount(classes)
    if sizes.max() > _EVEN * sizes.min():
        raise NoisyGpuError(
            f"{count} latency classes were found, but some hold {sizes.max()} granules of a page and some {sizes.min()}: "
            "slices that answer alike could not be told apart."
        )
    ball = np.empty(len(sizes), np.int64)
    ball[classes] = balls[0]
    model = PageModel(len(sizes), len(classes), [classes])
    constants = np.array([_place(model, ball, page) for page in balls])
    return Related(model, ball, constants)


def name_page(model: PageModel, ball: Ints, images: Ints) -> int:
    """The permutation that takes each slice of a pattern to a slice in ball `images[slice]`; NO_PAGE where none is sure.

    Where a ball holds several slices their order is open. The right one is that with which the permutations stay a
    small group: they come from a hash, and a wrong guess generates many more. (With few slices that is no proof: the
    contention witness tests such twins on the GPU.)
    """
    known = [place for place, item in enumerate(model.permutations) if np.array_equal(ball[item], images)]
    if known:
        return known[0] if len(known) == 1 else NO_PAGE
    if not np.array_equal(np.bincount(images, minlength=ball.max() + 1), np.bincount(ball)):
        return NO_PAGE
    places = [(np.flatnonzero(images == which), np.flatnonzero(ball == which)) for which in np.unique(ball)]
    open_ = [pair for pair in places if len(pair[0]) > 1]
    namings = 1
    for classes, _ in open_:
        namings *= int(np.prod(np.arange(1, len(classes) + 1)))
    if namings > _MAX_NAMINGS:
        return NO_PAGE
    permutation = np.empty(model.slices, np.int64)
    for classes, slices in places:
        permutation[classes] = slices
    if namings == 1:
        return model.add_permutation(permutation)
    candidates = []
    for orders in itertools.product(*(itertools.permutations(slices) for _, slices in open_)):
        for (classes, _), order in zip(open_, orders, strict=True):
            permutation[classes] = order
        candidates.append(permutation.copy())
    for limit in _GROUP_LIMITS:
        sizes = [(len(model.closure(candidate, limit) or ()), place) for place, candidate in enumerate(candidates)]
        small = sorted(pair for pair in sizes if pair[0])
        if small:
            size, place = small[0]
            rivals = sum(model.closure(candidate, _CLEARLY * size - 1) is not None for candidate in candidates)
            return model.add_permutation(candidates[place]) if rivals == 1 else NO_PAGE
    return NO_PAGE


def _place(model: PageModel, ball: Ints, page: Ints) -> Ints:
    index = np.arange(len(page))
    unit = int(np.bincount(model.patterns[0]).min())
    for which, pattern in enumerate(model.patterns):
        for shift in _shifts(pattern, page, unit):
            base = pattern[index ^ shift]
            images = np.empty(model.slices, np.int64)
            images[base] = page
            if np.array_equal(images[base], page):
                name = name_page(model, ball, images)
                if name != NO_PAGE:
                    return np.array([which, shift, name])
    return np.full(3, NO_PAGE)


def _shifts(left: Ints, right: Ints, unit: int) -> Ints:
    """Index XORs under which `left` and `right` cut the page into few common cells, none much smaller than `unit`."""
    granules = len(left)
    rng = np.random.default_rng(granules)
    probe = rng.choice(granules, min(_PROBE, granules), replace=False)
    names = int(right.max()) + 1
    cells = []
    for part in np.array_split(np.arange(granules), max(1, granules // 512)):
        joint = np.sort(left[probe[None, :] ^ part[:, None]] * names + right[probe], axis=1)
        cells.append(1 + (np.diff(joint, axis=1) > 0).sum(axis=1))
    count = np.concatenate(cells)
    most = 2 * granules // unit
    found: list[int] = []
    for shift in np.argsort(count, kind="stable"):
        if count[shift] > most or len(found) == _MAX_SHIFTS:
            break
        if np.bincount(_joint(left[np.arange(granules) ^ shift], right)).min() * 2 > unit:
            found.append(int(shift))
    return np.sort(np.array(found, np.int64))


def _joint(left: Ints, right: Ints) -> Ints:
    return np.asarray(np.unique(left * (int(right.max()) + 1) + right, return_inverse=True)[1], np.int64)
