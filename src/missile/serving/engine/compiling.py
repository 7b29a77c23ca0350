"""A tenant's model as a compiled package: kept by what it is made of, and compiled by a process of its own if it is new.

Compiling takes minutes of Python. In the engine's process it would hold the interpreter against the launches of everybody
else, and keep PyTorch and the memory that its compiler took on the GPU; a process of its own gives all of that back.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from missile.compiler.library import package_directory
from missile.compiler.package import ModelPackage, read_package
from missile.errors import MissileError, MisuseError, UnsupportedError
from missile.gpu.interface import GpuInfo
from missile.serving.config import TenantConfig

__all__ = ["Worker", "compiled_package", "package_name"]

log = logging.getLogger("missile.engine")

Worker = Callable[[TenantConfig, Path, Path, str], None]
"""Compiles the model of a tenant, whose files are in the first folder, into the second, on the device named."""

_WORKER = "missile.serving.engine.compile_worker"


def compiled_package(
    tenant: TenantConfig, folder: Path, info: GpuInfo, *, cache: Path | None = None, worker: Worker | None = None
) -> tuple[ModelPackage, Path]:
    """The tenant's package for the GPU and where it lies; compiled now, for `batch.max`, where there is none (minutes).

    cache: None takes the default. worker: None takes a process of its own. MisuseError for a file or factory that is not
    there or can't be what it should be, UnsupportedError naming the operator that can't be compiled.
    """
    directory = package_directory(package_name(tenant, folder), max(tenant.batch.max, 1), info.name, cache)
    if not (directory / "package.json").is_file():
        log.info("tenant %s: %s is compiled for batches of %d", tenant.name, tenant.model, tenant.batch.max)
        (worker or _in_a_process)(tenant, folder, directory, info.device)
    return read_package(directory), directory


def package_name(tenant: TenantConfig, folder: Path) -> str:
    """What the tenant's package is called in the cache: the model's name, with a digest of what else it is made of.

    That is the `.pt2` file, the weights' file, the file that a factory is in (not what that imports), `options`, the
    configured inputs and the outputs' names. A zoo model with nothing of that has its own name, and shares its package with
    the rest of Missile.
    """
    digest = hashlib.sha256()
    parts: dict[str, object] = {}
    if tenant.model.endswith(".pt2"):
        parts["model"] = _file_digest(folder / tenant.model, tenant)
    elif ":" in tenant.model:
        parts["model"] = _module_digest(tenant, folder)
    if tenant.weights is not None:
        parts["weights"] = _file_digest(folder / tenant.weights, tenant)
    if tenant.options or tenant.inputs:
        parts["options"] = tenant.options
        parts["inputs"] = [entry.model_dump() for entry in tenant.inputs]
    if tenant.outputs:
        parts["outputs"] = tenant.outputs
    if not parts:
        return tenant.model
    parts["batched"] = tenant.batched
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return f"{Path(tenant.model).name}-{digest.hexdigest()[:16]}"


def _file_digest(path: Path, tenant: TenantConfig) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MisuseError(f"Tenant {tenant.name!r}: {path.name} can't be read: {error.strerror}.") from None


def _module_digest(tenant: TenantConfig, folder: Path) -> str:
    """Of the file that the factory is in. It is found, not imported: the compiling process does that."""
    name = tenant.model.partition(":")[0]
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        found = _on_the_path(name) or importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise MisuseError(f"Tenant {tenant.name!r}: {name!r} can't be imported: {error}.") from error
    if found is None:
        raise MisuseError(f"Tenant {tenant.name!r}: {name!r} can't be imported: there is no module of that name.")
    if found.origin is None or not Path(found.origin).is_file():
        return name
    return _file_digest(Path(found.origin), tenant)


def _on_the_path(name: str) -> ModuleSpec | None:
    """The module as a fresh process would find it, whatever this one has imported; nothing is."""
    PathFinder.invalidate_caches()  # the file may be newer than this process
    found: ModuleSpec | None = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:end]), found.submodule_search_locations if found else None)
        if found is None or (end < len(parts) and found.submodule_search_locations is None):
            return None
    return found


def _in_a_process(tenant: TenantConfig, folder: Path, directory: Path, device: str) -> None:
    """What it logs goes to this process's standard error; its answer is one line of JSON."""
    command = [sys.executable, "-P", "-m", _WORKER, str(folder), str(directory), device]
    ended = subprocess.run(command, input=tenant.model_dump_json(by_alias=True), stdout=subprocess.PIPE, text=True)
    try:
        answer = json.loads(ended.stdout)
    except ValueError:
        raise MissileError(
            f"Tenant {tenant.name!r}: compiling {tenant.model} ended with status {ended.returncode}; the log says more."
        ) from None
    if error := answer.get("error"):
        kind = {"MisuseError": MisuseError, "UnsupportedError": UnsupportedError}.get(answer["kind"], MissileError)
        raise kind(error)
