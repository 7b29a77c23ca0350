"""A package's kernels with color translation: compiled once for a shape of translation, whatever the colors.

They lie beside the plain ones, in `colored/SHAPE/`: a cubin for each kernel, and `transfer.cubin` with the kernels that move
data in and out. Each takes one parameter more than the plain kernel, the last: the tenant's constants
(`TenantMemory.constants`), by value. Nothing here touches a GPU. What is not here yet: a plan that runs on colored
buffers (see docs/design/colored-execution.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from missile.coloring.shape import Shape
from missile.compiler.package import ModelPackage
from missile.compiler.ptx.assemble import assemble
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.rewrite import Placement, rewrite
from missile.compiler.ptx.transfer import transfer_ptx
from missile.errors import MisuseError

__all__ = ["ColoredKernels", "color_kernels", "read_colored", "shape_name"]

_TRANSFER = "transfer"


@dataclass(frozen=True, slots=True)
class ColoredKernels:
    """Code of one package for one shape of translation, of any tenant. cubins: by kernel id."""

    shape: Shape
    cubins: Mapping[str, bytes]
    transfer: bytes


def shape_name(shape: Shape) -> str:
    """The folder that code for `shape` lies in: different for shapes that need different code."""
    bits = "".join(f".{bit}" for bit in shape.layout.inner_bits if bit >= shape.layout.index_bits[0])
    frame = f"{shape.layout.page_bytes >> 10}k-{shape.unit_bytes}{bits}"
    parts = [str(shape.form), frame, f"m{shape.masks}", str(shape.space), f"x{int(shape.page_xors)}", str(shape.escape)]
    return "-".join(parts)


def color_kernels(
    package: ModelPackage,
    directory: Path,
    shape: Shape,
    *,
    placement: Placement = Placement.DEFINITION,
    workers: int = 4,
) -> ColoredKernels:
    """Rewrite and assemble every kernel of `package`, which lies in `directory`, for `shape`, and keep the code there.

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
    targets = {parse(text, name).target for name, text in sources.items()}
    if len(targets) != 1:
        raise MisuseError(
            f"The kernels of package {package.name!r} are for different GPUs: {', '.join(sorted(targets))}."
        )
    (arch,) = targets
    texts = {name: rewrite(text, shape, name=name, placement=placement).ptx for name, text in sources.items()}
    texts[_TRANSFER] = transfer_ptx(shape, arch)
    with ThreadPoolExecutor(workers) as pool:
        pending = {name: pool.submit(assemble, text, arch=arch, name=name) for name, text in texts.items()}
        cubins = {name: future.result() for name, future in pending.items()}
    _keep(cubins, directory / "colored" / shape_name(shape))
    return ColoredKernels(shape, {name: cubins[name] for name in sources}, cubins[_TRANSFER])


def read_colored(package: ModelPackage, directory: Path, shape: Shape) -> ColoredKernels:
    """What `color_kernels` kept. MisuseError when there is none for `shape` or a kernel is missing."""
    folder = directory / "colored" / shape_name(shape)
    if not folder.is_dir():
        raise MisuseError(
            f"Package {package.name!r} in {directory} was not compiled for colors in the form {folder.name}."
        )
    try:
        cubins = {
            name: (folder / f"{name}.cubin").read_bytes() for name in (*(k.id for k in package.kernels), _TRANSFER)
        }
    except OSError as error:
        raise MisuseError(f"{error.filename} can't be read: {error.strerror}.") from None
    transfer = cubins.pop(_TRANSFER)
    return ColoredKernels(shape, cubins, transfer)


def _keep(cubins: Mapping[str, bytes], folder: Path) -> None:
    """Write all files or none."""
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
