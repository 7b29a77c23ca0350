"""The hash of a page from its slices: the XOR-linear part, exactly, and digits with tables for the rest. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from missile.probe.gf2 import complement, parity
from missile.probe.layout import PageLayout
from missile.probe.pages import PageModel

__all__ = ["Digit", "Structure", "describe", "frame_colors", "linear_masks", "renamed"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Digit:
    """A digit of the slice number that no XOR of address bits gives. table: int64, shape (granules,), by granule index."""

    base: int
    table: Ints


@dataclass(frozen=True, slots=True)
class Structure:
    """slice = sum of parity(index & masks[i]) << i, plus 2**len(masks) x digit, on the reference page.

    masks: over granule index bits, reduced echelon form, highest first. digits: one, or none when the hash is linear.
    names: int64, shape (slices,): the new number of each slice that makes it so.
    """

    masks: tuple[int, ...]
    digits: tuple[Digit, ...]
    names: Ints


def linear_masks(model: PageModel) -> tuple[int, ...]:
    """All masks over index bits whose parity is the same for all granules of a slice, on every pattern: exact.

    They are what is orthogonal to every difference of two granules of one slice; echelon form.
    """
    differences: list[int] = []
    for pattern in model.patterns:
        order = np.argsort(pattern, kind="stable")
        same = np.diff(pattern[order]) == 0
        differences += (order[1:] ^ order[:-1])[same].tolist()
    return complement(differences, model.granules.bit_length() - 1)


def describe(model: PageModel, centres: Floats) -> Structure:
    """Masks, digits and the numbering of slices that they give; centres float32, shape (slices, SMs)."""
    masks = linear_masks(model)
    index = np.arange(model.granules)
    pattern = model.patterns[0]
    classes = sum((parity(index, mask) << i for i, mask in enumerate(masks)), np.zeros(model.granules, np.int64))
    class_of = np.zeros(model.slices, np.int64)
    class_of[pattern] = classes
    members = [np.flatnonzero(class_of == which) for which in range(1 << len(masks))]
    if len({len(part) for part in members}) != 1:
        # Parities that don't cut the slices evenly are no part of their number.
        return Structure((), (Digit(model.slices, pattern.copy()),), np.arange(model.slices))
    names = np.empty(model.slices, np.int64)
    first = centres[members[0]] - centres[members[0]].mean(axis=0)
    for which, part in enumerate(members):
        # A digit means the same place on the chip in every class as far as latency can say so.
        distance = cdist(centres[part] - centres[part].mean(axis=0), first)
        rows, columns = linear_sum_assignment(distance)
        names[part[rows]] = which + (columns << len(masks))
    base = len(members[0])
    digits = (Digit(base, names[pattern] >> len(masks)),) if base > 1 else ()
    return Structure(masks, digits, names)


def renamed(model: PageModel, names: Ints) -> PageModel:
    """`model` with slice s called names[s]."""
    back = np.argsort(names)
    permutations = [names[permutation[back]] for permutation in model.permutations]
    return PageModel(model.slices, model.granules, [names[pattern] for pattern in model.patterns], permutations)


def frame_colors(model: PageModel, layout: PageLayout, frame_bytes: int) -> tuple[tuple[int, ...], ...]:
    """The finest colors with which every aligned frame of a page lies wholly in one color, on every pattern.

    Two slices that meet in a frame have one color; so have what a page's permutation makes of them.
    """
    offsets = layout.offsets()
    pieces = (offsets[:, None] + layout.pieces()[None, :]).reshape(-1)
    frames = pieces // frame_bytes
    order = np.argsort(frames, kind="stable")
    together = np.diff(frames[order]) == 0
    permutations = np.array(model.permutations)
    meet = np.zeros((model.slices, model.slices), np.bool_)
    for pattern in model.patterns:
        slices = np.repeat(pattern, len(layout.pieces()))[order]
        pairs = np.unique(np.stack([slices[:-1][together], slices[1:][together]]), axis=1)
        meet[permutations[:, pairs[0]], permutations[:, pairs[1]]] = True
    labels = connected_components(csr_array(meet.astype(np.int8)), directed=False)[1]
    # Slices in the order of their first: a color's number is where its lowest slice stands.
    return tuple(sorted(tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)))
