"""Who gets which pages and which translation, when tenants share a pool of pages. Pure planning.

Tenants have the same colors, and then different pages, or disjoint ones, and then may share pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from missile.coloring.halves import choices_of_pages, piece_layout, residues
from missile.coloring.linear import linear_colors
from missile.coloring.palette import Palette
from missile.coloring.shape import WINDOW, Escape, Form, Shape, TableSpace
from missile.coloring.translation import (
    ArithmeticTranslation,
    InPageTranslation,
    PairTranslation,
    ShadowTranslation,
    Translation,
)
from missile.errors import MisuseError, OutOfMemoryError, UnsupportedError
from missile.probe.channel_map import ChannelMap
from missile.probe.layout import PageLayout
from missile.probe.pages import NO_PAGE

__all__ = ["Demand", "Share", "plan_shares"]

Ints = npt.NDArray[np.int64]

_PAIR_RESIDUE = 0.05  # of a tenant's memory: more than this in colors of others, and pairs are no way to color it


@dataclass(frozen=True, slots=True)
class Demand:
    """What a tenant wants: colors of the channel map, and memory in bytes."""

    tenant: str
    colors: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant gets. pages: numbers of the pool's pages, in the order that they are mapped in for it.

    residue: share of its memory that is not of its colors (pair form); it is nobody else's memory all the same.
    """

    tenant: str
    colors: tuple[int, ...]
    pages: tuple[int, ...]
    translation: Translation
    residue: float = 0.0

    @property
    def nbytes(self) -> int:
        """Memory that the tenant can use."""
        return self.translation.logical_bytes - self.translation.shape.head_bytes


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

    form: the translation to use. None takes the pair form where the tenants' colors are two halves that split nearly every
    pair of frames (`find_halves`), or all colors (then half of every page is left unused); else the in-page table where
    one serves all the pages that a tenant needs, and the shadow page table otherwise. Of the pages, those come first
    whose constants vanish for the tenant's colors.
    Tenants of different colors take turns through the same pages; those of the same colors have pages of their own.

    The pair form is for all tenants of a pool or for none: another form would take frames that pairs give to others.
    MisuseError for colors that are empty, unknown or partly another tenant's; OutOfMemoryError saying how much is missing;
    UnsupportedError where the form asked for does not fit the map.
    """
    palette = Palette(channel_map)
    sets = _color_sets(palette, demands)
    free = np.asarray(constants, np.int64)
    pairs = form in (None, Form.PAIR) and _split_by_pairs(palette, free, set(sets))
    if form is Form.PAIR and not pairs:
        raise UnsupportedError("The pair form of translation does not fit the tenants' colors: they are no two halves.")
    taken: dict[tuple[int, ...], list[int]] = {}
    shares = []
    for demand, colors in zip(demands, sets, strict=True):
        left = free.copy()
        left[taken.setdefault(colors, [])] = NO_PAGE
        if pairs:
            share = _pairs(palette, left, demand, colors, escape)
        else:
            share = _share(palette, left, demand, colors, form, space, escape)
        taken[colors] += share.pages
        shares.append(share)
    return tuple(shares)


def _color_sets(palette: Palette, demands: Sequence[Demand]) -> list[tuple[int, ...]]:
    """Each demand's colors, ascending: of two demands the same or disjoint."""
    owner: dict[int, tuple[str, tuple[int, ...]]] = {}
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
            other, theirs = owner.setdefault(color, (demand.tenant, colors))
            if theirs != colors:
                raise MisuseError(
                    f"Color {color} is wanted by tenants {other!r} and {demand.tenant!r}; "
                    "sets of colors are disjoint, or the same."
                )
        sets.append(colors)
    return sets


def _split_by_pairs(palette: Palette, constants: Ints, sets: set[tuple[int, ...]]) -> bool:
    everything = tuple(range(palette.colors))
    if sets == {everything}:
        return True
    first = min(sets)
    if any(colors != first and set(colors) != set(everything) - set(first) for colors in sets):
        return False
    known = constants[constants[:, 2] != NO_PAGE]
    rest = tuple(set(everything) - set(first))
    return all((residues(palette, half, known) <= _PAIR_RESIDUE).all() for half in (first, rest))


