"""A package's kernels with color translation: compiled once for a shape of translation, whatever the colors.

They lie beside the plain ones, in `colored/SHAPE/` (and a longer name where they overlap or are of mixed forms): a cubin for
each kernel, and `transfer.cubin` with the kernels that move data in and out. Each takes one parameter more than the plain
kernel, the last: the tenant's constants (`TenantMemory.constants`), by value. Nothing here touches a GPU; `bind_colored`
makes a plan of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import missile.coloring.carried
import missile.coloring.shape
from missile.coloring.shape import Form, Shape
from missile.compiler import carrying, ptx
from missile.compiler.carrying import carried_by
from missile.compiler.color_worker import Task, color_each, or_apart
from missile.compiler.kept import is_kept, keep, target_of
from missile.compiler.overlap_table import DEFAULT, OVERLAPS, Overlapping, OverlapTable, Tuned, memory_of
from missile.compiler.package import ModelPackage
from missile.compiler.placements import PLACEMENTS, PlacementTable
from missile.compiler.planning import alignments
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.fill import fill_entry
from missile.compiler.ptx.overlap import Overlap, make_overlapping
from missile.compiler.ptx.rewrite import Placement
from missile.compiler.ptx.transfer import transfer_ptx
from missile.errors import MisuseError, UnsupportedError

__all__ = [
    "ColoredKernels",
    "code_version",
    "color_kernels",
    "colored_kernels",
    "has_mixed",
    "is_colored",
    "read_colored",
    "shadow_shape",
    "shape_name",
]

_TRANSFER = "transfer"
_SHADOWED = "shadowed"
_CARRIED = "carried"
_APART = "apart"
_MOVERS = Overlap(DEFAULT)  # of tuned code: these kernels are in no table


@dataclass(frozen=True, slots=True)
class ColoredKernels:
    """Code of one package for one shape of translation, of any tenant. cubins: by kernel id.

    shadowed: kernels whose code is of `shadow_shape(shape)` instead, and takes `TenantMemory.shadow` for constants. carried:
    those that take the constants of each launch, `carrying.launch_constants`.
    overlap: how they overlap, those of `transfer` among them; None where they don't. apart: those that can't be made to,
    "transfer" for the ones that move data.
    """

    shape: Shape
    cubins: Mapping[str, bytes]
    transfer: bytes
    shadowed: frozenset[str] = frozenset()
    overlap: Overlapping | None = None
    apart: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()

    def overlaps(self, kernel: str = _TRANSFER) -> bool:
        """Whether the code of a kernel, or of those that move data, waits for the launch before."""
        return self.overlap is not None and kernel not in self.apart


def shadow_shape(shape: Shape) -> Shape:
    """The shape with a larger table and fewer instructions that translates as one of `shape` does: steps in place of pairs,
    a shadow page table in place of others.
    """
    if shape.form is Form.PAIR:
        return replace(shape, form=Form.STEP)
    return replace(shape, form=Form.SHADOW, masks=0, page_xors=False)


def shape_name(shape: Shape) -> str:
    """The folder that code for `shape` lies in: different for shapes that need different code."""
    bits = "".join(f".{bit}" for bit in shape.layout.inner_bits if bit >= shape.layout.index_bits[0])
    frame = f"{shape.layout.page_bytes >> 10}k-{shape.unit_bytes}{bits}"
    parts = [
        str(shape.form),
        frame,
        f"m{shape.masks}",
        str(shape.space),
        f"x{int(shape.page_xors)}",
        str(shape.escape),
        f"w{int(shape.wide)}",
        *(["alike"] if shape.alike else []),
    ]
    return "-".join(parts)


def color_kernels(
    package: ModelPackage,
    directory: Path,
    shape: Shape,
    *,
    mixed: bool = False,
    placement: Placement | None = None,
    overlap: Overlapping | None = None,
    executor: Executor | None = None,
    keep: bool = True,
) -> ColoredKernels:
    """Rewrite and assemble every kernel of `package`, which lies in `directory`, for `shape`, and keep the code there.

    mixed: kernels that were measured to be faster with a shadow page table get one. placement: of translations in all
    kernels; None takes for each what was measured to be best (`PlacementTable` has both). overlap: how they overlap, as far
    as they can be made to (`ColoredKernels.apart` has the others); None for not at all.
    executor: who does the work; None for processes on all cores. keep: False leaves the package as it is.
    UnsupportedError naming the kernel that can't be colored; then nothing is kept. Replaces what was kept for the shape.
    """
    sources = {}
    for kernel in package.kernels:
        path = directory / "kernels" / f"{kernel.id}.ptx"
        try:
            sources[kernel.id] = path.read_text()
        except OSError as error:
            raise MisuseError(
                f"{path} can't be read: {error.strerror}; a package needs its PTX to be colored."
            ) from None
    if not sources:
        raise MisuseError(f"Package {package.name!r} has no kernels to color.")
    targets = {target_of(text, name) for name, text in sources.items()}
    if len(targets) != 1:
        raise MisuseError(
            f"The kernels of package {package.name!r} are for different GPUs: {', '.join(sorted(targets))}."
        )
    (arch,) = targets
    apart: frozenset[str] = frozenset()
    movers = transfer_ptx(shape, arch) + fill_entry(shape)
    if overlap is not None:
        try:
            movers = make_overlapping(movers, overlap if isinstance(overlap, Overlap) else _MOVERS, name=_TRANSFER)
        except UnsupportedError:
            apart = frozenset({_TRANSFER})
    transfer = assemble(movers, arch=arch, name=_TRANSFER)
    best, waits = PlacementTable.load(package.gpu), OverlapTable.load(package.gpu)
    shadowed = frozenset(name for name, text in sources.items() if mixed and best.is_shadowed(shape.form, text))
    aligned, carried = alignments(package), carried_by(package, shape)
    tasks = []
    for name, text in sources.items():
        own = shadow_shape(shape) if name in shadowed else shape
        how = None if overlap is None else waits.overlap_for(overlap, memory_of(shape.form), text)
        where = placement or best.find(own.form, text)
        brings = carried.get(name) if where is Placement.CARRIED and own == shape else None
        tasks.append(Task(name, text, own, where, arch, overlap=how, aligned=aligned.get(name, ()), carried=brings))
    cubins, refused = or_apart(tasks, color_each(tasks, executor))
    brought = frozenset(task.name for task in tasks if task.carried is not None)
    made = ColoredKernels(shape, cubins, transfer, shadowed, overlap, apart | frozenset(refused), brought)
    if keep:
        _keep(made, _folder(directory, shape, mixed, overlap))
    return made


def colored_kernels(
    package: ModelPackage, directory: Path, shape: Shape, *, mixed: bool = False, overlap: Overlapping | None = None
) -> ColoredKernels:
    """What is kept for `shape`, made now where there is nothing. Raises what `color_kernels` raises."""
    mixed = mixed and has_mixed(package, shape)
    if is_colored(directory, shape, mixed=mixed, overlap=overlap):
        return read_colored(package, directory, shape, mixed=mixed, overlap=overlap)
    return color_kernels(package, directory, shape, mixed=mixed, overlap=overlap)


def has_mixed(package: ModelPackage, shape: Shape) -> bool:
    """Whether code of mixed forms can differ from that of one: whether any kernel is known to be better off in another."""
    return bool(PlacementTable.load(package.gpu).shadowed.get(shape.form))


def is_colored(directory: Path, shape: Shape, *, mixed: bool = False, overlap: Overlapping | None = None) -> bool:
    """Whether the package in `directory` has code for `shape`, by this version of the translation."""
    return is_kept(_folder(directory, shape, mixed, overlap), code_version(overlap))


@cache
def code_version(overlap: Overlapping | None = None) -> str:
    """A digest of what writes rewritten code that overlaps so: code by another version is not used."""
    digest = sha256()
    modules = (missile.coloring.shape, missile.coloring.carried, carrying)
    written = (
        *sorted(Path(ptx.__file__).parent.glob("*.py")),
        *(Path(str(m.__file__)) for m in modules),
        Path(__file__),
    )
    for path in (*written, *_tables(overlap)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _tables(overlap: Overlapping | None) -> list[Path]:
    """The measurements that decide about code."""
    return [
        *sorted(PLACEMENTS.glob("*.json")),
        *(sorted(OVERLAPS.glob("*.json")) if isinstance(overlap, Tuned) else ()),
    ]


def read_colored(
    package: ModelPackage, directory: Path, shape: Shape, *, mixed: bool = False, overlap: Overlapping | None = None
) -> ColoredKernels:
    """What `color_kernels` kept. MisuseError when there is none for `shape` or a kernel is missing."""
    folder = _folder(directory, shape, mixed, overlap)
    if not is_colored(directory, shape, mixed=mixed, overlap=overlap):
        raise MisuseError(
            f"Package {package.name!r} in {directory} was not compiled for colors in the form {folder.name}."
        )
    try:
        cubins = {
            name: (folder / f"{name}.cubin").read_bytes() for name in (*(k.id for k in package.kernels), _TRANSFER)
        }
        shadowed = frozenset((folder / _SHADOWED).read_text().split())
        apart = frozenset((folder / _APART).read_text().split())
        carried = frozenset((folder / _CARRIED).read_text().split())
    except OSError as error:
        raise MisuseError(f"{error.filename} can't be read: {error.strerror}.") from None
    transfer = cubins.pop(_TRANSFER)
    return ColoredKernels(shape, cubins, transfer, shadowed, overlap, apart, carried)


def _folder(directory: Path, shape: Shape, mixed: bool, overlap: Overlapping | None) -> Path:
    overlapped = "" if overlap is None else f"-overlapped-{overlap.name}"
    return directory / "colored" / (shape_name(shape) + ("-mixed" if mixed else "") + overlapped)


def _keep(kernels: ColoredKernels, folder: Path) -> None:
    cubins = {**kernels.cubins, _TRANSFER: kernels.transfer}
    files = {f"{name}.cubin": cubin for name, cubin in cubins.items()}
    for name, some in ((_SHADOWED, kernels.shadowed), (_APART, kernels.apart), (_CARRIED, kernels.carried)):
        files[name] = "".join(f"{kernel}\n" for kernel in sorted(some)).encode()
    keep(folder, files, code_version(kernels.overlap))
