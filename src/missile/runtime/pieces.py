"""A model in pieces, made before a run's clock starts: graphs of its segments, or of what each part of its weights needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle, pairwise
from typing import NamedTuple, Protocol, runtime_checkable

from missile.gpu.interface import Copy, Event, Fill, Gpu, Graph, Launch, PreemptControl
from missile.runtime.host_weights import Part
from missile.runtime.policies.interface import Segment

__all__ = ["MOST_PIECES", "Cut", "Piece", "control_of", "make_cut", "operations_of", "weight_pieces"]

MOST_PIECES = 16
"""Pieces of one tenant's requests (what one `Advance` gives the GPU) that may be in flight at once."""

Operations = Sequence[Launch | Fill | Copy]


class Cut(NamedTuple):
    """A tenant's model in segments: a graph for each, and events for the ends of pieces, used in turn.

    segment_of: by step, as the control counts them; empty without one.
    """

    segments: tuple[Segment, ...]
    graphs: tuple[Graph, ...]
    next_mark: Callable[[], Event]
    segment_of: Mapping[int, int]


class Piece(NamedTuple):
    """Operations of a model up to number `until`, from where the piece before ends."""

    until: int
    graph: Graph


@runtime_checkable
class _CuttableModel(Protocol):
    """A `BoundModel`: a model whose operations are known one by one."""

    @property
    def operations(self) -> Operations: ...


def operations_of(model: object) -> Operations:
    """The model's operations one by one; none where they are not known."""
    return model.operations if isinstance(model, _CuttableModel) else ()


def control_of(operations: Operations) -> PreemptControl | None:
    """The control that all operations look at, or None: one that looks at none would run on what others have not written."""
    looking = [operation.preempt if isinstance(operation, Launch) else None for operation in operations]
    controls = {id(found.control): found.control for found in looking if found is not None}
    return next(iter(controls.values())) if len(controls) == 1 and None not in looking else None


def make_cut(gpu: Gpu, whole: Graph, operations: Operations, segments: tuple[Segment, ...], undo: ExitStack) -> Cut:
    """`operations` in `segments`. whole: the graph of all of them, which serves where there is one segment. `undo` gives the
    others and the events back."""
    marks = []
    for _ in range(MOST_PIECES + 1):
        marks.append(gpu.create_event(timing=False))
        undo.callback(marks[-1].close)
    graphs = [whole]
    if len(segments) > 1:
        graphs = _graphs(gpu, operations, [(segment.first, segment.last) for segment in segments], undo)
    return Cut(segments, tuple(graphs), cycle(marks).__next__, _steps(operations, segments))


def weight_pieces(gpu: Gpu, operations: Operations, parts: Sequence[Part], undo: ExitStack) -> tuple[Piece, ...]:
    """`operations` in graphs that need one part of the weights more each. `undo` gives them back."""
    starts = [0, *sorted({part.first for part in parts} - {0}), len(operations)]
    graphs = _graphs(gpu, operations, list(pairwise(starts)), undo)
    return tuple(Piece(until, graph) for until, graph in zip(starts[1:], graphs, strict=True))


def _graphs(gpu: Gpu, operations: Operations, spans: Sequence[tuple[int, int]], undo: ExitStack) -> list[Graph]:
    graphs = []
    for first, until in spans:
        graphs.append(gpu.create_graph(operations[first:until], within=operations))
        undo.callback(graphs[-1].close)
    return graphs


def _steps(operations: Operations, segments: Sequence[Segment]) -> dict[int, int]:
    """The segment of each step that a control may name."""
    return {
        operation.preempt.step: index
        for index, segment in enumerate(segments)
        for operation in operations[segment.first : segment.last]
        if isinstance(operation, Launch) and operation.preempt is not None
    }
