"""Tenants' models brought onto the GPU, each on its own: one that does not fit leaves the others running."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from missile.coloring.pool import TenantMemory
from missile.coloring.shares import Demand
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.library import find_package
from missile.compiler.objective import Objective
from missile.compiler.overlap_table import Tuned
from missile.compiler.overlapped import prepare_overlapped
from missile.compiler.package import ModelPackage
from missile.compiler.planning import needed_bytes
from missile.compiler.synthetic import bind_synthetic, is_synthetic, synthetic_package
from missile.errors import GpuError, MisuseError, OutOfMemoryError, UnsupportedError
from missile.gpu.interface import Gpu, Graph, HostBuffer
from missile.runtime.coloring import ColoredTenants, Coloring
from missile.runtime.host_weights import HostWeights
from missile.runtime.hosted import host_weights, load_image, weight_bytes
from missile.runtime.swap_space import SwapSpace
from missile.runtime.tenant import Tenant

__all__ = [
    "BE_DEPTH",
    "LS_DEPTH",
    "Coloring",
    "LoadedTenant",
    "Roster",
    "RunnableModel",
    "host_buffers",
    "load_tenants",
    "overlap_of",
]

# Requests of one tenant that may be in flight at once. BE: the next is on the GPU before the current one ends, no more, so
# that a policy decides late. LS: a policy that starts requests as they come finds room but for the longest queues.
BE_DEPTH = 2
LS_DEPTH = 8
DEPENDENT_LAUNCHES = (9, 0)  # the first compute capability that has them


class RunnableModel(Protocol):
    """What the engine uses of a `BoundModel`."""

    @property
    def graph(self) -> Graph: ...
    @property
    def input_address(self) -> int: ...
    @property
    def input_bytes(self) -> int: ...
    @property
    def output_address(self) -> int: ...
    @property
    def output_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class LoadedTenant:
    """A tenant with its model on the GPU and pinned memory for `depth` requests, or the reason why it has none.

    inputs, outputs: one buffer for each request in flight; empty where the model has no input or output. colors: those
    that its memory is in, of the channel map; empty for plain memory. weights: where they wait on the host; None: they are
    on the device.
    """

    tenant: Tenant
    model: RunnableModel | None
    inputs: tuple[HostBuffer, ...] = ()
    outputs: tuple[HostBuffer, ...] = ()
    depth: int = BE_DEPTH
    error: str = ""
    colors: tuple[int, ...] = ()
    weights: HostWeights | None = None


class Roster:
    """Loaded tenants, in the order given. Owns their models and pinned memory; close it, or use it in a `with`."""

    def __init__(self, gpu: Gpu, tenants: Sequence[LoadedTenant], resources: ExitStack) -> None:
        self.gpu = gpu
        self.tenants = tuple(tenants)
        self._resources = resources

    @property
    def ready(self) -> tuple[LoadedTenant, ...]:
        """Those that can run."""
        return tuple(loaded for loaded in self.tenants if loaded.model is not None)

    def only(self, name: str) -> Roster:
        """A view of this roster with one tenant in it; owns nothing."""
        chosen = [loaded for loaded in self.tenants if loaded.tenant.name == name]
        if not chosen:
            raise MisuseError(f"Unknown tenant {name!r}; known: {', '.join(t.tenant.name for t in self.tenants)}.")
        return Roster(self.gpu, chosen, ExitStack())

    def close(self) -> None:
        """Free everything. Idempotent. No run may be using it."""
        self._resources.close()

    def __enter__(self) -> Roster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def load_tenants(
    gpu: Gpu,
    tenants: Sequence[Tenant],
    *,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
    coloring: Coloring | None = None,
    swap_bytes: int | None = None,
    overlap: Objective | None = Objective.ALONE,
) -> Roster:
    """Load every tenant's model and pinned buffers. Close the roster afterwards.

    cache: where compiled packages lie (None: the default). progress: told the name of the tenant that is loaded next.
    coloring: which colors their memory has; None for plain memory. Colored code of a package that has none yet is made
    (seconds to a minute), and kept in the package.
    swap_bytes: device memory for the weights of all tenants with residency "host" together, which don't count against
    their limits; needed where there are any.
    overlap: launches of LS models overlap, as it was measured to be best for this; None: each starts when the one before has
    ended. Those of BE models, which may be preempted, never do. Code for it is made and kept like colored code.
    A tenant that does not fit in memory or in its limit gets an `error` and the others go on; OutOfMemoryError when
    none fits. MisuseError for an unknown model, two tenants of one name, colors that make no sense, or weights that can't
    wait on the host or are larger than `swap_bytes`; UnsupportedError for a kernel that can't be colored; then nothing is
    loaded.
    """
    names = [tenant.name for tenant in tenants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MisuseError(f"Tenant {twice[0]!r} is given twice.")
    if not tenants:
        raise MisuseError("There is no tenant to run.")
    if coloring is not None:
        coloring.check(names, gpu)
    loaded: list[LoadedTenant] = []
    with ExitStack() as undo:
        packages = {tenant.name: _find(gpu, tenant, cache) for tenant in tenants}
        overlaps = {tenant.name: overlap_of(gpu, tenant.latency_sensitive, overlap) for tenant in tenants}
        _prepare(gpu, packages, overlaps, () if coloring is None else coloring.sets)
        swap = _swap(gpu, tenants, packages, swap_bytes, coloring, undo)
        colored = None
        if coloring is not None:
            colored = undo.enter_context(_colored(gpu, tenants, packages, coloring))
        for tenant in tenants:
            if progress is not None:
                progress(tenant.name)
            try:
                loaded.append(
                    _load(
                        gpu, tenant, packages[tenant.name], colored, swap.get(tenant.name), overlaps[tenant.name], undo
                    )
                )
            except OutOfMemoryError as error:
                loaded.append(LoadedTenant(tenant, None, error=str(error)))
            except GpuError as error:
                if error.usable == "nothing":
                    raise
                loaded.append(LoadedTenant(tenant, None, error=str(error)))
        if all(entry.model is None for entry in loaded):
            raise OutOfMemoryError(f"No tenant could be loaded. {loaded[0].error}", tenant=loaded[0].tenant.name)
        return Roster(gpu, loaded, undo.pop_all())


Found = tuple[ModelPackage, Path | None]


def _find(gpu: Gpu, tenant: Tenant, cache: Path | None) -> Found:
    if is_synthetic(tenant.model):
        return synthetic_package(tenant.model, gpu.info), None
    return find_package(tenant.model, tenant.batch, gpu.info, cache)


def overlap_of(gpu: Gpu, latency_sensitive: bool, objective: Objective | None = Objective.ALONE) -> Tuned | None:
    """How launches of a tenant's model overlap on `gpu`; None for not at all."""
    if objective is None or not latency_sensitive or gpu.info.compute_capability < DEPENDENT_LAUNCHES:
        return None
    return Tuned(objective)


