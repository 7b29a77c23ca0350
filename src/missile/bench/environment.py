"""What a result depends on beside the scenario: GPU, driver, versions, commit, host."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from missile import __version__
from missile.gpu.interface import GpuInfo
from missile.runtime import engine

__all__ = ["describe_environment", "is_compiled"]

_PACKAGES = ("numpy", "torch", "triton", "cuda-bindings")


def describe_environment(info: GpuInfo) -> dict[str, Any]:
    """Names and versions of everything a reader needs to judge or repeat the run. Nothing that names a person or host."""
    return {
        "missile": __version__,
        "commit": _commit(),
        "gpu": {
            "name": info.name,
            "device": info.device,
            "simulated": info.simulated,
            "sms": info.sms,
            "l2_bytes": info.l2_bytes,
            "memory_bytes": info.memory_bytes,
            "compute_capability": ".".join(map(str, info.compute_capability)),
            "clock_hz": info.clock_hz,
            "driver": info.driver,
            "runtime": info.runtime,
            "notes": list(info.notes),
        },
        "host": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "compiled": is_compiled(),
        },
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def is_compiled() -> bool:
    """Whether the engine's loop and the policies run as C (`make compiled`)."""
    return Path(engine.__file__).suffix != ".py"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The checkout's commit, with "+" when files differ from it. Where this is no checkout: $MISSILE_COMMIT, or ""."""
    given = os.environ.get("MISSILE_COMMIT", "")
    # An installed copy may lie inside somebody else's checkout: only ours tracks this very file.
    if _git("ls-files", "--error-unmatch", __file__) is None:
        return given
    head = _git("rev-parse", "--short=12", "HEAD")
    return given if head is None else head + ("+" if _git("status", "--porcelain", "-uno") else "")


def _git(*arguments: str) -> str | None:
    """What git answers about the folder that this file is in; None when it can't."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
