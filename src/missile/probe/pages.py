"""The relation between pages: one table for all of them, and a few constants for each. Pure arithmetic on labels.

The model: the slices of a page are `permutations[k][patterns[p][index ^ x]]` for three constants (p, x, k) of the page.
A hash whose page bits are XORed into the in-page bits it uses has one pattern; one that adds page bits to a digit
renames slices. A page that fits neither becomes a pattern of its own, up to `MAX_PATTERNS`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from missile.errors import UnsupportedError

__all__ = ["NO_PAGE", "PageModel", "signature"]

Ints = npt.NDArray[np.int64]

MAX_PATTERNS = 32
MAX_PERMUTATIONS = 1024
NO_PAGE = -1  # constants of a page that could not be matched
_CLASS_SAMPLES = 512


class PageModel:
    """Grows while pages are learnt.

    slices: how many; granules: of one page, a power of two. patterns: int64, shape (granules,) each. permutations:
    int64, shape (slices,) each, the identity first, closed under composition up to `MAX_PERMUTATIONS`.
    """

    def __init__(
        self, slices: int, granules: int, patterns: Sequence[Ints] = (), permutations: Sequence[Ints] = ()
    ) -> None:
        self.slices = slices
        self.granules = granules
        self.patterns: list[Ints] = []
        self.permutations: list[Ints] = []
        self._place: dict[bytes, int] = {}
        self._generators: list[Ints] = []
        self._shifts: list[Ints] = []
        for permutation in permutations or (np.arange(slices, dtype=np.int64),):
            self._append(permutation)
        for pattern in patterns:
            self.add_pattern(pattern)

    def labels(self, constants: Ints, indices: Ints) -> Ints:
        """Slices of granules `indices` (n,) of pages with `constants` (pages, 3): shape (pages, n).

        Also takes `indices` of shape (pages, n): other granules for every page.
        """
        patterns, permutations = np.array(self.patterns), np.array(self.permutations)
        which, shift, names = (constants[:, column, None] for column in range(3))
        return np.asarray(permutations[names, patterns[which, np.atleast_2d(indices) ^ shift]], np.int64)

    def shifts(self, pattern: int) -> Ints:
        """One index XOR for each class of those that differ only in the names of the slices, ascending."""
        return self._shifts[pattern]

    def add_pattern(self, labels: Ints) -> int:
        """Take the slices of a wholly measured page, shape (granules,), as a pattern. Returns its number.

        UnsupportedError when there are `MAX_PATTERNS`: the pages then have nothing in common that could be used.
        """
        if len(self.patterns) == MAX_PATTERNS:
            raise UnsupportedError(
                f"More than {MAX_PATTERNS} pages are related neither by an XOR of the granule index nor by a renaming of "
                "slices: this GPU's address hash is not of a form that Missile knows."
            )
        self.patterns.append(np.asarray(labels, np.int64).copy())
        self._shifts.append(_distinct_shifts(self.patterns[-1]))
        return len(self.patterns) - 1

    def add_permutation(self, permutation: Ints) -> int:
        """Its place in the list. A new one brings its products with the others: constants of pages combine freely."""
        permutation = np.asarray(permutation, np.int64)
        if permutation.tobytes() not in self._place:
            self._generators.append(permutation)
            for item in self.closure(permutation) or [permutation]:
                self._append(item)
        return self._place[permutation.tobytes()]

    def closure(self, permutation: Ints, limit: int = MAX_PERMUTATIONS) -> list[Ints] | None:
        """The group that the permutations here and `permutation` generate; None where it has more than `limit`."""
        generators = [*self._generators, np.asarray(permutation, np.int64)]
        members = {np.arange(self.slices, dtype=np.int64).tobytes()}
        group = fresh = [np.arange(self.slices, dtype=np.int64)]
        while fresh:
            products = [generator[item] for item in fresh for generator in generators]
            fresh = []
            for item in products:
                if item.tobytes() not in members:
                    members.add(item.tobytes())
                    fresh.append(item)
            group = group + fresh
            if len(group) > limit:
                return None
        return group

    def _append(self, permutation: Ints) -> int:
        place = self._place.setdefault(permutation.tobytes(), len(self.permutations))
        if place == len(self.permutations):
            self.permutations.append(permutation)
        return place


def signature(labels: Ints) -> npt.NDArray[np.uint64]:
    """A hash of which entries of each row are equal, shape (rows,): the same for rows that differ in names only."""
    rows, columns = labels.shape
    first = np.zeros((rows, int(labels.max(initial=0)) + 1), np.int64)
    every = np.arange(rows)
    for column in range(columns - 1, -1, -1):
        first[every, labels[:, column]] = column
    canonical = first[every[:, None], labels].astype(np.uint64)
    coefficients = np.random.default_rng(columns).integers(1, 1 << 63, columns, dtype=np.uint64) | np.uint64(1)
    with np.errstate(over="ignore"):
        return np.asarray((canonical * coefficients).sum(axis=1), np.uint64)


def _distinct_shifts(pattern: Ints) -> Ints:
    """The smallest of each class of index XORs that give `pattern` the same signature."""
    granules = len(pattern)
    probe = np.arange(granules)
    if granules > _CLASS_SAMPLES:
        probe = np.sort(np.random.default_rng(granules).choice(granules, _CLASS_SAMPLES, replace=False))
    parts = np.array_split(np.arange(granules), max(1, granules // 512))
    keys = np.concatenate([signature(pattern[probe[None, :] ^ part[:, None]]) for part in parts])
    return np.sort(np.unique(keys, return_index=True)[1])
