"""Compile the CUDA C++ sources in `kernels/` for one GPU architecture, and keep the result on disk.

Needs NVRTC (a library of its own: no driver, no GPU), so kernels are compiled and checked on any machine. The cache is
keyed by everything that decides the output: source, options and NVRTC's version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from missile.errors import InternalError, MisuseError, UnsupportedError

__all__ = ["compile_source", "cubin", "kernel_names", "ptx", "version", "why_unavailable"]

_SUFFIX = ".cu"


def _api() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise UnsupportedError(
            "NVRTC can't be used: the CUDA bindings are not installed (pip install 'missile[cuda]')."
        ) from None
    return nvrtc


def version() -> tuple[int, int]:
    """NVRTC's version. UnsupportedError when it can't be loaded."""
    api = _api()
    try:
        status, major, minor = api.nvrtcVersion()
    except (RuntimeError, OSError):
        raise UnsupportedError(
            "NVRTC can't be used: its library was not found (pip install nvidia-cuda-nvrtc)."
        ) from None
    if status:
        raise UnsupportedError(f"NVRTC can't be used: nvrtcVersion says {status.name}.")
    return major, minor


def why_unavailable() -> str | None:
    """Why NVRTC can't be used here, in one sentence, or None when it can."""
    try:
        version()
    except UnsupportedError as error:
        return str(error)
    return None


def _directory() -> Any:
    return resources.files("missile.gpu.cuda").joinpath("kernels")


def kernel_names() -> tuple[str, ...]:
    """The sources there are, without suffix, ascending."""
    return tuple(sorted(e.name.removesuffix(_SUFFIX) for e in _directory().iterdir() if e.name.endswith(_SUFFIX)))


def cubin(name: str, arch: str, defines: Mapping[str, int] | None = None) -> bytes:
    """`kernels/NAME.cu` as a cubin for `arch` ("sm_90"), from the cache when it was compiled before.

    Raises MisuseError for an unknown name, UnsupportedError without NVRTC or when NVRTC does not know `arch`.
    """
    return _compiled(name, arch, defines or {}, "cubin")


def ptx(name: str, arch: str, defines: Mapping[str, int] | None = None) -> str:
    """`kernels/NAME.cu` as PTX for `arch` ("sm_90"); otherwise as `cubin`."""
    return _compiled(name, arch.replace("sm_", "compute_"), defines or {}, "ptx").decode().rstrip("\0")


def _compiled(name: str, arch: str, defines: Mapping[str, int], form: Literal["cubin", "ptx"]) -> bytes:
    if name not in kernel_names():
        raise MisuseError(f"There is no kernel source {name!r}; known: {', '.join(kernel_names())}.")
    source = _directory().joinpath(name + _SUFFIX).read_text()
    options = _options(arch, defines)
    key = hashlib.sha256("\0".join([source, *options, str(version())]).encode()).hexdigest()
    path = _cache() / f"{name}-{arch}-{key[:32]}.{form}"
    try:
        return path.read_bytes()
    except OSError:
        image = compile_source(source, f"{name}{_SUFFIX}", options, form)
    _store(path, image)
    return image


def _options(arch: str, defines: Mapping[str, int]) -> list[str]:
    return [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "-default-device",
        *(f"-D{key}={value}" for key, value in sorted(defines.items())),
    ]


def compile_source(source: str, name: str, options: list[str], form: Literal["cubin", "ptx"] = "cubin") -> bytes:
    """CUDA C++ text to a cubin or PTX. `name`: of the file, in NVRTC's log. InternalError carries the log's start."""
    version()
    api = _api()
    status, program = api.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    if status:
        raise InternalError(f"nvrtcCreateProgram failed for {name}: {status.name}.")
    try:
        (status,) = api.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status:
            log = _log(api, program)
            if "gpu-architecture" in log:
                raise UnsupportedError(f"This NVRTC does not know the GPU's architecture ({options[0]}).")
            raise InternalError(f"{name} does not compile: {status.name}: {log[:2000]}")
        _, size = (api.nvrtcGetCUBINSize if form == "cubin" else api.nvrtcGetPTXSize)(program)
        image: bytes = b" " * size
        (api.nvrtcGetCUBIN if form == "cubin" else api.nvrtcGetPTX)(program, image)
        return image
    finally:
        api.nvrtcDestroyProgram(program)


def _log(api: Any, program: Any) -> str:
    _, size = api.nvrtcGetProgramLogSize(program)
    text: bytes = b" " * size
    api.nvrtcGetProgramLog(program, text)
    return text.decode(errors="replace").strip("\0 \n")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "missile" / "kernels"


def _store(path: Path, image: bytes) -> None:
    """Keep `image` for the next time; a disk that can't be written to only costs a compilation then."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(image)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
