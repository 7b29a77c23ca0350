"""A channel map again: verified on the GPU at hand in a fraction of a second, where a probe takes many.

A chip's hash and its latencies stay what they are (three processes on one H200: centres of the same latency class differ
by 0.13 cycles, median), so a map of this very chip needs a test, not a probe. Another chip of the same kind has the same
hash up to names (three H200s: docs/design/channel-map.md) but latencies of its own: those are measured, the relation of
pages is taken over. Whatever the test does not confirm is probed anew.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError, NoisyGpuError
from missile.gpu.interface import Gpu, GpuInfo
from missile.probe.channel_map import ChannelMap, Verdict, Witness
from missile.probe.contention import GroupTests, SliceMemory
from missile.probe.groups import check_groups
from missile.probe.learning import classify
from missile.probe.map_file import read_map, write_map
from missile.probe.matching import MARGIN
from missile.probe.pool import PagePool
from missile.probe.sampling import Sampler
from missile.probe.session import probe_gpu
from missile.probe.witnesses import MAX_WRONG, contention_witness

__all__ = ["default_maps", "map_for", "map_path", "verify"]

Ints = npt.NDArray[np.int64]
Progress = Callable[[str], None]

PAGES = 64  # that a test looks at
_SAMPLES = 48
_SECTORS = 2048
_SECTOR = 32
_PASSES = 4
_MOST_UNMATCHED = 0.05
_MOST_UNSURE = 0.02


def default_maps() -> Path:
    """Where maps are kept: `$MISSILE_CACHE/maps`, or `missile/maps` in the user's cache directory."""
    if chosen := os.environ.get("MISSILE_CACHE"):
        return Path(chosen) / "maps"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "missile" / "maps"


def map_path(info: GpuInfo, cache: Path | None = None) -> Path:
    """Where the map of the GPU that `info` describes lies in the cache."""
    who = "-".join(filter(None, (info.name, info.uuid or info.device)))
    return (cache or default_maps()) / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', who)}.json"


