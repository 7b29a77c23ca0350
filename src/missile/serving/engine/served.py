"""A tenant's model as the GPU's executor serves it: what was bound, buffers for its batches, and those on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from missile.compiler.bind import BoundModel
from missile.gpu.interface import Gpu, Launch
from missile.runtime.loading import BE_DEPTH, LS_DEPTH, LoadedTenant, host_buffers
from missile.runtime.tenant import Tenant
from missile.serving.config import TenantConfig
from missile.serving.engine.binding import Binder, Found
from missile.serving.engine.escapes import EscapeCounter
from missile.serving.engine.executor import Batch
from missile.serving.engine.packages import Views, package_signature, views
from missile.serving.engine.planes import in_planes, takes_planes
from missile.serving.engine.usage import Usage
from missile.serving.tensors import ModelSignature

__all__ = ["ServedModel", "load_served", "runtime_tenant"]

_ASIDE_BYTES: Final = 1 << 20  # tenants whose batches have more than this, in or out, are copied on a thread


@dataclass(slots=True, eq=False)
class ServedModel:
    """A tenant's model. Views are of one pinned buffer for each batch that may be on its way.

    number: in the live engine. given: batches that it was given since that engine was made; batch n is in buffers n modulo
    their count. flying: those that have not ended, in order.
    """

    tenant: TenantConfig
    signature: ModelSignature
    bound: BoundModel
    loaded: LoadedTenant
    depth: int
    notes: tuple[str, ...]
    preemptible: bool
    aside: bool
    inputs: Views
    outputs: Views
    escapes: EscapeCounter | None
    resources: ExitStack
    number: int = -1
    given: int = 0
    flying: deque[Batch] = field(default_factory=deque)
    usage: Usage = field(default_factory=Usage)
    executed_ns: int = 0  # when the last of its batches that has ended did so

    @property
    def running_depth(self) -> int:
        """Batches of it that the GPU may have at once; others wait in their buffers."""
        return min(self.depth, LS_DEPTH if self.tenant.tenant_class == "LS" else BE_DEPTH)


def load_served(
    gpu: Gpu, binder: Binder, tenant: TenantConfig, found: Found, *, name: str, others: Mapping[str, tuple[int, ...]]
) -> ServedModel:
    """Load the model and its buffers; `resources` gives both back. name: what the runtime calls the tenant. others, and
    errors: as for `Binder.place`. After an error nothing is held."""
    signature = package_signature(found.package, tenant.outputs, batched=tenant.batched)
    depth = LS_DEPTH if tenant.tenant_class == "LS" else BE_DEPTH + 1  # one is filled while others are on the GPU
    with ExitStack() as undo:
        placed = binder.place(tenant, found, others, undo)
        model = bound = placed.bound
        # Only LS: all kernels of a tenant whose blocks leave on demand look at its flag. (Long batches have a thread.)
        planes = tenant.tenant_class == "LS" and placed.is_plain and takes_planes(found.package.inputs)
        if planes:
            bound = in_planes(model, gpu, undo)
        inputs = host_buffers(gpu, tenant.name, bound.input_bytes, depth, undo)
        outputs = host_buffers(gpu, tenant.name, bound.output_bytes, depth, undo)
        for buffer in (*inputs, *outputs):
            buffer.array[:] = 0
        escapes = None
        if placed.escapes:
            escapes = EscapeCounter(gpu, placed.escapes, tenant=tenant.name, undo=undo)
        colors = placed.colors or ()
        runtime = runtime_tenant(tenant, name)
        loaded = LoadedTenant(runtime, bound, inputs, outputs, depth, colors=colors, weights=placed.weights)
        return ServedModel(
            tenant=tenant,
            signature=signature,
            bound=bound,
            loaded=loaded,
            depth=depth,
            notes=placed.notes,
            preemptible=_is_preemptible(bound),
            aside=max(bound.input_bytes, bound.output_bytes) > _ASIDE_BYTES,
            inputs=views(model, inputs, depth, is_input=True, batched=tenant.batched, contiguous=planes),
            outputs=views(bound, outputs, depth, is_input=False, batched=tenant.batched),
            escapes=escapes,
            resources=undo.pop_all(),
        )


def runtime_tenant(tenant: TenantConfig, name: str) -> Tenant:
    """The tenant as the runtime's policies see it; how its requests arrive is not known, and none of them asks."""
    return Tenant.model_validate(
        {
            "name": name,
            "class": tenant.tenant_class,
            "model": tenant.model,
            "batch": tenant.batch.max,
            "arrivals": {"kind": "poisson", "rate_per_s": 1.0},
            "residency": tenant.residency,
            "slo_ms": tenant.slo_ms if tenant.tenant_class == "LS" else None,
            "weight": tenant.weight,
        }
    )


def _is_preemptible(bound: BoundModel) -> bool:
    return any(isinstance(operation, Launch) and operation.preempt is not None for operation in bound.operations)
