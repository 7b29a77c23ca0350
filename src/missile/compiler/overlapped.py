"""A package's plain kernels as code that waits itself for the launch before: made once, kept beside the others.

It lies in `overlapped/NAME/`, a cubin for each kernel that can be rewritten; `bind(..., overlap=...)` makes a plan of it, in
which the others are launched as usual. Of colored memory the same is in `colored` (`color_kernels(..., overlap=...)`).
Nothing here touches a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from missile.compiler.color_worker import Task, color_each
from missile.compiler.colored import code_version
from missile.compiler.kept import is_kept, keep, target_of
from missile.compiler.overlap_table import PLAIN, Overlapping, OverlapTable
from missile.compiler.package import ModelPackage
from missile.errors import MissileError, MisuseError

__all__ = [
    "OverlappedKernels",
    "build_overlapped",
    "is_overlapped",
    "overlapped_kernels",
    "prepare_overlapped",
    "read_overlapped",
]

_APART = "apart.json"


@dataclass(frozen=True, slots=True)
class OverlappedKernels:
    """cubins: of kernels that wait for the launch before, by kernel id. apart: why the others can't be made to."""

    cubins: Mapping[str, bytes]
    apart: Mapping[str, str] = field(default_factory=dict)


def build_overlapped(
    package: ModelPackage, directory: Path, overlap: Overlapping, *, executor: Executor | None = None
) -> OverlappedKernels:
    """Rewrite and assemble the kernels of `package`, which lies in `directory`, and keep the code there.

    executor: who does the work; None for processes on all cores. Replaces what was kept. A folder that can't be written to
    keeps nothing.
    """
    return _build([(package, directory)], overlap, executor)[0]


def prepare_overlapped(packages: Iterable[tuple[ModelPackage, Path]], overlap: Overlapping) -> None:
    """Make at once, on all cores, what of `packages` with their directories is not kept yet."""
    missing = {directory: package for package, directory in packages if not is_overlapped(directory, overlap)}
    _build([(package, directory) for directory, package in missing.items()], overlap, None)


def overlapped_kernels(package: ModelPackage, directory: Path, overlap: Overlapping) -> OverlappedKernels:
    """What is kept, made now where there is nothing."""
    if is_overlapped(directory, overlap):
        return read_overlapped(package, directory, overlap)
    return build_overlapped(package, directory, overlap)


def is_overlapped(directory: Path, overlap: Overlapping) -> bool:
    """Whether the package in `directory` has such code, by this version of the rewriting."""
    return is_kept(_folder(directory, overlap), code_version(overlap))


def read_overlapped(package: ModelPackage, directory: Path, overlap: Overlapping) -> OverlappedKernels:
    """What `build_overlapped` kept. MisuseError when there is none or a kernel is missing."""
    folder = _folder(directory, overlap)
    if not is_overlapped(directory, overlap):
        raise MisuseError(f"Package {package.name!r} in {directory} has no code that overlaps ({overlap.name}).")
    try:
        apart = json.loads((folder / _APART).read_text())
        names = [image.id for image in package.kernels if image.id not in apart]
        return OverlappedKernels({name: (folder / f"{name}.cubin").read_bytes() for name in names}, apart)
    except OSError as error:
        raise MisuseError(f"{error.filename} can't be read: {error.strerror}.") from None


def _build(
    packages: Sequence[tuple[ModelPackage, Path]], overlap: Overlapping, executor: Executor | None
) -> list[OverlappedKernels]:
    tasks: list[Task] = []
    owners: list[int] = []
    apart: list[dict[str, str]] = [{} for _ in packages]
    for owner, (package, directory) in enumerate(packages):
        table = OverlapTable.load(package.gpu)
        for image in package.kernels:
            path = directory / "kernels" / f"{image.id}.ptx"
            try:
                text = path.read_text()
                arch = target_of(text, image.id)
            except OSError as error:
                apart[owner][image.id] = f"{path} can't be read: {error.strerror}."
            except MissileError as error:
                apart[owner][image.id] = str(error)
            else:
                how = table.overlap_for(overlap, PLAIN, text)
                tasks.append(Task(image.id, text, None, None, arch, overlap=how))
                owners.append(owner)
    cubins: list[dict[str, bytes]] = [{} for _ in packages]
    for owner, task, made in zip(owners, tasks, color_each(tasks, executor), strict=True):
        if isinstance(made, MissileError):
            apart[owner][task.name] = str(made)
        else:
            cubins[owner][task.name] = made
    found = []
    for (_, directory), own, others in zip(packages, cubins, apart, strict=True):
        found.append(OverlappedKernels(own, others))
        files = {f"{name}.cubin": cubin for name, cubin in own.items()}
        files[_APART] = (json.dumps(dict(others), indent=1) + "\n").encode()
        # Not where the package can't be written to, or another process has just written the same.
        with suppress(OSError):
            keep(_folder(directory, overlap), files, code_version(overlap))
    return found


def _folder(directory: Path, overlap: Overlapping) -> Path:
    return directory / "overlapped" / overlap.name
