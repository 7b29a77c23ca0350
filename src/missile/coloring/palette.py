"""Which frames of a page a set of colors has, from the channel map. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError
from missile.probe.channel_map import ChannelMap
from missile.probe.layout import PageLayout
from missile.probe.pages import NO_PAGE

__all__ = ["Palette"]

Ints = npt.NDArray[np.int64]


class Palette:
    """Frames and colors of a channel map's pages.

    layout: how a page is cut into frames, the largest that lie wholly in one color (`ChannelMap.frame_bytes`).
    """

    def __init__(self, channel_map: ChannelMap) -> None:
        self._map = channel_map
        contiguous = channel_map.frame_bytes > channel_map.granule_bytes
        self.layout = (
            PageLayout(channel_map.page_bytes, tuple(range(channel_map.frame_bytes.bit_length() - 1)))
            if contiguous
            else channel_map.layout
        )
        self._granules = channel_map.layout.index_of(self.layout.offsets())
        self._color_of_slice = channel_map.color_of_slice
        self._known: dict[tuple[int, ...], Ints] = {}

    @property
    def colors(self) -> int:
        return len(self._map.colors)

    def check(self, colors: Sequence[int], tenant: str) -> tuple[int, ...]:
        """`colors`, ascending. MisuseError for a set that is empty or names colors that are not there."""
        who = f"Tenant {tenant!r}" if tenant else "A tenant"
        if not colors:
            raise MisuseError(f"{who} has an empty set of colors; there are 0 to {self.colors - 1}.")
        unknown = sorted(set(colors) - set(range(self.colors)))
        if unknown:
            raise MisuseError(f"{who} asks for color {unknown[0]}; there are 0 to {self.colors - 1}.")
        if len(set(colors)) != len(colors):
            raise MisuseError(f"{who} names a color twice.")
        return tuple(sorted(colors))

    def pattern(self, constants: Sequence[int] | Ints) -> Ints:
        """Color of every frame of a page with `constants` (3,), shape (frames,), by the layout's granule index."""
        key = tuple(int(c) for c in constants)
        if key not in self._known:
            self._known[key] = self._color_of_slice[self._map.page_slices(key)[self._granules]]
        return self._known[key]

    def owned(self, colors: Sequence[int], constants: Sequence[int] | Ints) -> npt.NDArray[np.bool_]:
        """Whether each frame of a page with `constants` is of `colors`, shape (frames,)."""
        among = np.zeros(self.colors, np.bool_)
        among[list(colors)] = True
        return np.asarray(among[self.pattern(constants)], np.bool_)

    def shifts(self, constants: Ints) -> Ints:
        """What the frames' indices of pages with `constants` (pages, 3) are XORed with, shape (pages,)."""
        return self.layout.index_of(self._map.layout.offsets(constants[:, 1]))

    def frames(self, colors: Sequence[int], constants: Sequence[int] | Ints) -> Ints:
        """Frames of `colors` in a page with `constants`, as granule indices of `layout`, ascending."""
        return np.flatnonzero(self.owned(colors, constants))

    def relation(self, colors: Sequence[int], reference: Sequence[int] | Ints, constants: Ints) -> Ints:
        """For every page with `constants` (pages, 3): the least x so that its frames of `colors` are those of a page with
        `reference` XORed with x; NO_PAGE where there is none or the page is not classified. Shape (pages,).
        """
        wanted = self.owned(colors, reference)
        kinds, place = np.unique(constants, axis=0, return_inverse=True)
        out = np.full(len(kinds), NO_PAGE, np.int64)
        spectrum = _walsh_hadamard(wanted)
        for row, kind in enumerate(kinds):
            if kind[2] == NO_PAGE:
                continue
            has = self.owned(colors, kind)
            if has.sum() != wanted.sum():
                continue
            # By XOR convolution: how many of the reference's frames, XORed with x, are among this page's, for every x.
            common = _walsh_hadamard(spectrum * _walsh_hadamard(has))
            fits = np.flatnonzero(common == len(common) * wanted.sum())
            if len(fits):
                out[row] = fits[0]
        return out[place.reshape(-1)]


def _walsh_hadamard(values: npt.ArrayLike) -> Ints:
    """The transform (not scaled) of 2**n integers: its own inverse up to the factor 2**n."""
    out = np.array(values, np.int64)
    size = 1
    while size < len(out):
        halves = out.reshape(-1, 2, size)
        out = np.stack([halves[:, 0] + halves[:, 1], halves[:, 0] - halves[:, 1]], axis=1).reshape(-1)
        size *= 2
    return out
