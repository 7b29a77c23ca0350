"""One disjoint split of the GPU's SMs into green contexts.

Behaviour relied upon: groups of one `cuDevSmResourceSplitByCount` are disjoint and equal; groups of one such call can be
put together again in one descriptor. So SMs are cut once into equal groups and parts of different sizes are made of them.
Two independent splits would overlap, which is why there is one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from missile.errors import MisuseError
from missile.gpu.cuda.driver import Driver
from missile.gpu.interface import SmPartition, SmSplit

__all__ = ["GreenContext", "SmLimits", "groups_for", "split"]


@dataclass(frozen=True, slots=True)
class SmLimits:
    """How the device lets its SMs be cut: parts of at least `minimum`, in multiples of `granularity`, out of `total`."""

    total: int
    minimum: int
    granularity: int


@dataclass(frozen=True, slots=True, eq=False)
class GreenContext:
    """`SmPartition.handle`: the CUgreenCtx and the CUcontext that stands for it."""

    green: Any
    context: Any


def groups_for(counts: Sequence[int], limits: SmLimits) -> tuple[int, tuple[int, ...]]:
    """Size of the equal groups to cut, and how many groups each part gets. Pure.

    Each count is rounded up to the granularity. MisuseError for no counts, a count below 1, or a sum that can't fit.
    """
    if not counts:
        raise MisuseError("An SM split needs at least one count.")
    if min(counts) < 1:
        raise MisuseError(f"An SM partition needs at least 1 SM, not {min(counts)}.")
    rounded = [max(limits.minimum, _round_up(count, limits.granularity)) for count in counts]
    if (
        math.gcd(*rounded) < limits.minimum
    ):  # smaller groups can't be cut, so all parts are made of the smallest there are
        rounded = [_round_up(count, limits.minimum) for count in rounded]
    if sum(rounded) > limits.total:
        raise MisuseError(
            f"SM partitions {list(counts)} need {sum(rounded)} SMs after rounding up to multiples of "
            f"{limits.granularity}; the GPU has {limits.total}."
        )
    size = math.gcd(*rounded)
    return size, tuple(count // size for count in rounded)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def sm_resource(cu: Driver, device: Any) -> Any:
    """All SMs of the device as a CUdevResource."""
    return cu("cuDeviceGetDevResource", device, cu.api.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)


def limits(cu: Driver, device: Any) -> SmLimits:
    sm = sm_resource(cu, device).sm
    return SmLimits(int(sm.smCount), int(sm.minSmPartitionSize), int(sm.smCoscheduledAlignment))


def split(cu: Driver, device: Any, counts: Sequence[int], bounds: SmLimits) -> SmSplit:
    """Cut and create. Undoes what it made when a step fails. MisuseError names what is available."""
    size, shares = groups_for(counts, bounds)
    needed = sum(shares)
    groups, made, remaining = _cut(cu, device, needed, size)
    if made < needed and size > bounds.minimum:
        # Large groups have to lie within the GPU's own structure; small ones, put together, may still do.
        shares = tuple(share * size // bounds.minimum for share in shares)
        size, needed = bounds.minimum, sum(shares)
        groups, made, remaining = _cut(cu, device, needed, size)
    if made < needed:
        raise MisuseError(
            f"SM partitions {list(counts)} don't fit: the GPU gives {made} groups of {size} SMs, {needed} are needed."
        )
    parts: list[SmPartition] = []
    try:
        taken = 0
        for share in shares:
            parts.append(_create(cu, device, groups[taken : taken + share], len(parts)))
            taken += share
        remainder = _create(cu, device, [remaining], len(parts)) if remaining.sm.smCount else None
    except BaseException:
        for part in parts:
            cu.release("cuGreenCtxDestroy", part.handle.green)
        raise
    return SmSplit(tuple(parts), remainder)


def _cut(cu: Driver, device: Any, groups: int, size: int) -> tuple[list[Any], int, Any]:
    """Up to `groups` disjoint groups of `size` SMs, how many they are, and the rest of the SMs. Creates nothing."""
    return tuple(cu("cuDevSmResourceSplitByCount", groups, sm_resource(cu, device), 0, size))


def _create(cu: Driver, device: Any, resources: Sequence[Any], index: int) -> SmPartition:
    descriptor = cu("cuDevResourceGenerateDesc", list(resources), len(resources))
    flag = cu.api.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    green = cu("cuGreenCtxCreate", descriptor, device, flag)
    context = cu("cuCtxFromGreenCtx", green)
    return SmPartition(index, sum(int(r.sm.smCount) for r in resources), GreenContext(green, context))