def map_for(
    gpu: Gpu,
    *,
    cache: Path | None = None,
    known: ChannelMap | Path | None = None,
    pages: int | None = None,
    interference: bool = True,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> ChannelMap:
    """A channel map of `gpu` that was verified on it just now, in the quickest way there is. The GPU is otherwise idle.

    known: a map (or its file) to try first; then the cache's map of this chip, then any of this kind of GPU there.
    Where one passes `verify`, it is the answer, with fresh witnesses. A map of another chip saves the measurement of how
    pages relate; else the GPU is probed. What was probed is put in the cache: $MISSILE_CACHE/maps unless `cache` says
    otherwise. pages, interference, seed, progress: as `probe_gpu`'s.

    Raises what `probe_gpu` raises, and MisuseError for a `known` that is no map or of another kind of GPU. A cache that
    can't be written to is no error.
    """
    place = map_path(gpu.info, cache)
    given = read_map(known) if isinstance(known, Path) else known
    if given is not None:
        _check_kind(given, gpu.info)
    candidates = [given] if given is not None else []
    candidates += _cached(place, gpu.info)
    for candidate in candidates:
        if candidate.uuid != gpu.info.uuid:
            continue
        progress("verifying a known map")
        tested = verify(gpu, candidate, seed=seed)
        failed = [w for w in tested.witnesses if w.name in _TESTS and w.verdict is not Verdict.AGREES]
        # A map need not know any groups.
        if not any(candidate.channels or w.name != "channels" for w in failed):
            return tested
        progress(failed[0].says)
    for relative in [*candidates[:1], None]:
        try:
            found = probe_gpu(gpu, pages=pages, interference=interference, seed=seed, known=relative, progress=progress)
            break
        except NoisyGpuError:
            if relative is None:
                raise
    try:
        write_map(found, place)
    except MisuseError:
        progress(f"{place} can't be written, so the map is not kept")
    return found


_TESTS = ("held-out granules", "contention", "channels")


def verify(gpu: Gpu, channel_map: ChannelMap, *, pages: int = PAGES, seed: int = 0) -> ChannelMap:
    """`channel_map` with fresh witnesses "held-out granules", "contention" and "channels", from `pages` pages of `gpu`.

    `seconds` becomes what the test took. MisuseError when the map is another GPU's; else a verdict, never a raise, says
    that the map does not hold.
    """
    channel_map.check(gpu.info)
    begin = time.perf_counter()
    sampler = Sampler(gpu, seed=seed)
    with PagePool(gpu, pages, spread=False, rng=sampler.rng) as pool:
        constants = classify(
            sampler,
            channel_map.model,
            channel_map.metric,
            channel_map.layout,
            pool.addresses,
            samples=_SAMPLES,
            learn=False,
        )
        held_out = _predicted(sampler, channel_map, pool.addresses, constants)
        contention = Witness("contention", Verdict.NOT_RUN, "The granules do not answer as predicted.")
        groups = replace(contention, name="channels")
        if held_out.verdict is Verdict.AGREES:
            memory = SliceMemory(channel_map, pool.addresses, constants, sampler.rng)
            contention = contention_witness(gpu, channel_map, memory, sampler.rng)
            if contention.verdict is Verdict.AGREES:
                centres = channel_map.metric.centres[channel_map.metric.ball]
                groups = check_groups(channel_map.channels, centres, GroupTests(gpu, memory), sampler.rng)
    fresh = (held_out, contention, groups)
    others = tuple(w for w in channel_map.witnesses if w.name not in _TESTS)
    seconds = round(time.perf_counter() - begin, 3)
    statistics = {**channel_map.statistics, "seconds: verification": seconds}
    return replace(channel_map, witnesses=(*fresh, *others), seconds=seconds, statistics=statistics)


def _predicted(sampler: Sampler, channel_map: ChannelMap, pages: Ints, constants: Ints) -> Witness:
    """Random sectors of pages whose constants are known: each must answer like the slice that the map says.

    A sector is wrong when another slice explains it better by `MARGIN`, unsure when by less.
    """
    metric = channel_map.metric
    known = np.flatnonzero(constants[:, 2] >= 0)
    unmatched = 1.0 - len(known) / len(pages)
    if unmatched > _MOST_UNMATCHED:
        return Witness(
            "held-out granules",
            Verdict.DISAGREES,
            f"{len(pages) - len(known)} of {len(pages)} pages fit no constants of the map.",
            {"right": 0.0, "pages": len(pages), "unmatched": len(pages) - len(known)},
        )
    rows = sampler.rng.choice(known, _SECTORS)
    offsets = sampler.rng.integers(0, channel_map.page_bytes // _SECTOR, _SECTORS) * _SECTOR
    slices = channel_map.model.labels(constants[rows], channel_map.layout.index_of(offsets)[:, None])[:, 0]
    expected = metric.ball[slices]
    prints = sampler.fingerprints(pages[rows] + offsets, metric.sms, passes=_PASSES).mean()
    costs = metric.costs(prints)
    excess = costs[np.arange(_SECTORS), expected] - costs.min(axis=1)
    wrong = int((excess >= MARGIN).sum())
    unsure = int((excess > 0).sum()) - wrong
    verdict = Verdict.AGREES
    if wrong > MAX_WRONG * _SECTORS:
        verdict = Verdict.DISAGREES
    elif unsure > _MOST_UNSURE * _SECTORS:
        verdict = Verdict.UNSURE
    return Witness(
        "held-out granules",
        verdict,
        f"{_SECTORS - wrong - unsure} of {_SECTORS} sectors in {len(np.unique(rows))} pages answer as predicted, "
        f"{wrong} like another slice, {unsure} like none for sure.",
        {"right": 1 - (wrong + unsure) / _SECTORS, "wrong": wrong, "unsure": unsure, "sectors": _SECTORS},
    )


def _check_kind(channel_map: ChannelMap, info: GpuInfo) -> None:
    """MisuseError where not even another chip's map could serve."""
    if channel_map.gpu != info.name or channel_map.page_bytes != info.page_bytes:
        raise MisuseError(f"This channel map is of {channel_map.gpu!r}, the GPU here is {info.name!r}; probe it.")


def _cached(place: Path, info: GpuInfo) -> list[ChannelMap]:
    """Maps of this kind of GPU in the cache, this chip's first. Files that can't be used are passed over."""
    found = []
    others = sorted(other for other in place.parent.glob("*.json") if other != place) if place.parent.is_dir() else []
    for path in [place, *others]:
        try:
            channel_map = read_map(path)
            _check_kind(channel_map, info)
        except MisuseError:
            continue
        found.append(channel_map)
    return found
