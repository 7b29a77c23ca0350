"""Cutting a model's operations into segments that take about as long as a policy asked for. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from missile.gpu.interface import Copy, Fill, Launch
from missile.runtime.policies.interface import Segment

__all__ = ["MOST_SEGMENTS", "cut"]

# A segment costs an executable graph for each SM partition, on the host and on the GPU.
MOST_SEGMENTS = 1024

Operation = Launch | Fill | Copy


def cut(operations: Sequence[Operation], total_ns: float, target_ns: float | None) -> tuple[Segment, ...]:
    """`operations` in segments of about `target_ns` (0.0: one kernel each; None: one segment), which cover them in order.

    total_ns: how long all of them take, measured; it is spread over the operations by their profiles, evenly where one of
    them has none. Fills and copies stay with the kernel after them, so that every segment but the last ends with a kernel.
    A kernel is never cut, so segments may be longer than asked for; there are at most `MOST_SEGMENTS`.
    """
    works = [operation.work if isinstance(operation, Launch) else None for operation in operations]
    lengths = _spread(operations, total_ns)
    if not operations:
        return (Segment(0, 0, total_ns, ()),)
    target = float("inf") if target_ns is None else max(target_ns, 0.0)
    least = -(-len(operations) // MOST_SEGMENTS)
    segments = []
    first, length = 0, 0.0
    for index, operation in enumerate(operations):
        length += lengths[index]
        if index + 1 == len(operations):
            closes = True
        else:
            # It ends where it is nearer to the target than with the next operation.
            closes = (
                isinstance(operation, Launch)
                and index + 1 - first >= least
                and length + lengths[index + 1] / 2 >= target
            )
        if closes:
            segments.append(Segment(first, index + 1, length, tuple(works[first : index + 1])))
            first, length = index + 1, 0.0
    return tuple(segments)


def _spread(operations: Sequence[Operation], total_ns: float) -> list[float]:
    kernels = [operation for operation in operations if isinstance(operation, Launch)]
    profiled = [kernel.work.solo_ns for kernel in kernels if kernel.work is not None and kernel.work.solo_ns > 0.0]
    if not kernels:
        return [total_ns / len(operations)] * len(operations)
    if len(profiled) < len(kernels):
        return [total_ns / len(kernels) if isinstance(op, Launch) else 0.0 for op in operations]
    scale = total_ns / sum(profiled)
    lengths = iter(profiled)
    return [next(lengths) * scale if isinstance(operation, Launch) else 0.0 for operation in operations]
