"""From a model to a package on disk: build, compile, capture, check against eager, measure, write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from missile.compiler.package import BufferKind, ModelPackage, write_package
from missile.compiler.profile import profile_package
from missile.compiler.tuning import TuningTable, table_path
from missile.compiler.weights import WEIGHTS_FILE, write_weights
from missile.errors import MisuseError, UnsupportedError
from missile.gpu import open_gpu

if TYPE_CHECKING:
    import torch

    from missile.compiler.capture import CapturedPlan
    from missile.workloads.models import BuiltModel

__all__ = ["compile_built", "compile_model"]

Progress = Callable[[str], None]


def compile_model(
    name: str,
    directory: Path,
    *,
    batch: int | None = None,
    device: str = "cuda:0",
    table: TuningTable | None = None,
    progress: Progress = lambda _: None,
    measuring: AbstractContextManager[object] | None = None,
) -> ModelPackage:
    """Compile the model `name` (one of the twelve, or MODULE:FACTORY) on this machine's GPU into `directory`.

    table: tuning results to use and add to; None for the one that ships with Missile (then nothing is kept).
    progress: told what is being done. measuring: entered around every measurement, where processes share the GPU.
    Replaces a package that is there once the new one is whole. UnsupportedError without PyTorch or a GPU that it can
    use, or naming the operator that can't be compiled; MisuseError for an unknown model.
    """
    from missile.workloads.models import build_model

    def build() -> BuiltModel:
        return build_model(name, batch, device=device)

    return compile_built(build, directory, device=device, table=table, progress=progress, measuring=measuring)


def compile_built(
    build: Callable[[], BuiltModel],
    directory: Path,
    *,
    device: str = "cuda:0",
    table: TuningTable | None = None,
    progress: Progress = lambda _: None,
    measuring: AbstractContextManager[object] | None = None,
) -> ModelPackage:
    """As `compile_model`, of the model that `build` gives, which is on `device`."""
    torch = _require_torch(device)
    gpu_name = torch.cuda.get_device_name(device)
    if table is None:
        table = TuningTable.load(table_path(gpu_name), gpu_name)
    progress("building the model")
    # A stream of its own: candidates are timed as CUDA graphs, which the default stream can't be captured into.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        return _compile(build(), directory, table, gpu_name, progress, measuring)


def _compile(
    model: BuiltModel,
    directory: Path,
    table: TuningTable,
    gpu_name: str,
    progress: Progress,
    measuring: AbstractContextManager[object] | None,
) -> ModelPackage:
    import torch

    from missile.compiler.capture import capture
    from missile.compiler.inductor import compile_triton_only
    from missile.compiler.timing import graph_ns

    guard = measuring or nullcontext()
    _fill_state(model)
    initial = {name: tensor.clone() for name, tensor in model.state.items()}
    progress("running it as it is")
    expected = model.run_all()
    progress("compiling it to Triton kernels")
    run = compile_triton_only(model, table, measuring=measuring)
    for name, tensor in model.state.items():
        tensor.copy_(initial[name])
    error = max(_relative_error(ours.float(), theirs.float()) for ours, theirs in zip(run(), expected, strict=True))
    progress("capturing the launch plan")
    plan = capture(run, dict(zip(model.input_names, model.inputs, strict=True)), model.state, model.output_names)
    with guard:
        progress("measuring the model as it is")
        eager_ns = graph_ns(model.run)
    package = ModelPackage(
        name=model.name,
        batch=model.batch,
        gpu=gpu_name,
        arch="sm_{}{}".format(*torch.cuda.get_device_capability()),
        versions=_versions(),
        inputs=plan.inputs,
        outputs=plan.outputs,
        buffers=plan.buffers,
        kernels=plan.kernels,
        steps=plan.steps,
        relative_error=error,
        eager_ns=eager_ns,
    )
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(package, plan, part)
        del plan, run
        with guard, open_gpu(f"cuda:{torch.cuda.current_device()}") as gpu:
            progress("measuring its kernels")
            package = profile_package(package, part, gpu)
        write_package(package, part)
        shutil.rmtree(directory, ignore_errors=True)
        part.replace(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return package


def _require_torch(device: str) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise UnsupportedError("Compiling a model needs PyTorch; install missile[torch].") from None
    if not device.startswith("cuda"):
        raise MisuseError(f"A model is compiled on the GPU that it will run on; {device!r} is not one (cuda:0 is).")
    if not torch.cuda.is_available():
        raise UnsupportedError("Compiling a model needs a GPU that PyTorch can use, and there is none.")
    return torch


def _fill_state(model: BuiltModel) -> None:
    """Give a decoder's cache contents, or attention over it would be checked on zeros."""
    import torch

    generator = torch.Generator("cpu").manual_seed(1)
    for tensor in model.state.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


def _relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """||ours - expected|| / ||expected||; where that is 0 / 0, 0."""
    off = (ours - expected).norm()
    return float(off / expected.norm()) if off else 0.0


def _write(package: ModelPackage, plan: CapturedPlan, directory: Path) -> None:
    import torch

    kernels = directory / "kernels"
    kernels.mkdir(parents=True)
    for name, (ptx, cubin) in plan.code.items():
        (kernels / f"{name}.ptx").write_text(ptx)
        (kernels / f"{name}.cubin").write_bytes(cubin)
    weights = {}
    for buffer in package.buffers:
        if buffer.kind is BufferKind.WEIGHT:
            data = torch.empty(0, dtype=torch.uint8, device="cuda").set_(plan.weights[buffer.id])
            weights[buffer.id] = data.cpu().numpy()
    write_weights(weights, directory / WEIGHTS_FILE)
    write_package(package, directory)


def _versions() -> dict[str, str]:
    import torch
    import triton

    from missile import __version__

    return {"missile": __version__, "torch": torch.__version__, "triton": triton.__version__}
