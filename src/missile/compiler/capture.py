"""One run of a compiled model, captured: every launch with its kernel, its arguments and the memory they point into.

Two independent records of the same run are laid over each other: Inductor's launchers say which Triton kernel runs on which
tensors, and the CUDA graph that the driver captured says what really ran. When they agree launch by launch, nothing but
Triton kernels ran; when they don't, the model is refused by the name of the foreign kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from missile.compiler.estimate import TensorArgument, estimate
from missile.compiler.package import (
    Bound,
    Buffer,
    BufferKind,
    FillStep,
    KernelImage,
    KernelProfile,
    KernelStep,
    Step,
    TensorSpec,
)
from missile.compiler.resolve import Block, Resolver
from missile.errors import UnsupportedError
from missile.gpu.cuda.inspect import FillNode, GraphNode, KernelNode, read_graph

__all__ = ["CapturedPlan", "capture"]


@dataclass(frozen=True, slots=True)
class CapturedPlan:
    """A launch plan with its code and constants. Profiles hold estimated bytes and operations, and no times yet.

    code: (PTX text, cubin) by kernel id. weights: the constant buffers' storages, by buffer id, on the GPU.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    buffers: tuple[Buffer, ...]
    kernels: tuple[KernelImage, ...]
    steps: tuple[Step, ...]
    code: Mapping[str, tuple[str, bytes]]
    weights: Mapping[str, torch.UntypedStorage]


@dataclass(frozen=True, slots=True)
class _Launch:
    name: str
    kernel: Any  # triton's CompiledKernel
    source: str
    tensors: tuple[TensorArgument, ...]


