"""Models on the GPU made preemptible: a roster whose BE tenants' blocks leave when a policy asks for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from missile.compiler.bind import BoundModel
from missile.compiler.library import find_package
from missile.compiler.preemptible import preempt_model
from missile.compiler.preemptible_code import PreemptibleKernels, preemptible_kernels
from missile.compiler.synthetic import is_synthetic
from missile.errors import UnsupportedError
from missile.gpu.interface import Gpu
from missile.runtime.loading import LoadedTenant, Roster

__all__ = ["Preempting", "make_preemptible"]


class Preempting(NamedTuple):
    """roster: owns all that the former one owned. refused: why a tenant's model stayed as it was, by tenant."""

    roster: Roster
    refused: Mapping[str, str]


def make_preemptible(
    roster: Roster,
    names: Collection[str] | None = None,
    *,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Preempting:
    """`roster`, which is used up, with tenants `names` (None: all BE tenants) preemptible where their models can be.

    Their code is read from their packages, or made now and kept there (seconds). progress: told the name of the tenant that
    is next. After an error `roster` is as it was, but for models that were done already, which are closed.
    """
    gpu, refused = roster.gpu, {}
    tenants = []
    with ExitStack() as undo:
        for loaded in roster.tenants:
            wanted = not loaded.tenant.latency_sensitive if names is None else loaded.tenant.name in names
            if wanted and isinstance(loaded.model, BoundModel):
                if progress is not None:
                    progress(loaded.tenant.name)
                try:
                    model = preempt_model(loaded.model, gpu, _kernels(gpu, loaded, loaded.model, cache))
                except UnsupportedError as error:
                    refused[loaded.tenant.name] = str(error)
                else:
                    undo.callback(model.close)
                    loaded = replace(loaded, model=model)
            tenants.append(loaded)
        resources = ExitStack()
        resources.callback(roster.close)
        resources.push(undo.pop_all())
    return Preempting(Roster(gpu, tenants, resources), refused)


def _kernels(gpu: Gpu, loaded: LoadedTenant, model: BoundModel, cache: Path | None) -> PreemptibleKernels | None:
    if gpu.info.simulated:
        return None
    tenant = loaded.tenant
    if is_synthetic(tenant.model):
        raise UnsupportedError(
            f"Tenant {tenant.name!r}: a synthetic model keeps no code that could be made preemptible."
        )
    package, directory = find_package(tenant.model, tenant.batch, gpu.info, cache)
    if directory is None:
        raise UnsupportedError(f"Tenant {tenant.name!r}: package {package.name!r} has no code.")
    return preemptible_kernels(model.package, directory, model.shape)
