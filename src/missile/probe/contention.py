"""What the holders of some slices do to those of others: measured, not guessed.

Victim and aggressor never share a page. A working set far larger than the slices' L2 reaches VRAM, so what is shared
behind the slices shows too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from missile.gpu.interface import Access, Gpu, Traffic
from missile.probe.channel_map import ChannelMap, Interference

__all__ = ["GroupTests", "SliceMemory", "measure_interference", "unit_pair"]

Ints = npt.NDArray[np.int64]

UNIT_BYTES = 256
_VICTIM_UNITS = 1 << 15  # 8 MiB
_AGGRESSOR_UNITS = 1 << 16  # 16 MiB: more than the L2 that an eighth of the slices has
_GROUP_UNITS = 128
_ALIKE = 1.25  # what slices take alone differs by less
_REPEATED = 1024  # times that one unit stands in a list, so that every warp has work
_VICTIM_SHARE = 0.25  # of the SMs


class SliceMemory:
    """Addresses by slice, out of classified pages: two disjoint sides of pages, for a victim and for an aggressor.

    pages: int64, shape (n,), device addresses; constants: int64, shape (n, 3).
    """

    def __init__(self, channel_map: ChannelMap, pages: Ints, constants: Ints, rng: np.random.Generator) -> None:
        known = constants[:, 2] >= 0
        slices = channel_map.page_slices(constants[known]).astype(np.int16)
        starts = pages[known][:, None] + channel_map.layout.offsets()
        self._rng = rng
        self._units = _unit_offsets(channel_map)
        cut = max(1, len(slices) // 4)
        self._sides = tuple(
            _by_slice(starts[side], slices[side], channel_map.slices) for side in (slice(0, cut), slice(cut, None))
        )

    def units(self, slices: Sequence[int], most: int, *, victim: bool) -> Ints:
        """At most `most` random addresses of 256-byte units that lie on `slices`, from the side's pages, ascending."""
        side = self._sides[0 if victim else 1]
        starts = np.concatenate([side[slice_] for slice_ in slices])
        wanted = -(-most // len(self._units))
        if len(starts) > wanted:
            starts = starts[self._rng.choice(len(starts), wanted, replace=False)]
        units = (starts[:, None] + self._units).reshape(-1)
        return np.sort(self._rng.permutation(units)[:most])


def measure_interference(
    gpu: Gpu, channel_map: ChannelMap, memory: SliceMemory, *, accesses: Sequence[Access] = tuple(Access)
) -> Interference:
    """Slowdown of a victim on each color beside an aggressor on each color (itself included), by the aggressor's access.

    The victim reads. Colors are those of `channel_map`.
    """
    sms = gpu.info.sms
    victim_sms = max(1, int(sms * _VICTIM_SHARE))
    aggressor_sms = sms - victim_sms
    colors = channel_map.colors
    # A flow model needs no more addresses than give every slice its share.
    scale = 8 if gpu.info.simulated else 1
    ours = [memory.units(color, _VICTIM_UNITS // scale, victim=True) for color in colors]
    theirs = [memory.units(color, _AGGRESSOR_UNITS // scale, victim=False) for color in colors]
    solo = [_duration(gpu, Traffic(units, victim_sms), None) for units in ours]
    slowdown = {
        str(access): np.array(
            [
                [
                    _duration(gpu, Traffic(victim, victim_sms), Traffic(other, aggressor_sms, access)) / alone
                    for other in theirs
                ]
                for victim, alone in zip(ours, solo, strict=True)
            ]
        )
        for access in accesses
    }
    return Interference(slowdown, victim_sms, aggressor_sms, len(ours[0]) * UNIT_BYTES)


class GroupTests:
    """Slowdown of a few SMs that read one slice beside many that write to another: what tells groups of slices.

    Working sets stay in L2. What a slice takes alone is measured with its first test.
    """

    def __init__(self, gpu: Gpu, memory: SliceMemory) -> None:
        self._gpu = gpu
        self._memory = memory
        self._few, self._many = max(1, gpu.info.sms // 32), max(1, gpu.info.sms // 3)
        self._alone: dict[int, float] = {}

    def __call__(self, victim: int, aggressor: int) -> float:
        ours = Traffic(self._memory.units([victim], _GROUP_UNITS, victim=True), self._few)
        if victim not in self._alone:
            self._alone[victim] = _duration(self._gpu, ours, None, passes=4)
        # Slices take about as long as each other alone: one that seems not to was disturbed.
        usual = float(np.median(list(self._alone.values())))
        theirs = self._memory.units([aggressor], 4 * _GROUP_UNITS, victim=False)
        beside = _duration(self._gpu, ours, Traffic(theirs, self._many, Access.WRITE), passes=4)
        return beside / float(np.clip(self._alone[victim], usual / _ALIKE, usual * _ALIKE))


def unit_pair(
    gpu: Gpu, memory: SliceMemory, victim: int, aggressor: int, access: Access = Access.READ
) -> Callable[[], float]:
    """One unit on slice `victim`, one on `aggressor`: measures the slowdown of a few SMs that read the one beside many on
    the other, the same two each time."""
    few = max(1, gpu.info.sms // 32)
    many = max(1, gpu.info.sms // 3)
    ours = Traffic(np.repeat(memory.units([victim], 1, victim=True), _REPEATED), few)
    theirs = Traffic(np.repeat(memory.units([aggressor], 1, victim=False), _REPEATED), many, access)
    return lambda: _duration(gpu, ours, theirs, passes=4) / _duration(gpu, ours, None, passes=4)


def _duration(gpu: Gpu, victim: Traffic, aggressor: Traffic | None, *, passes: int = 1) -> float:
    return float(np.median(gpu.measure_contention(victim, aggressor, repeats=7, passes=passes).victim_ns))


def _unit_offsets(channel_map: ChannelMap) -> Ints:
    """Offsets of the 256-byte units within a granule (one where a granule is no longer than that)."""
    layout = channel_map.layout
    steps = np.arange(0, max(layout.piece_bytes, UNIT_BYTES), UNIT_BYTES)
    return np.sort((layout.pieces()[:, None] + steps[None, :]).reshape(-1))


def _by_slice(starts: Ints, slices: npt.NDArray[np.int16], count: int) -> list[Ints]:
    """Addresses of the granules on each slice."""
    order = np.argsort(slices, axis=None, kind="stable")
    return np.split(starts.reshape(-1)[order], np.cumsum(np.bincount(slices.reshape(-1), minlength=count))[:-1])