@dataclass(slots=True)
class _Recording:
    """What Inductor's launchers did. `storages` are held, so that no two buffers of the run share an address."""

    launches: list[_Launch] = field(default_factory=list)
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def hold(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        address = int(storage.data_ptr())
        self.storages.setdefault(address, storage)
        return address


def capture(
    run: Callable[[], tuple[torch.Tensor, ...]],
    inputs: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    output_names: Sequence[str] = (),
) -> CapturedPlan:
    """Run `run` (compiled, warm) twice, the second time into a CUDA graph, and read the plan off it.

    output_names: of what `run` gives, in its order; empty: it gives one tensor, which is called "output".
    UnsupportedError naming the kernel when something other than a Triton kernel or a memset runs.
    """
    run()  # whatever is still compiled or tuned lazily
    with _recording() as first:
        run()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with _recording() as second, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = run()
    for output in outputs:
        second.hold(output)
    names = list(output_names) or ["output"]
    nodes = read_graph(graph.raw_cuda_graph())
    blocks = _blocks(first, second, inputs, state, outputs)
    resolver = Resolver(blocks)
    steps, kernels, code = _steps(nodes, second.launches, resolver)
    specs = tuple(_spec(name, tensor, resolver) for name, tensor in inputs.items())
    out = tuple(_spec(name, output, resolver) for name, output in zip(names, outputs, strict=True))
    for spec in out:
        resolver.use(spec.buffer, len(steps) - 1)
    buffers = resolver.buffers()
    by_address = {block.id: block.address for block in blocks}
    weights = {b.id: second.storages[by_address[b.id]] for b in buffers if b.kind is BufferKind.WEIGHT}
    return CapturedPlan(specs, out, buffers, kernels, steps, code, weights)


@contextmanager
def _recording() -> Iterator[_Recording]:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    recording = _Recording()
    original = CachingAutotuner.run

    def run(autotuner: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(autotuner, *args, **kwargs)
        names = autotuner.fn.arg_names
        tensors = []
        for name, value in zip(names, args, strict=False):
            if isinstance(value, torch.Tensor):
                recording.hold(value)
                spans = value.untyped_storage().nbytes() - value.storage_offset() * value.element_size()
                tensors.append(TensorArgument(name, min(spans, value.nbytes), value.element_size()))
        (launcher,) = autotuner.launchers
        kernel = launcher.__globals__["bin"]
        recording.launches.append(_Launch(autotuner.fn.__name__, kernel, autotuner.fn.src, tuple(tensors)))
        return result

    with mock.patch.object(CachingAutotuner, "run", run):
        yield recording


def _blocks(
    first: _Recording,
    second: _Recording,
    inputs: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> list[Block]:
    """Every storage of the second run, classified: what the first run used too, and is no input or state, is a weight."""
    named: dict[int, tuple[str, BufferKind]] = {}
    for kind, tensors in ((BufferKind.INPUT, inputs), (BufferKind.STATE, state)):
        for name, tensor in tensors.items():
            named[second.hold(tensor)] = (f"{kind.value}.{name}", kind)
    given = list(dict.fromkeys(output.untyped_storage().data_ptr() for output in outputs))
    blocks = []
    for index, (address, storage) in enumerate(second.storages.items()):
        if address in named:
            name, kind = named[address]
        elif address in first.storages:
            name, kind = f"weight.{index}", BufferKind.WEIGHT
        elif address in given:
            name = "output" if len(given) == 1 else f"output.{given.index(address)}"
            kind = BufferKind.OUTPUT
        else:
            name, kind = f"scratch.{index}", BufferKind.SCRATCH
        blocks.append(Block(name, kind, address, storage.nbytes()))
    return blocks


def _steps(
    nodes: tuple[GraphNode, ...], launches: list[_Launch], resolver: Resolver
) -> tuple[tuple[Step, ...], tuple[KernelImage, ...], dict[str, tuple[str, bytes]]]:
    known = {int(launch.kernel.function): launch for launch in launches}
    pending = iter(launches)
    steps: list[Step] = []
    images: dict[int, KernelImage] = {}
    code: dict[str, tuple[str, bytes]] = {}
    for index, node in enumerate(nodes):
        if isinstance(node, FillNode):
            steps.append(_fill(index, node, resolver))
            continue
        launch = next(pending, None)
        if launch is None or int(launch.kernel.function) != node.function:
            if node.function not in known:
                raise UnsupportedError(f"The compiled model runs {node.name!r}, which is not a Triton kernel.")
            raise UnsupportedError(f"The captured run has {node.name!r} where Inductor launched something else.")
        if node.function not in images:
            images[node.function] = _image(len(images), node, launch)
            asm = launch.kernel.asm
            code[images[node.function].id] = (asm["ptx"], asm["cubin"])
        steps.append(_kernel(index, node, launch, images[node.function].id, resolver))
    if (missing := next(pending, None)) is not None:
        raise UnsupportedError(f"Inductor launched {missing.name!r}, which the captured run does not have.")
    return tuple(steps), tuple(images.values()), code


def _kernel(index: int, node: KernelNode, launch: _Launch, image: str, resolver: Resolver) -> KernelStep:
    work = estimate(launch.source, launch.tensors, node.grid)
    return KernelStep(
        kernel=image,
        grid=node.grid,
        block=node.block,
        shared_bytes=node.shared_bytes,
        arguments=resolver.arguments(index, launch.name, node.params, len(launch.tensors)),
        profile=KernelProfile(
            solo_ns=0.0,
            read_bytes=work.read_bytes,
            write_bytes=work.write_bytes,
            footprint_bytes=work.footprint_bytes,
            operations=work.operations,
            tensor_ops=work.tensor_ops,
            blocks=node.grid[0] * node.grid[1] * node.grid[2],
            threads=node.block[0] * node.block[1] * node.block[2],
            blocks_per_sm=max(1, node.blocks_per_sm),
            bound=Bound.LATENCY,
        ),
    )


def _fill(index: int, node: FillNode, resolver: Resolver) -> FillStep:
    target = resolver.find(node.address)
    if target is None:
        raise UnsupportedError("The captured run fills memory that belongs to no tensor of the model.")
    resolver.use(target.buffer, index)
    return FillStep(buffer=target.buffer, offset=target.offset, nbytes=node.nbytes, value=node.value)


def _image(index: int, node: KernelNode, launch: _Launch) -> KernelImage:
    return KernelImage(
        id=f"{index:03d}_{launch.name[:60]}",
        entry=node.name,
        registers=node.registers,
        shared_bytes=node.shared_bytes,
        spill_bytes=node.local_bytes,
        source=launch.name,
    )


def _spec(name: str, tensor: torch.Tensor, resolver: Resolver) -> TensorSpec:
    place = resolver.find(tensor.data_ptr())
    if place is None:
        raise UnsupportedError(f"The model's {name} is in none of the memory that its kernels use.")
    return TensorSpec(
        name=name,
        buffer=place.buffer,
        offset=place.offset,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
    )