def _prepare(
    gpu: Gpu, packages: Mapping[str, Found], overlaps: Mapping[str, Tuned | None], colored: Collection[str]
) -> None:
    """Make plain code that overlaps for all tenants at once. That of colored memory waits for the shape of its memory."""
    wanted: dict[Tuned, list[tuple[ModelPackage, Path]]] = {}
    for name, (package, directory) in packages.items():
        overlap = overlaps[name]
        if overlap is not None and directory is not None and name not in colored and not gpu.info.simulated:
            wanted.setdefault(overlap, []).append((package, directory))
    for overlap, found in wanted.items():
        prepare_overlapped(found, overlap)


def _colored(gpu: Gpu, tenants: Sequence[Tenant], packages: Mapping[str, Found], coloring: Coloring) -> ColoredTenants:
    """Memory for the tenants that `coloring` names; those whose limit is too low are left out here."""
    limits = {t.name: t.memory_limit_mb << 20 for t in tenants if t.memory_limit_mb is not None}
    demands = []
    for name, colors in coloring.sets.items():
        needed = needed_bytes(packages[name][0])
        if needed <= limits.get(name, needed):
            demands.append(Demand(name, tuple(colors), needed))
    return ColoredTenants(gpu, coloring, demands, limits)


def _swap(
    gpu: Gpu,
    tenants: Sequence[Tenant],
    packages: Mapping[str, Found],
    swap_bytes: int | None,
    coloring: Coloring | None,
    undo: ExitStack,
) -> dict[str, int]:
    """Device addresses for the weights of those that keep them on the host, in memory that is allocated here."""
    hosted = [tenant for tenant in tenants if tenant.hosted]
    space = SwapSpace(gpu, swap_bytes or 0, setting="swap_mb")
    addresses = {}
    for tenant in hosted:
        if is_synthetic(tenant.model):
            raise MisuseError(f"Tenant {tenant.name!r}: a synthetic model has no weights to keep on the host.")
        if coloring is not None and tenant.name in coloring.sets:
            raise UnsupportedError(
                f"Tenant {tenant.name!r} keeps its weights on the host, which colored memory can't do."
            )
        addresses[tenant.name] = space.take(weight_bytes(packages[tenant.name][0]), tenant.name, undo)
    return addresses


