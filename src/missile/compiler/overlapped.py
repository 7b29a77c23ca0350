"""A package's plain kernels as code that waits itself for the launch before: made once, kept beside the others.

It lies in `overlapped/NAME/`, a cubin for each kernel; `bind(..., overlap=...)` makes a plan of it. Of colored memory the
same is in `colored` (`color_kernels(..., overlap=...)`). Nothing here touches a GPU.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path

from missile.compiler.color_worker import Task, color, color_all
from missile.compiler.colored import code_version
from missile.compiler.package import ModelPackage
from missile.compiler.ptx.overlap import Overlap
from missile.errors import MisuseError

__all__ = ["build_overlapped", "is_overlapped", "overlapped_kernels", "read_overlapped"]

_VERSION = "version"


def build_overlapped(
    package: ModelPackage, directory: Path, overlap: Overlap, *, executor: Executor | None = None
) -> dict[str, bytes]:
    """Rewrite and assemble every kernel of `package`, which lies in `directory`, and keep the code there; by kernel id.

    executor: who does the work; None for processes on all cores. UnsupportedError naming the kernel that can't overlap;
    then nothing is kept. Replaces what was kept.
    """
    tasks = []
    for image in package.kernels:
        path = directory / "kernels" / f"{image.id}.ptx"
        try:
            text = path.read_text()
        except OSError as error:
            raise MisuseError(
                f"{path} can't be read: {error.strerror}; kernels overlap by their PTX, which a package needs then."
            ) from None
        tasks.append(Task(image.id, text, None, None, _target(text, image.id), overlap=overlap))
    done = color_all(tasks) if executor is None else executor.map(color, tasks)
    cubins = dict(zip((task.name for task in tasks), done, strict=True))
    _keep(cubins, _folder(directory, overlap))
    return cubins


def overlapped_kernels(package: ModelPackage, directory: Path, overlap: Overlap) -> dict[str, bytes]:
    """What is kept, made now where there is nothing. Raises what `build_overlapped` raises."""
    if is_overlapped(directory, overlap):
        return read_overlapped(package, directory, overlap)
    return build_overlapped(package, directory, overlap)


def is_overlapped(directory: Path, overlap: Overlap) -> bool:
    """Whether the package in `directory` has such code, by this version of the rewriting."""
    try:
        return (_folder(directory, overlap) / _VERSION).read_text() == code_version()
    except OSError:
        return False


def read_overlapped(package: ModelPackage, directory: Path, overlap: Overlap) -> dict[str, bytes]:
    """What `build_overlapped` kept. MisuseError when there is none or a kernel is missing."""
    if not is_overlapped(directory, overlap):
        raise MisuseError(f"Package {package.name!r} in {directory} has no code that overlaps ({overlap.name}).")
    try:
        return {image.id: (_folder(directory, overlap) / f"{image.id}.cubin").read_bytes() for image in package.kernels}
    except OSError as error:
        raise MisuseError(f"{error.filename} can't be read: {error.strerror}.") from None


def _target(text: str, name: str) -> str:
    """The GPU that PTX is for."""
    found = re.search(r"^\s*\.target\s+(\w+)", text, re.MULTILINE)
    if found is None:
        raise MisuseError(f"The PTX of kernel {name!r} does not say which GPU it is for.")
    return found[1]


def _folder(directory: Path, overlap: Overlap) -> Path:
    return directory / "overlapped" / overlap.name


def _keep(cubins: Mapping[str, bytes], folder: Path) -> None:
    """Write all files or none."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, cubin in cubins.items():
            (part / f"{name}.cubin").write_bytes(cubin)
        (part / _VERSION).write_text(code_version())
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
