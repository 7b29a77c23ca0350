"""Which GPU a device name means. Only this module and tests name the implementations."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from missile.errors import MisuseError
from missile.gpu.interface import Gpu

__all__ = ["known_devices", "open_gpu", "resolve"]

DEFAULT_SIMULATED = "sim:h100"


def _specs() -> list[str]:
    directory = resources.files("missile.gpu.sim").joinpath("specs")
    return sorted(entry.name.removesuffix(".toml") for entry in directory.iterdir() if entry.name.endswith(".toml"))


def known_devices() -> tuple[str, ...]:
    """Names that `open_gpu` takes, beside `cuda:N` for every N and `sim:PATH.toml`."""
    return ("auto", "cuda:0", *(f"sim:{name}" for name in _specs()))


def resolve(device: str) -> tuple[str, str]:
    """What `device` means here: a concrete name, and why in a few words ("" when it was concrete already).

    `auto` is the first CUDA GPU where there is one, else the simulated H100. Raises MisuseError for unknown names.
    """
    if device == "auto":
        from missile.gpu.cuda.driver import why_unavailable

        reason = why_unavailable()
        return ("cuda:0", "a CUDA GPU was found") if reason is None else (DEFAULT_SIMULATED, reason)
    kind, _, rest = device.partition(":")
    if kind == "cuda" and (rest.isdecimal() or not rest):
        return f"cuda:{int(rest or 0)}", ""
    if kind == "sim" and rest and (rest.endswith(".toml") or rest in _specs()):
        return device, ""
    raise MisuseError(f"Unknown device {device!r}; known: {', '.join(known_devices())}, cuda:N, sim:PATH.toml.")


def open_gpu(device: str = "auto", *, seed: int = 0) -> Gpu:
    """Open a GPU. `seed` seeds the simulator's noise; hardware ignores it.

    Raises MisuseError (unknown device, broken spec), UnsupportedError (no driver, no such GPU).
    """
    name, _ = resolve(device)
    kind, _, rest = name.partition(":")
    if kind == "cuda":
        from missile.gpu.cuda import CudaGpu

        return CudaGpu(int(rest))
    from missile.gpu.sim import SimulatedGpu

    if rest.endswith(".toml") and not Path(rest).is_file():
        raise MisuseError(f"There is no simulated-GPU spec at {rest}.")
    return SimulatedGpu.open(rest, seed=seed)
