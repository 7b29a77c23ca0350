"""A package's steps as operations of a GPU: what plain and colored binding have in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from missile.compiler.package import BytesArgument, FillStep, KernelStep, ModelPackage, PointerArgument
from missile.errors import MisuseError
from missile.gpu.interface import Gpu, Kernel, Launch
from missile.gpu.work import KernelWork

__all__ = ["check_package", "launch_of", "load_images", "load_profiles", "works_of"]


def check_package(package: ModelPackage, directory: Path | None, gpu: Gpu) -> None:
    """MisuseError for a plan that names what is not there, and for a package that `gpu` can't run."""
    kernels, buffers = {image.id for image in package.kernels}, {buffer.id for buffer in package.buffers}
    for index, step in enumerate(package.steps):
        named = {step.buffer} if isinstance(step, FillStep) else _named_buffers(step)
        missing = named - buffers or (set() if isinstance(step, FillStep) else {step.kernel} - kernels)
        if missing:
            raise MisuseError(
                f"Package {package.name!r} is broken: step {index} names {min(missing)!r}, which it lacks."
            )
    if gpu.info.simulated:
        return
    if package.recorded or directory is None:
        raise MisuseError(
            f"Package {package.name!r} is a recording without kernels and weights: it runs on simulated GPUs only; "
            f"`missile compile {package.name}` makes one for this GPU."
        )
    arch = "sm_{}{}".format(*gpu.info.compute_capability)
    if package.arch != arch:
        raise MisuseError(
            f"Package {package.name!r} was compiled for {package.gpu} ({package.arch}) and this GPU is "
            f"{gpu.info.name} ({arch}); compile it again here."
        )


def works_of(package: ModelPackage, gpu: Gpu, colors: tuple[int, ...] = ()) -> tuple[KernelWork | None, ...]:
    """The work of every step, which simulated GPUs need; None for each where a package for hardware was not profiled.

    colors: that its memory is in, evenly; () for all.
    """
    if not gpu.info.simulated and any(isinstance(s, KernelStep) and s.profile is None for s in package.steps):
        return (None,) * len(package.steps)
    by_color = dict.fromkeys(colors, 1 / len(colors)) if colors else {}
    return tuple(replace(work, bytes_by_color=by_color) if colors else work for work in package.works())


def load_profiles(package: ModelPackage, gpu: Gpu, tenant: str, undo: ExitStack) -> dict[str, Kernel]:
    """Kernels for a simulated GPU, which runs profiles, not code: one module with all entry points stands for them."""
    entries = "\n".join(f".visible .entry {image.entry}() {{ ret; }}" for image in package.kernels)
    module = gpu.load_module(f".version 8.0\n.target sm_90\n.address_size 64\n{entries}\n".encode(), name=tenant)
    undo.callback(module.close)
    return {image.id: module.kernel(image.entry) for image in package.kernels}


def load_images(
    package: ModelPackage, images: Mapping[str, bytes], gpu: Gpu, tenant: str, undo: ExitStack
) -> dict[str, Kernel]:
    """Kernels from their code, both by the kernel's id."""
    kernels = {}
    for image in package.kernels:
        module = gpu.load_module(images[image.id], name=f"{tenant}/{image.id}")
        undo.callback(module.close)
        kernels[image.id] = module.kernel(image.entry)
    return kernels


def launch_of(
    step: KernelStep,
    work: KernelWork | None,
    kernel: Kernel,
    addresses: Mapping[str, int],
    trailing: tuple[bytes, ...] = (),
    *,
    overlaps: bool = False,
) -> Launch:
    """The step's launch with its buffers at `addresses`. trailing: parameters behind the step's own. overlaps: the kernel's
    code waits for the launch before."""
    params = (_argument(argument, addresses) for argument in step.arguments)
    return Launch(kernel, step.grid, step.block, step.shared_bytes, (*params, *trailing), work, overlaps=overlaps)


def _argument(argument: PointerArgument | BytesArgument, addresses: Mapping[str, int]) -> bytes:
    if isinstance(argument, BytesArgument):
        return bytes.fromhex(argument.value)
    return (addresses[argument.buffer] + argument.offset).to_bytes(8, "little")


def _named_buffers(step: KernelStep) -> set[str]:
    return {argument.buffer for argument in step.arguments if isinstance(argument, PointerArgument)}
