"""A bound model whose blocks leave on demand and run later: kernels with the check in front, marks, and the switch.

How an engine uses it (the contract is `gpu.interface.PreemptControl`):

    model = preempt_model(bound, gpu, images)     # takes over `bound`; its operations are in the plan's order
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
again on a resume. Streams may change between segments, as long as the new one waits for the old one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from missile.compiler.bind import BoundModel, Operation
from missile.compiler.package import KernelStep, ModelPackage
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.preempt import STEPS, Look, Place, arguments, make_preemptible
from missile.errors import MisuseError, UnsupportedError
from missile.gpu.interface import Fill, Gpu, Graph, Kernel, Launch, PreemptControl, Preemption

__all__ = [
    "HIDE_BELOW_NS",
    "LongBlocks",
    "PreemptibleModel",
    "assemble_preemptible",
    "build_preemptible",
    "decision_places",
    "long_blocks",
    "preempt_model",
    "read_preemptible",
]

_FOLDER = "preemptible"

HIDE_BELOW_NS = 12_000.0


@dataclass(frozen=True, slots=True)
class PreemptibleModel:
    """A `BoundModel` that can be preempted. Owns it, the control, the marks and the kernels until `close`.

    operations: those of the bound model, each with the check; graph: all of them. What else a `BoundModel` has, it has too.
    nbytes: device memory held, that of the bound model included.
    """

    package: ModelPackage
    tenant: str
    graph: Graph
    operations: tuple[Launch, ...]
    control: PreemptControl
    input_address: int
    input_bytes: int
    output_address: int
    output_bytes: int
    nbytes: int
    addresses: Mapping[str, int]
    _resources: ExitStack = field(repr=False)

    def close(self) -> None:
        """Give everything back. Idempotent. The caller has made sure that no work of this model runs."""
        self._resources.close()


def preempt_model(model: BoundModel, gpu: Gpu, images: Mapping[str, bytes]) -> PreemptibleModel:
    """`model`, which must not be used by itself any more, with the kernels `images` (cubins by kernel id).

    images: from `read_preemptible` or `build_preemptible`; of a colored model, bound to its colors. Simulated GPUs, which
    run profiles, take none. Blocks until the marks are zeroed. MisuseError for a kernel that is missing, UnsupportedError
    for a plan with fills or too many steps; then `model` is as it was.
    """
    if len(model.operations) > STEPS:
        raise UnsupportedError(
            f"Package {model.package.name!r} has {len(model.operations)} steps; {STEPS} can be preempted."
        )
    with ExitStack() as undo:
        kernels = _load(model, gpu, images, undo)
        control = gpu.create_preempt_control()
        undo.callback(control.close)
        launches = [_launch(model, index, operation) for index, operation in enumerate(model.operations)]
        blocks = [prod(launch.grid) for launch in launches]
        marks = gpu.allocate(max(sum(blocks), 1), tenant=model.tenant)
        undo.callback(marks.free)
        stream = gpu.create_stream()
        try:
            stream.launch(Fill(marks.address, marks.nbytes))
            stream.synchronize()
        finally:
            stream.close()
        operations = tuple(
            _preemptible(launch, kernel, control, where, step)
            for step, (launch, kernel, where) in enumerate(
                zip(launches, kernels, _starts(marks.address, blocks), strict=True)
            )
        )
        graph = gpu.create_graph(operations)
        undo.callback(graph.close)
        resources = ExitStack()
        resources.callback(model.close)
        resources.push(undo.pop_all())
        return PreemptibleModel(
            package=model.package,
            tenant=model.tenant,
            graph=graph,
            operations=operations,
            control=control,
            input_address=model.input_address,
            input_bytes=model.input_bytes,
            output_address=model.output_address,
            output_bytes=model.output_bytes,
            nbytes=model.nbytes + marks.nbytes,
            addresses=model.addresses,
            _resources=resources,
        )


def _load(model: BoundModel, gpu: Gpu, images: Mapping[str, bytes], undo: ExitStack) -> list[Kernel | None]:
    """The kernel of each operation; None on a simulated GPU: it stays the same."""
    if gpu.info.simulated:
        return [None] * len(model.operations)
    loaded: dict[str, Kernel] = {}
    for image in model.package.kernels:
        if image.id not in images:
            raise MisuseError(f"Package {model.package.name!r} has no preemptible code for kernel {image.id!r}.")
        module = gpu.load_module(images[image.id], name=f"{model.tenant}/{image.id}")
        undo.callback(module.close)
        loaded[image.id] = module.kernel(image.entry)
    return [loaded[step.kernel] if isinstance(step, KernelStep) else None for step in model.package.steps]


def _launch(model: BoundModel, index: int, operation: Operation) -> Launch:
    if isinstance(operation, Launch):
        return operation
    # A fill would run whether or not the blocks before it have left.
    raise UnsupportedError(f"Package {model.package.name!r} can't be preempted: step {index} is a fill, not a kernel.")


def _starts(address: int, blocks: Sequence[int]) -> Iterator[int]:
    for count in blocks:
        yield address
        address += count


def _preemptible(launch: Launch, kernel: Kernel | None, control: PreemptControl, marks: int, step: int) -> Launch:
    return Launch(
        kernel=launch.kernel if kernel is None else kernel,
        grid=launch.grid,
        block=launch.block,
        shared_bytes=launch.shared_bytes,
        params=launch.params if kernel is None else (*launch.params, *arguments(control.address, marks, step)),
        work=launch.work,
        preempt=Preemption(control, step),
    )


# --- code
def decision_places(package: ModelPackage, hide_below_ns: float = HIDE_BELOW_NS) -> dict[str, Place]:
    """Where each kernel's blocks decide: late in kernels none of whose launches takes longer than `hide_below_ns`.

    A block that leaves late has loaded, which disturbs others for as long as the launch would have: not at all where
    launches are short. A launch that is short feels the latency of an early decision most. Early where not profiled.
    """
    longest: dict[str, float] = {}
    for step in package.steps:
        if isinstance(step, KernelStep):
            took = float("inf") if step.profile is None else step.profile.solo_ns
            longest[step.kernel] = max(took, longest.get(step.kernel, 0.0))
    return {name: Place.LATE if took <= hide_below_ns else Place.EARLY for name, took in longest.items()}


def build_preemptible(
    package: ModelPackage,
    directory: Path,
    *,
    look: Look = Look.FRESH,
    places: Mapping[str, Place] | None = None,
    workers: int = 4,
) -> dict[str, bytes]:
    """Rewrite and assemble every kernel of `package`, which lies in `directory`, and keep the code there.

    places: by kernel id; None takes `decision_places`. UnsupportedError naming the kernel that can't be preempted; then
    nothing is kept. Replaces what was kept before.
    """
    texts = {}
    for image in package.kernels:
        path = directory / "kernels" / f"{image.id}.ptx"
        try:
            texts[image.id] = path.read_text()
        except OSError as error:
            raise MisuseError(
                f"{path} can't be read: {error.strerror}; a package needs its PTX to be preemptible."
            ) from None
    chosen = decision_places(package) if places is None else places
    cubins = assemble_preemptible(texts, look=look, places=chosen, workers=workers)
    folder = directory / _FOLDER
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, cubin in cubins.items():
            (part / f"{name}.cubin").write_bytes(cubin)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return cubins


def assemble_preemptible(
    texts: Mapping[str, str], *, look: Look = Look.FRESH, places: Mapping[str, Place] | None = None, workers: int = 4
) -> dict[str, bytes]:
    """Cubins of the PTX `texts` (by kernel id, colored or not), made preemptible, each for the GPU that it names.

    places: by kernel id, early where it says nothing.
    """
    chosen = places or {}

    def build(item: tuple[str, str]) -> bytes:
        name, text = item
        ptx = make_preemptible(text, name=name, look=look, place=chosen.get(name, Place.EARLY))
        target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
        assert target is not None  # it was parsed
        return assemble(ptx, arch=target[1], name=name)

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(texts, pool.map(build, texts.items()), strict=True))


def read_preemptible(package: ModelPackage, directory: Path) -> dict[str, bytes]:
    """What `build_preemptible` kept. MisuseError when there is none or a kernel is missing."""
    folder = directory / _FOLDER
    if not folder.is_dir():
        raise MisuseError(f"Package {package.name!r} in {directory} was not compiled to be preempted.")
    try:
        return {image.id: (folder / f"{image.id}.cubin").read_bytes() for image in package.kernels}
    except OSError as error:
        raise MisuseError(f"{error.filename} can't be read: {error.strerror}.") from None


# --- blocks that take long
@dataclass(frozen=True, slots=True)
class LongBlocks:
    """A step whose blocks take long, and so the time until its SMs are free. block_ns: of one block, estimated."""

    step: int
    kernel: str
    block_ns: float


def long_blocks(package: ModelPackage, sms: int, bound_ns: float = 50_000.0) -> tuple[LongBlocks, ...]:
    """Steps of a profiled package whose blocks take longer than `bound_ns` on a GPU of `sms` SMs, longest first.

    A block's time is taken as the launch's, times the share of its blocks that run at once: exact where all waves are full
    and blocks are alike.
    """
    found = []
    for index, step in enumerate(package.steps):
        if isinstance(step, KernelStep) and (profile := step.profile) is not None:
            at_once = min(profile.blocks, profile.blocks_per_sm * sms)
            block_ns = profile.solo_ns * at_once / max(profile.blocks, 1)
            if block_ns > bound_ns:
                found.append(LongBlocks(index, step.kernel, block_ns))
    return tuple(sorted(found, key=lambda entry: -entry.block_ns))
