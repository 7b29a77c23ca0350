"""The channel map: what a probe found out about a GPU's memory, and what it says about any address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError
from missile.gpu.interface import Gpu, GpuInfo
from missile.probe.layout import PageLayout
from missile.probe.learning import classify
from missile.probe.matching import Metric
from missile.probe.pages import NO_PAGE, PageModel
from missile.probe.sampling import Sampler
from missile.probe.structure import Digit

__all__ = ["REFERENCE_PAGE", "ChannelMap", "Interference", "Topology", "Verdict", "Witness"]

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

REFERENCE_PAGE = (0, 0, 0)  # constants of the page that the tables are written for


class Verdict(StrEnum):
    AGREES = "agrees"
    DISAGREES = "disagrees"
    UNSURE = "unsure"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Witness:
    """An independent test of the map: what it is, its verdict, one sentence, and the numbers behind it."""

    name: str
    verdict: Verdict
    says: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Topology:
    """groups: SM ids that stand together, by latency. sm_half: half (0 or 1) of each SM of `sms`, all 0 when there is one.

    slice_half: the half whose SMs each slice is nearer to, -1 when the chip shows no halves. step: cycles from half to half.
    """

    sms: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    sm_half: tuple[int, ...]
    slice_half: tuple[int, ...]
    step: float


@dataclass(frozen=True, slots=True)
class Interference:
    """What an aggressor on one color does to a victim on another.

    slowdown: by access ("read", "read_write", "write"), shape (victim color, aggressor color): the victim's duration
    over its solo duration. working_set_bytes: what each side passes over. victim_sms, aggressor_sms: how many SMs.
    """

    slowdown: Mapping[str, Doubles]
    victim_sms: int
    aggressor_sms: int
    working_set_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ChannelMap:
    """One GPU's map. Immutable. Addresses are in-page (0 to page_bytes - 1) unless said otherwise.

    gpu, uuid, device: the GPU probed ("" uuid: it has none). colors: slices of each color. frame_bytes: aligned frames of
    this size lie wholly in one color (granule_bytes where no larger ones do). confidence: share of the granules looked at
    whose slice is unambiguous. seconds: what the probe took. statistics: how it went, for people.
    """

    gpu: str
    uuid: str
    device: str
    simulated: bool
    layout: PageLayout
    model: PageModel
    metric: Metric
    linear_masks: tuple[int, ...]
    digits: tuple[Digit, ...]
    colors: tuple[tuple[int, ...], ...]
    frame_bytes: int
    topology: Topology
    confidence: float
    seconds: float
    channels: tuple[tuple[int, ...], ...] = ()
    interference: Interference | None = None
    witnesses: tuple[Witness, ...] = ()
    statistics: Mapping[str, float] = field(default_factory=dict)

    @property
    def granule_bytes(self) -> int:
        return self.layout.granule_bytes

    @property
    def page_bytes(self) -> int:
        return self.layout.page_bytes

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return self.model.slices

    @property
    def granules(self) -> int:
        """How many granules a page has."""
        return self.layout.granules

    @property
    def color_of_slice(self) -> Ints:
        """Color of each slice, shape (slices,)."""
        out = np.empty(self.slices, np.int64)
        for color, slices in enumerate(self.colors):
            out[list(slices)] = color
        return out

    def page_slices(self, constants: npt.ArrayLike = REFERENCE_PAGE) -> Ints:
        """Slice of every granule of pages with `constants` (3,) or (pages, 3): shape (granules,) or (pages, granules)."""
        given = self._constants(constants)
        slices = self.model.labels(np.atleast_2d(given), np.arange(self.granules))
        return np.asarray(slices[0] if given.ndim == 1 else slices, np.int64)

    def slice_of(self, addresses: npt.ArrayLike, constants: npt.ArrayLike = REFERENCE_PAGE) -> Ints:
        """Slice of in-page `addresses` (any shape) of the page with `constants` (3,).

        MisuseError for an address outside a page and for a page that could not be classified.
        """
        where = np.asarray(addresses, np.int64)
        index = self.layout.index_of(where)
        return np.asarray(
            self.model.labels(self._constants(constants)[None, :], index.reshape(1, -1))[0].reshape(where.shape),
            np.int64,
        )

    def color_of(self, addresses: npt.ArrayLike, constants: npt.ArrayLike = REFERENCE_PAGE) -> Ints:
        """Color of in-page `addresses` of the page with `constants`; as `slice_of`."""
        return np.asarray(self.color_of_slice[self.slice_of(addresses, constants)], np.int64)

    def mask_constants(self, constants: npt.ArrayLike) -> Ints:
        """The constant bit that each linear mask has in pages with `constants` (pages, 3): shape (pages, masks)."""
        first = self.model.labels(np.atleast_2d(self._constants(constants)), np.zeros(1, np.int64))[:, 0]
        return np.stack([(first >> bit) & 1 for bit in range(len(self.linear_masks))], axis=1)

    def classify(self, gpu: Gpu, pages: npt.ArrayLike, *, samples: int = 48, seed: int = 0) -> Ints:
        """Constants of the pages at device addresses `pages`, shape (pages, 3), measured now on `gpu`, otherwise idle.

        Rows of -1 are pages that no constants fit for sure; don't use them. MisuseError when the map is another GPU's.
        """
        self.check(gpu.info)
        addresses = np.asarray(pages, np.int64)
        return classify(
            Sampler(gpu, seed=seed), self.model, self.metric, self.layout, addresses, samples=samples, learn=False
        )

    def check(self, info: GpuInfo) -> None:
        """MisuseError when this map is not of the GPU that `info` describes."""
        if info.name != self.gpu:
            raise MisuseError(f"This channel map is of {self.gpu!r}, the GPU here is {info.name!r}; probe it.")
        if self.uuid and info.uuid and self.uuid != info.uuid:
            raise MisuseError(
                f"This channel map is of another {self.gpu} ({self.uuid}); slices differ from chip to chip: probe this one."
            )
        if info.page_bytes != self.page_bytes:
            raise MisuseError(
                f"This channel map is for pages of {self.page_bytes} bytes, the GPU's pages have {info.page_bytes}."
            )

    def _constants(self, constants: npt.ArrayLike) -> Ints:
        given = np.asarray(constants, np.int64)
        if given.shape[-1:] != (3,):
            raise MisuseError("A page's constants are three numbers: pattern, index XOR and permutation.")
        if (given[..., 2] == NO_PAGE).any():
            raise MisuseError("A page could not be classified, so the slices of its addresses are not known.")
        limits = (len(self.model.patterns), self.granules, len(self.model.permutations))
        for column, limit in enumerate(limits):
            if (given[..., column] < 0).any() or (given[..., column] >= limit).any():
                raise MisuseError(f"Page constants {given.tolist()} are not of this map.")
        return given
