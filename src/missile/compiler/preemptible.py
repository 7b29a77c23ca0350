"""A bound model whose blocks leave on demand and run later: kernels with the check in front, marks, and the switch.

How an engine uses it (the contract is `gpu.interface.PreemptControl`):

    model = preempt_model(bound, gpu, kernels)    # takes over `bound`; has its operations, in their order
    control = control_of(model)
    graphs = [gpu.create_graph(model.operations[a:b]) for a, b in segments]

    control.begin(stream)                         # before the first segment of every request
    stream.launch_graph(graphs[0]) ...            # as many ahead as wanted

    control.raise_flag()                          # an LS request came: blocks of this model leave as they start
    ...                                           # the launched segments end by themselves, within microseconds
    control.lower_flag()                          # whenever blocks may run again, also before they have ended

    left = control.left()                         # once they have ended: None means all of them are whole, else
    control.resume(stream, left)                  # relaunch the segment that holds operation number `left.step`
    stream.launch_graph(graphs[n]) ...            # of request `left.request`, and what followed it

An operation's step is its index in `model.operations`. The input of a request is copied before its first segment and not
again on a resume, and no other request's meanwhile: copies don't leave. Streams may change between segments, as long as the
new one waits for the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod

from missile.compiler.bind import BoundModel, Operation
from missile.compiler.package import KernelProfile, KernelStep, ModelPackage
from missile.compiler.preemptible_code import PreemptibleKernels
from missile.compiler.ptx.preempt import STEPS, arguments
from missile.compiler.ptx.transfer import GATHER, SCATTER
from missile.compiler.steps import load_images
from missile.errors import MisuseError, UnsupportedError
from missile.gpu.interface import Fill, Gpu, Kernel, Launch, PreemptControl, Preemption

__all__ = ["LONG_NS", "LongBlocks", "block_ns", "control_of", "long_blocks", "preempt_model"]

LONG_NS = 50_000.0
"""A block that takes longer keeps a preempted model's SMs for too long."""


def preempt_model(model: BoundModel, gpu: Gpu, kernels: PreemptibleKernels | None) -> BoundModel:
    """`model`, which must not be used by itself any more, with blocks that leave on demand.

    kernels: the package's code for the memory that `model` is in; None on simulated GPUs, which run profiles. Blocks until
    the marks are zeroed. MisuseError for code of other kernels, UnsupportedError for a plan with fills or too many steps;
    then `model` is as it was.
    """
    name = model.package.name
    if len(model.operations) > STEPS:
        raise UnsupportedError(f"Package {name!r} has {len(model.operations)} steps; {STEPS} can be preempted.")
    if model.shadowed:
        raise UnsupportedError(f"Package {name!r} has kernels of two forms of translation; it can't be preempted.")
    with ExitStack() as undo:
        loaded = _load(model, gpu, kernels, undo)
        control = gpu.create_preempt_control()
        undo.callback(control.close)
        blocks = [prod(launch.grid) for launch in _launches(model.package, model.operations)]
        marks = gpu.allocate(max(sum(blocks), 1), tenant=model.tenant)
        undo.callback(marks.free)
        stream = gpu.create_stream()
        try:
            stream.launch(Fill(marks.address, marks.nbytes))
            stream.synchronize()
        finally:
            stream.close()
        plan = _Plan(model, loaded, control, marks.address, tuple(blocks))
        operations = plan.preemptible(model.operations)
        graph = gpu.create_graph(operations)
        undo.callback(graph.close)
        resources = ExitStack()
        resources.callback(model.close)
        resources.push(undo.pop_all())
        return replace(
            model,
            graph=graph,
            operations=operations,
            nbytes=model.nbytes + marks.nbytes,
            _resources=resources,
        )


