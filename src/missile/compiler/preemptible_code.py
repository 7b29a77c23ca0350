"""A package's kernels as code that checks whether to leave: plain, or colored for a shape of translation.

They lie beside the others, in `preemptible/plain/` or `preemptible/SHAPE/`: a cubin for each kernel and, of colored ones,
`transfer.cubin` with the kernels that move data in and out. Each takes the three parameters of `ptx.preempt` more than it
would, behind all others. Nothing here touches a GPU; `preempt_model` makes a plan of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from missile.coloring.shape import Shape
from missile.compiler.carrying import carried_by
from missile.compiler.color_worker import Task, color, color_all
from missile.compiler.colored import code_version, shape_name
from missile.compiler.kept import is_kept, keep, target_of
from missile.compiler.package import KernelStep, ModelPackage
from missile.compiler.placements import PlacementTable
from missile.compiler.planning import alignments
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.fill import fill_entry
from missile.compiler.ptx.preempt import Look, Place, make_preemptible
from missile.compiler.ptx.rewrite import Placement
from missile.compiler.ptx.transfer import transfer_ptx
from missile.errors import MisuseError

__all__ = [
    "HIDE_BELOW_NS",
    "PreemptibleKernels",
    "build_preemptible",
    "decision_places",
    "is_preemptible",
    "preemptible_kernels",
    "read_preemptible",
]

HIDE_BELOW_NS = 12_000.0

_FOLDER, _PLAIN, _TRANSFER = "preemptible", "plain", "transfer"


@dataclass(frozen=True, slots=True)
class PreemptibleKernels:
    """Code of one package. cubins: by kernel id. shape: of the translation, None for plain memory; transfer: then b""."""

    shape: Shape | None
    cubins: Mapping[str, bytes]
    transfer: bytes = b""


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
    shape: Shape | None = None,
    *,
    look: Look = Look.FRESH,
    places: Mapping[str, Place] | None = None,
    executor: Executor | None = None,
) -> PreemptibleKernels:
    """Rewrite and assemble every kernel of `package`, which lies in `directory`, and keep the code there.

    shape: of the color translation that comes first; None for plain memory. places: by kernel id, early where it says
    nothing; None takes `decision_places`. executor: who does the work; None for processes on all cores.
    UnsupportedError naming the kernel that can't be preempted or colored; then nothing is kept. Replaces what was kept.
    """
    chosen = decision_places(package) if places is None else places
    best = PlacementTable.load(package.gpu)
    aligned, carried = alignments(package), {} if shape is None else carried_by(package, shape)
    tasks = []
    for image in package.kernels:
        path = directory / "kernels" / f"{image.id}.ptx"
        try:
            text = path.read_text()
        except OSError as error:
            raise MisuseError(
                f"{path} can't be read: {error.strerror}; a package needs its PTX to be preemptible."
            ) from None
        placement = None if shape is None else best.find(shape.form, text)
        preempt = look, chosen.get(image.id, Place.EARLY)
        arch = target_of(text, image.id)
        brings = (
            carried.get(image.id) if placement is Placement.CARRIED else None
        )  # as the usual code (`color_kernels`)
        bounds = aligned.get(image.id, ())
        tasks.append(Task(image.id, text, shape, placement, arch, preempt, aligned=bounds, carried=brings))
    done = color_all(tasks) if executor is None else executor.map(color, tasks)
    cubins = dict(zip((task.name for task in tasks), done, strict=True))
    transfer = b""
    if shape is not None and tasks:
        arch = tasks[0].arch
        text = make_preemptible(transfer_ptx(shape, arch) + fill_entry(shape), name=_TRANSFER, look=look)
        transfer = assemble(text, arch=arch, name=_TRANSFER)
    kernels = PreemptibleKernels(shape, cubins, transfer)
    files = {f"{name}.cubin": cubin for name, cubin in (cubins | ({_TRANSFER: transfer} if transfer else {})).items()}
    keep(_folder(directory, shape), files, code_version())
    return kernels


def preemptible_kernels(package: ModelPackage, directory: Path, shape: Shape | None = None) -> PreemptibleKernels:
    """What is kept, made now where there is nothing. Raises what `build_preemptible` raises."""
    if is_preemptible(directory, shape):
        return read_preemptible(package, directory, shape)
    return build_preemptible(package, directory, shape)


def is_preemptible(directory: Path, shape: Shape | None = None) -> bool:
    """Whether the package in `directory` has such code, by this version of the rewriting."""
    return is_kept(_folder(directory, shape), code_version())


def read_preemptible(package: ModelPackage, directory: Path, shape: Shape | None = None) -> PreemptibleKernels:
    """What `build_preemptible` kept. MisuseError when there is none or a kernel is missing."""
    folder = _folder(directory, shape)
    if not is_preemptible(directory, shape):
        raise MisuseError(f"Package {package.name!r} in {directory} was not compiled to be preempted.")
    try:
        cubins = {image.id: (folder / f"{image.id}.cubin").read_bytes() for image in package.kernels}
        transfer = b"" if shape is None else (folder / f"{_TRANSFER}.cubin").read_bytes()
    except OSError as error:
        raise MisuseError(f"{error.filename} can't be read: {error.strerror}.") from None
    return PreemptibleKernels(shape, cubins, transfer)


def _folder(directory: Path, shape: Shape | None) -> Path:
    return directory / _FOLDER / (_PLAIN if shape is None else shape_name(shape))
