"""Graphs: a fixed sequence of operations that one driver call starts.

A node of a CUDA graph belongs to the context that it was captured in, so a graph captured on the whole GPU would leave
its partition. A `CudaGraph` therefore keeps its operations and captures them once for each partition it is launched on.
Launches that overlap are captured as dependent ones: the edge to them is a programmatic one, all others are full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from missile.gpu.cuda.driver import Driver
from missile.gpu.cuda.modules import CudaKernel
from missile.gpu.cuda.partitions import GreenContext
from missile.gpu.interface import Copy, Fill, Launch, SmPartition

__all__ = ["CudaGraph"]

Operation = Launch | Fill | Copy


class CudaGraph:
    """Operations in order, instantiated for each partition at its first launch there (or by `prepare`).

    capture: makes a CUgraph of the operations in the partition's context. on_close: told once, when the graph is closed.
    """

    def __init__(
        self,
        cu: Driver,
        operations: Sequence[Operation],
        capture: Callable[[Sequence[Operation], SmPartition | None], Any],
        on_close: Callable[[object], None] = lambda _: None,
    ) -> None:
        self._cu = cu
        self._on_close = on_close
        self._operations = tuple(operations)
        self._capture = capture
        # By the partition's handle, which is held here: its id can't become that of a later split's. None: the whole GPU.
        self._executables: dict[GreenContext | None, Any] = {}
        self._launch = cu.api.cuGraphLaunch
        kernels = [op.kernel for op in self._operations if isinstance(op, Launch)]
        self._kernels = len(kernels)
        self.tenants = tuple(dict.fromkeys(k.tenant for k in kernels if isinstance(k, CudaKernel)))

    @property
    def kernels(self) -> int:
        return self._kernels

    def prepare(self, partition: SmPartition | None) -> Any:
        """Instantiate for `partition` unless that was done, so that the first launch there is as fast as the others."""
        key = None if partition is None else partition.handle
        executable = self._executables.get(key)
        if executable is None:
            graph = self._capture(self._operations, partition)
            try:
                executable = self._cu("cuGraphInstantiate", graph, 0)
            finally:
                self._cu.release("cuGraphDestroy", graph)
            self._executables[key] = executable
        return executable

    def launch(self, stream: Any, partition: SmPartition | None) -> None:
        executable = self.prepare(partition)
        self._cu.enter("cuGraphLaunch")
        (status,) = self._launch(executable, stream)
        if status:
            raise self._cu.failure("cuGraphLaunch", status, tenant=self.tenants[0] if self.tenants else "")

    def forget(self, partition: SmPartition) -> None:
        """Free what was made for `partition`, whose split is given up."""
        executable = self._executables.pop(partition.handle, None)
        if executable is not None:
            self._cu.release("cuGraphExecDestroy", executable)

    def close(self) -> None:
        """Idempotent."""
        self._on_close(self)
        executables, self._executables = self._executables, {}
        for executable in executables.values():
            self._cu.release("cuGraphExecDestroy", executable)