def _pairs(palette: Palette, constants: Ints, demand: Demand, colors: tuple[int, ...], escape: Escape) -> Share:
    layout = piece_layout(palette.layout)
    known = np.flatnonzero(constants[:, 2] != NO_PAGE)
    per_page = layout.granules // 2
    # Two pieces of a granule with only the pair's bit between them.
    alike = palette.layout.inner_bits == (*layout.inner_bits, len(layout.inner_bits) + 1)
    shape = Shape(Form.PAIR, layout, escape=escape, wide=True, alike=alike)
    needed = -(-(demand.nbytes + shape.head_bytes) // layout.granule_bytes) + shape.guards
    if len(known) * per_page < needed:
        room = (len(known) * per_page - shape.guards) * layout.granule_bytes - shape.head_bytes
        raise _missing(palette, demand, colors, len(known), room)
    pages = known[: -(-needed // per_page)]
    shape = replace(shape, wide=_wide(layout, len(pages), escape))
    taken = choices_of_pages(palette, colors, constants[pages])
    foreign = float(residues(palette, colors, constants[pages]).mean())
    return Share(demand.tenant, colors, tuple(pages.tolist()), PairTranslation(shape, taken), foreign)


def _wide(layout: PageLayout, pages: int, escape: Escape) -> bool:
    return escape is not Escape.GUARD or pages * layout.page_bytes > WINDOW


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
        if form is not None and count > len(usable):
            raise _missing(palette, demand, colors, len(usable), (len(usable) * per_page - 1) * layout.granule_bytes)
        if form is not None:
            raise UnsupportedError(
                f"The {form} form of translation does not fit the colors of tenant {demand.tenant!r}."
            )
    return _shadow(palette, constants, known, demand, colors, escape)


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
    wide = _wide(layout, len(pages), escape)
    if form is Form.ARITHMETIC:
        linear = linear_colors(palette.pattern(reference))
        contiguous = layout.inner_bits == tuple(range(len(layout.inner_bits)))
        if linear is None or not contiguous or (len(xors) and xors.max() >= 1 << len(linear.masks)):
            return None
        masks = tuple(mask << len(layout.inner_bits) for mask in linear.masks)
        shape = Shape(Form.ARITHMETIC, layout, masks=len(masks), page_xors=constants, escape=escape, wide=wide)
        return ArithmeticTranslation(shape, masks, [linear.parities[c] for c in colors], len(pages), xors)
    shape = Shape(Form.IN_PAGE, layout, space=space, page_xors=constants, escape=escape, wide=wide)
    return InPageTranslation(shape, palette.frames(colors, reference), len(pages), xors)


def _shadow(
    palette: Palette,
    constants: Ints,
    known: Ints,
    demand: Demand,
    colors: tuple[int, ...],
    escape: Escape,
) -> Share:
    """An entry for each piece, not for each frame: twice the table, where a frame has two, for two instructions less."""
    layout = piece_layout(palette.layout)
    needed = -(-demand.nbytes // layout.granule_bytes) + 1  # the guard
    places: list[Ints] = []
    have = 0
    for page in known:
        if have >= needed:
            break
        starts = palette.layout.offsets(palette.frames(colors, constants[page]))
        places.append(layout.index_of((starts[:, None] + palette.layout.pieces()).reshape(-1)))
        have += len(places[-1])
    if have < needed:
        raise _missing(palette, demand, colors, len(known), (have - 1) * layout.granule_bytes)
    translation = ShadowTranslation.from_pages(layout, places, escape, wide=_wide(layout, len(places), escape))
    return Share(demand.tenant, colors, tuple(known[: len(places)].tolist()), translation)


def _missing(palette: Palette, demand: Demand, colors: tuple[int, ...], pages: int, available: int) -> OutOfMemoryError:
    room = max(available, 0)
    return OutOfMemoryError(
        f"Tenant {demand.tenant!r} needs {demand.nbytes} bytes in {len(colors)} of {palette.colors} colors; the pool's "
        f"{pages} classified pages that are free there have {room}: {demand.nbytes - room} are missing.",
        requested=demand.nbytes,
        available=room,
        tenant=demand.tenant,
    )
