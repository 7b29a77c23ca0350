"""Reading a captured CUDA graph back: what it launches, with which arguments."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from missile.errors import UnsupportedError
from missile.gpu.cuda.driver import Driver, load

__all__ = ["FillNode", "GraphNode", "KernelNode", "read_graph"]


@dataclass(frozen=True, slots=True)
class KernelNode:
    """A launch. function: the CUfunction as an integer. params: each argument's bytes, as in `interface.Launch`."""

    function: int
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    registers: int
    local_bytes: int  # per thread: spilled registers
    blocks_per_sm: int
    params: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class FillNode:
    """A memset of one row of bytes."""

    address: int
    nbytes: int
    value: int


GraphNode = KernelNode | FillNode


def read_graph(graph: int) -> tuple[GraphNode, ...]:
    """The nodes of the CUgraph with handle `graph`, in order. The caller keeps the graph.

    UnsupportedError when the graph is not one chain of kernels and byte-wise memsets.
    """
    api = load()
    cu = Driver(api)
    handle = api.CUgraph(graph)
    nodes: list[GraphNode] = []
    for node in _chain(cu, handle):
        kind = cu("cuGraphNodeGetType", node).name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()
        if kind == "kernel":
            nodes.append(_kernel(cu, node))
        elif kind == "memset":
            nodes.append(_fill(cu, node))
        elif kind != "empty":
            raise UnsupportedError(f"The captured run has a {kind} node, which a launch plan can't hold.")
    return tuple(nodes)


def _chain(cu: Driver, graph: Any) -> list[Any]:
    """All nodes in order; the graph has to be one chain, as a single stream's capture is."""
    count = int(cu("cuGraphGetNodes", graph, 0)[1])
    if count == 0:
        return []
    following, _ = cu("cuGraphGetRootNodes", graph, 2)
    order: list[Any] = []
    while following:
        following = [node for node in following if int(node)]
        if not following:
            break
        if len(following) > 1:
            raise UnsupportedError("The captured run uses several streams at once, which a launch plan can't hold.")
        order.append(following[0])
        following = cu("cuGraphNodeGetDependentNodes", following[0], 2)[0]
    if len(order) != count:
        raise UnsupportedError("The captured run is not one chain of operations, which a launch plan can't hold.")
    return order


def _kernel(cu: Driver, node: Any) -> KernelNode:
    p = cu("cuGraphKernelNodeGetParams", node)
    function = p.func if int(p.func) else cu("cuKernelGetFunction", p.kern)
    name = cu("cuFuncGetName", function).decode()
    pointers = int(p.kernelParams)
    params: list[bytes] = []
    if pointers:
        while True:
            status, _, size = cu.api.cuFuncGetParamInfo(function, len(params))
            if status:  # the driver has no count: it refuses the first index past the end
                break
            address = ctypes.c_uint64.from_address(pointers + 8 * len(params)).value
            params.append(ctypes.string_at(address, int(size)))
    elif int(p.extra):
        raise UnsupportedError(f"Kernel {name!r} was launched with packed arguments, which can't be read back.")
    attribute = cu.api.CUfunction_attribute
    threads = p.blockDimX * p.blockDimY * p.blockDimZ
    return KernelNode(
        function=int(function),
        name=name,
        grid=(p.gridDimX, p.gridDimY, p.gridDimZ),
        block=(p.blockDimX, p.blockDimY, p.blockDimZ),
        shared_bytes=p.sharedMemBytes,
        registers=int(cu("cuFuncGetAttribute", attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function)),
        local_bytes=int(cu("cuFuncGetAttribute", attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function)),
        blocks_per_sm=int(cu("cuOccupancyMaxActiveBlocksPerMultiprocessor", function, threads, p.sharedMemBytes)),
        params=tuple(params),
    )


def _fill(cu: Driver, node: Any) -> FillNode:
    p = cu("cuGraphMemsetNodeGetParams", node)
    value, width = int(p.value), int(p.width) * int(p.elementSize)
    repeated = value & 0xFF
    same = all(value >> 8 * i & 0xFF == repeated for i in range(int(p.elementSize)))
    if int(p.height) > 1 or not same:
        raise UnsupportedError("The captured run has a two-dimensional memset, which a launch plan can't hold.")
    return FillNode(int(p.dst), width, repeated)