def control_of(model: BoundModel) -> PreemptControl:
    """The switch of what `preempt_model` made. MisuseError for another model."""
    for operation in model.operations:
        if isinstance(operation, Launch) and operation.preempt is not None:
            return operation.preempt.control
    raise MisuseError(f"The model of tenant {model.tenant!r} can't be preempted.")


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the operations of `model` become preemptible. kernels, blocks: of each; kernels: none on a simulated GPU."""

    model: BoundModel
    kernels: tuple[Kernel, ...]
    control: PreemptControl
    marks: int
    blocks: tuple[int, ...]

    def preemptible(self, operations: Sequence[Operation]) -> tuple[Launch, ...]:
        changed = []
        marks = self.marks
        # Nothing overlaps: this code does not wait, and marks and the control are written by the launch before.
        for step, launch in enumerate(_launches(self.model.package, operations)):
            preempt = Preemption(self.control, step)
            if self.kernels:
                params = (*launch.params, *arguments(self.control.address, marks, step))
                changed.append(
                    replace(launch, kernel=self.kernels[step], params=params, preempt=preempt, overlaps=False)
                )
            else:
                changed.append(replace(launch, preempt=preempt, overlaps=False))
            marks += self.blocks[step]
        return tuple(changed)


def _load(model: BoundModel, gpu: Gpu, kernels: PreemptibleKernels | None, undo: ExitStack) -> tuple[Kernel, ...]:
    """The kernel of each operation; none on a simulated GPU."""
    if gpu.info.simulated:
        return ()
    package = model.package
    missing = [image.id for image in package.kernels if kernels is None or image.id not in kernels.cubins]
    if kernels is None or missing:
        raise MisuseError(f"Package {package.name!r} has no preemptible code for kernel {missing[0]!r}.")
    loaded = load_images(package, kernels.cubins, gpu, model.tenant, undo)
    movers = None
    if kernels.transfer:
        movers = gpu.load_module(kernels.transfer, name=f"{model.tenant}/transfer")
        undo.callback(movers.close)
    steps = iter(package.steps)
    found = []
    for launch in _launches(package, model.operations):
        step = None if launch.kernel.name in (SCATTER, GATHER) else next(steps)
        if isinstance(step, KernelStep):
            found.append(loaded[step.kernel])
        elif movers is not None:
            found.append(movers.kernel(launch.kernel.name))
        else:
            raise MisuseError(
                f"Package {package.name!r} is in colored memory and its preemptible code is for plain memory."
            )
    return tuple(found)


def _launches(package: ModelPackage, operations: Sequence[Operation]) -> list[Launch]:
    found = []
    for index, operation in enumerate(operations):
        if not isinstance(operation, Launch):
            # It would run whether or not the blocks before it have left.
            raise UnsupportedError(
                f"Package {package.name!r} can't be preempted: step {index} is a fill, not a kernel."
            )
        found.append(operation)
    return found


# --- blocks that take long
@dataclass(frozen=True, slots=True)
class LongBlocks:
    """A step whose blocks take long, and so the time until its SMs are free. block_ns: of one block, estimated."""

    step: int
    kernel: str
    block_ns: float


def block_ns(profile: KernelProfile, sms: int) -> float:
    """How long one block of a launch takes on a GPU of `sms` SMs, ns, estimated.

    The launch's time, times the share of its blocks that run at once: exact where all waves are full and blocks are alike.
    """
    return profile.solo_ns * min(profile.blocks, profile.blocks_per_sm * sms) / max(profile.blocks, 1)


def long_blocks(package: ModelPackage, sms: int, bound_ns: float = LONG_NS) -> tuple[LongBlocks, ...]:
    """Steps of a profiled package whose blocks take longer than `bound_ns` on a GPU of `sms` SMs, longest first."""
    found = []
    for index, step in enumerate(package.steps):
        if isinstance(step, KernelStep) and step.profile is not None:
            length = block_ns(step.profile, sms)
            if length > bound_ns:
                found.append(LongBlocks(index, step.kernel, length))
    return tuple(sorted(found, key=lambda entry: -entry.block_ns))
