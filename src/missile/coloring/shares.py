"""Who gets which pages and which translation, when tenants with disjoint colors share a pool of pages. Pure planning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.coloring.linear import linear_colors
from missile.coloring.palette import Palette
from missile.coloring.shape import Escape, Form, Shape, TableSpace
from missile.coloring.translation import (
    ArithmeticTranslation,
    InPageTranslation,
    ShadowTranslation,
    Translation,
)
from missile.errors import MisuseError, OutOfMemoryError, UnsupportedError
from missile.probe.channel_map import ChannelMap
from missile.probe.pages import NO_PAGE

__all__ = ["Demand", "Share", "plan_shares"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a tenant wants: colors of the channel map, and memory in bytes."""

    tenant: str
    colors: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant gets. pages: numbers of the pool's pages, in the order that they are mapped in for it."""

    tenant: str
    colors: tuple[int, ...]
    pages: tuple[int, ...]
    translation: Translation

    @property
    def nbytes(self) -> int:
        """Memory that the tenant can use."""
        return self.translation.logical_bytes


def plan_shares(
    channel_map: ChannelMap,
    constants: Ints,
    demands: Sequence[Demand],
    *,
    form: Form | None = None,
    space: TableSpace = TableSpace.SHARED,
    escape: Escape = Escape.GUARD,
) -> tuple[Share, ...]:
    """Give every demand frames of its colors, from a pool of pages with `constants` (pages, 3), as measured by
    `ChannelMap.classify`; pages that were not classified are left out.

    form: the translation to use; None takes the in-page table where one serves all the pages that a tenant needs, and
    the shadow page table otherwise. Of the pages, those come first whose constants vanish for the tenant's colors.
    Tenants take turns through the same pages: what of a page is not of one tenant's colors is there for the others.

    MisuseError for colors that are empty, unknown or another tenant's; OutOfMemoryError saying how much is missing;
    UnsupportedError where the form asked for does not fit the map.
    """
    palette = Palette(channel_map)
    sets = _disjoint(palette, demands)
    shares = []
    for demand, colors in zip(demands, sets, strict=True):
        shares.append(_share(palette, np.asarray(constants, np.int64), demand, colors, form, space, escape))
    return tuple(shares)


def _disjoint(palette: Palette, demands: Sequence[Demand]) -> list[tuple[int, ...]]:
    owner: dict[int, str] = {}
    sets = []
    names: set[str] = set()
    for demand in demands:
        if demand.tenant in names:
            raise MisuseError(f"Tenant {demand.tenant!r} asks for memory twice.")
        names.add(demand.tenant)
        if demand.nbytes < 1:
            raise MisuseError(f"Tenant {demand.tenant!r} asks for {demand.nbytes} bytes of memory.")
        colors = palette.check(demand.colors, demand.tenant)
        for color in colors:
            if color in owner:
                raise MisuseError(
                    f"Color {color} is wanted by tenants {owner[color]!r} and {demand.tenant!r}; color sets are disjoint."
                )
            owner[color] = demand.tenant
        sets.append(colors)
    return sets


def _share(
    palette: Palette,
    constants: Ints,
    demand: Demand,
    colors: tuple[int, ...],
    form: Form | None,
    space: TableSpace,
    escape: Escape,
) -> Share:
    layout = palette.layout
    needed = -(-demand.nbytes // layout.granule_bytes) + 1  # the guard frame
    known = np.flatnonzero(constants[:, 2] != NO_PAGE)
    if form is not Form.SHADOW and len(known):
        # The most common kind of page is the reference: most constants vanish.
        kinds, counts = np.unique(constants[known], axis=0, return_counts=True)
        reference = kinds[int(np.argmax(counts))]
        xors = palette.relation(colors, reference, constants)
        usable = np.flatnonzero(xors != NO_PAGE)
        usable = usable[np.argsort(xors[usable], kind="stable")]
        per_page = len(palette.frames(colors, reference))
        count = -(-needed // per_page) if per_page else 0
        if per_page and 0 < count <= len(usable):
            pages = usable[:count]
            share = _uniform(palette, colors, reference, pages, xors[pages], form, space, escape)
            if share is not None:
                return Share(demand.tenant, colors, tuple(pages.tolist()), share)
        if form is not None and count <= len(usable):
            raise UnsupportedError(
                f"The {form} form of translation does not fit the colors of tenant {demand.tenant!r}."
            )
    return _shadow(palette, constants, known, demand, colors, needed, escape)


def _uniform(
    palette: Palette,
    colors: tuple[int, ...],
    reference: Ints,
    pages: Ints,
    xors: Ints,
    form: Form | None,
    space: TableSpace,
    escape: Escape,
) -> Translation | None:
    """A translation for pages that differ by XORs only; None where the form does not fit."""
    constants = bool(xors.any())
    layout = palette.layout
    if form is Form.ARITHMETIC:
        linear = linear_colors(palette.pattern(reference))
        contiguous = layout.inner_bits == tuple(range(len(layout.inner_bits)))
        if linear is None or not contiguous or (len(xors) and xors.max() >= 1 << len(linear.masks)):
            return None
        masks = tuple(mask << len(layout.inner_bits) for mask in linear.masks)
        shape = Shape(Form.ARITHMETIC, layout, masks=len(masks), page_xors=constants, escape=escape)
        return ArithmeticTranslation(shape, masks, [linear.parities[c] for c in colors], len(pages), xors)
    shape = Shape(Form.IN_PAGE, layout, space=space, page_xors=constants, escape=escape)
    return InPageTranslation(shape, palette.frames(colors, reference), len(pages), xors)


def _shadow(
    palette: Palette,
    constants: Ints,
    known: Ints,
    demand: Demand,
    colors: tuple[int, ...],
    needed: int,
    escape: Escape,
) -> Share:
    places: list[Ints] = []
    have = 0
    for page in known:
        if have >= needed:
            break
        frames = palette.frames(colors, constants[page])
        places.append(frames)
        have += len(frames)
    if have < needed:
        nbytes = palette.layout.granule_bytes
        room = max(have - 1, 0) * nbytes
        raise OutOfMemoryError(
            f"Tenant {demand.tenant!r} needs {demand.nbytes} bytes in {len(colors)} of {palette.colors} colors; the pool's "
            f"{len(known)} classified pages have {room} there: {demand.nbytes - room} are missing.",
            requested=demand.nbytes,
            available=room,
            tenant=demand.tenant,
        )
    translation = ShadowTranslation.from_pages(palette.layout, places, escape)
    return Share(demand.tenant, colors, tuple(known[: len(places)].tolist()), translation)
