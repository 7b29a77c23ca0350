"""Which executable a graph runs on which partition, against a fake driver: no GPU and no bindings needed."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

from missile.gpu.cuda.gpu import CudaGpu
from missile.gpu.cuda.graphs import CudaGraph
from missile.gpu.cuda.partitions import GreenContext
from missile.gpu.interface import SmPartition, SmSplit


class FakeDriver:
    """Instantiates a graph as ("executable", graph) and notes what is launched and destroyed."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.destroyed: list[Any] = []
        self.api = SimpleNamespace(cuGraphLaunch=self._launch)

    def __call__(self, call: str, graph: Any, flags: int) -> Any:
        assert call == "cuGraphInstantiate"
        return ("executable", graph)

    def enter(self, call: str) -> None: ...

    def release(self, call: str, thing: Any) -> None:
        if call == "cuGraphExecDestroy":
            self.destroyed.append(thing)

    def _launch(self, executable: Any, stream: Any) -> tuple[int]:
        self.launched.append(executable)
        return (0,)


def _part(index: int = 0) -> SmPartition:
    # Equal to the same place of every other split, with native handles that the driver hands out again.
    return SmPartition(index, 64, GreenContext(green=0x1000, context=0x2000))


def test_each_split_gets_executables_of_its_own() -> None:
    cu, captured = FakeDriver(), []

    def capture(operations: Any, partition: SmPartition | None) -> int:
        captured.append(partition if partition is None else "part")
        return len(captured)

    graph = CudaGraph(cu, (), capture)  # type: ignore[arg-type]
    graph.launch("stream", None)
    splits = 200  # enough for an id of a partition that is gone to come up again
    for _ in range(splits):
        part = _part()
        graph.launch("stream", part)
        graph.launch("stream", part)
        del part
        gc.collect(0)
    graph.launch("stream", None)
    assert captured == [None] + ["part"] * splits
    expected = [1, *(number for number in range(2, splits + 2) for _ in range(2)), 1]
    assert cu.launched == [("executable", number) for number in expected]
    graph.close()
    graph.close()
    assert sorted(cu.destroyed) == [("executable", number) for number in range(1, splits + 2)]


def test_what_was_made_for_a_split_is_freed_with_it() -> None:
    cu = FakeDriver()
    gpu = CudaGpu.__new__(CudaGpu)
    gpu._cu, gpu._owned, gpu._graphs = cu, {}, weakref.WeakSet()  # type: ignore[assignment]
    gpu._capture = lambda _, partition: "whole" if partition is None else partition.index  # type: ignore[method-assign]
    kept, closed = gpu.create_graph(()), gpu.create_graph(())
    for _ in range(3):
        gpu._split = SmSplit((_part(0), _part(1)), _part(2))
        for graph in (kept, closed):
            for part in (None, *gpu._split.parts, gpu._split.remainder):
                graph.launch("stream", part)
        cu.destroyed.clear()
        gpu._drop_split()
        assert sorted(cu.destroyed) == [("executable", index) for index in (0, 0, 1, 1, 2, 2)]
    # One that is closed is nobody's, and has nothing left to free.
    closed.close()
    assert list(gpu._owned) == [id(kept)]
    assert cu.destroyed[-1] == ("executable", "whole")
    cu.destroyed.clear()
    gpu._drop_split()
    kept.close()
    assert cu.destroyed == [("executable", "whole")]
    assert not gpu._owned


def test_parts_of_one_split_are_told_apart() -> None:
    cu, captured = FakeDriver(), []

    def capture(operations: Any, partition: Any) -> int:
        captured.append(partition.index)
        return len(captured)

    graph = CudaGraph(cu, (), capture)  # type: ignore[arg-type]
    parts = [_part(index) for index in range(3)]
    for part in [*parts, *reversed(parts)]:
        graph.launch("stream", part)
    assert captured == [0, 1, 2]
    assert [number for _, number in cu.launched] == [1, 2, 3, 3, 2, 1]
