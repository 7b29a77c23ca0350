"""What launches of a package's colored kernels carry: ranges that their arguments point into, and bits of those."""

from __future__ import annotations

from collections.abc import Mapping

from missile.coloring.carried import Carried, Range, plan_carried, range_of
from missile.coloring.pool import TenantMemory
from missile.coloring.shape import LOGICAL_BASE, Shape
from missile.coloring.translation import PairTranslation
from missile.compiler.package import KernelStep, ModelPackage, PointerArgument

__all__ = ["carried_by", "launch_constants"]


def carried_by(package: ModelPackage, shape: Shape) -> dict[str, Carried]:
    """Where launches of each kernel carry bits of what they are given, by kernel, for those that can. What code is compiled
    for and what launches are made with have to agree in it."""
    sizes = {buffer.id: buffer.nbytes for buffer in package.buffers}
    longest: dict[str, list[int]] = {}
    for step in package.steps:
        if isinstance(step, KernelStep):
            nbytes = [
                # As in any place that buffers can have.
                range_of(LOGICAL_BASE + a.offset, LOGICAL_BASE + sizes[a.buffer]).nbytes
                if isinstance(a, PointerArgument)
                else 0
                for a in step.arguments
            ]
            known = longest.setdefault(step.kernel, nbytes)
            longest[step.kernel] = list(map(max, known, nbytes))
    plans = {kernel: plan_carried(shape, nbytes) for kernel, nbytes in longest.items()}
    return {kernel: plan for kernel, plan in plans.items() if plan is not None}


def launch_constants(
    step: KernelStep, carried: Carried, package: ModelPackage, memory: TenantMemory, addresses: Mapping[str, int]
) -> bytes:
    """The constants of one launch in `memory`, whose buffers have `addresses`, by id."""
    sizes = {buffer.id: buffer.nbytes for buffer in package.buffers}
    ranges: list[Range] = []
    for slot in carried.slots:
        argument = step.arguments[slot.argument]
        assert isinstance(argument, PointerArgument)
        start = addresses[argument.buffer]
        ranges.append(range_of(start + argument.offset, start + sizes[argument.buffer]))
    translation = memory.translation
    assert isinstance(translation, PairTranslation)
    return carried.constants(memory.constants, translation, memory.base, ranges)