def _load(
    gpu: Gpu,
    tenant: Tenant,
    found: Found,
    colored: ColoredTenants | None,
    swap_at: int | None,
    overlap: Tuned | None,
    undo: ExitStack,
) -> LoadedTenant:
    _check_limit(tenant, found[0])
    memory = None
    if colored is not None:
        if error := colored.errors.get(tenant.name):
            raise error
        memory = colored.memories.get(tenant.name)
    with ExitStack() as own:
        weights = None if swap_at is None else _host_weights(gpu, tenant, found, swap_at, own)
        model = _bind(gpu, tenant, found, memory, swap_at, overlap)
        own.callback(model.close)
        depth = LS_DEPTH if tenant.latency_sensitive else BE_DEPTH
        inputs = host_buffers(gpu, tenant.name, model.input_bytes, depth, own)
        outputs = host_buffers(gpu, tenant.name, model.output_bytes, depth, own)
        for buffer in inputs:
            _fill_inputs(model.package, buffer)
        undo.enter_context(own.pop_all())
    colors = () if memory is None else memory.colors
    return LoadedTenant(tenant, model, inputs, outputs, depth, colors=colors, weights=weights)


def _host_weights(gpu: Gpu, tenant: Tenant, found: Found, address: int, own: ExitStack) -> HostWeights:
    package, directory = found
    image = load_image(package, directory, gpu, tenant=tenant.name)
    own.callback(image.free)
    return host_weights(package, image, address)


def _bind(
    gpu: Gpu, tenant: Tenant, found: Found, memory: TenantMemory | None, weights_at: int | None, overlap: Tuned | None
) -> BoundModel:
    package, directory = found
    if is_synthetic(tenant.model):
        return bind_synthetic(tenant.model, gpu, tenant=tenant.name, memory=memory)
    if memory is None:
        return bind(package, directory, gpu, tenant=tenant.name, weights_at=weights_at, overlap=overlap)
    # LS models are not preempted, so that their kernels need not be of one form.
    return bind_colored(package, directory, gpu, memory, mixed=tenant.latency_sensitive, overlap=overlap)


def _check_limit(tenant: Tenant, package: ModelPackage) -> None:
    if tenant.memory_limit_mb is None:
        return
    limit = tenant.memory_limit_mb << 20
    needed = needed_bytes(package) - (weight_bytes(package) if tenant.hosted else 0)
    if needed > limit:
        raise OutOfMemoryError(
            f"Tenant {tenant.name!r} needs {needed >> 20} MiB of GPU memory for {tenant.model!r} and its limit is "
            f"{tenant.memory_limit_mb} MiB.",
            requested=needed,
            available=limit,
            tenant=tenant.name,
        )


def host_buffers(gpu: Gpu, tenant: str, nbytes: int, count: int, undo: ExitStack) -> tuple[HostBuffer, ...]:
    """`count` buffers of pinned memory with anything in them, until `undo`; none for 0 bytes. OutOfMemoryError."""
    buffers = []
    for _ in range(count if nbytes else 0):
        buffer = gpu.allocate_host(nbytes, tenant=tenant)
        undo.callback(buffer.free)
        buffers.append(buffer)
    return tuple(buffers)


def _fill_inputs(package: ModelPackage, buffer: HostBuffer) -> None:
    """Plausible contents: small noise where the inputs are floating point, zeros (a valid index) where they are not."""
    view = buffer.array
    view[:] = 0
    if package.inputs and all(spec.dtype in ("float16", "torch.float16") for spec in package.inputs):
        values = np.random.default_rng(0).standard_normal(view.nbytes // 2, dtype=np.float32).astype(np.float16)
        view[: values.nbytes] = values.view(np.uint8)
