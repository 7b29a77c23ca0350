"""A tenant's model brought onto the GPU: its package, its colors of memory, and whether its blocks leave on demand."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from missile.coloring.shape import Escape, Shape
from missile.coloring.shares import Demand
from missile.compiler.bind import BoundModel, bind
from missile.compiler.bind_colored import bind_colored
from missile.compiler.colored import colored_kernels, has_mixed, is_colored
from missile.compiler.library import find_package
from missile.compiler.overlap_table import Tuned
from missile.compiler.overlapped import prepare_overlapped
from missile.compiler.package import BufferKind, ModelPackage
from missile.compiler.planning import needed_bytes
from missile.compiler.preemptible import preempt_model
from missile.compiler.preemptible_code import PreemptibleKernels, is_preemptible, preemptible_kernels
from missile.errors import MissileError, MisuseError, OutOfMemoryError, UnsupportedError
from missile.gpu.interface import Gpu
from missile.probe import ChannelMap, map_for
from missile.runtime.coloring import ColoredTenants, Coloring
from missile.runtime.host_weights import HostWeights
from missile.runtime.hosted import host_weights, load_image, weight_bytes
from missile.runtime.loading import overlap_of
from missile.runtime.swap_space import SwapSpace
from missile.serving.config import TenantConfig
from missile.serving.engine.compiling import compiled_package

__all__ = ["Binder", "CodeMissing", "Found", "Placed"]

log = logging.getLogger("missile.engine")


@dataclass(frozen=True, slots=True)
class Found:
    """A tenant's package and where it lies (None: recorded). kernels: its code that can be preempted, None for none.

    shape: of the translation that there is code for, None for plain memory.
    """

    package: ModelPackage
    directory: Path | None
    kernels: PreemptibleKernels | None = None
    notes: tuple[str, ...] = ()
    shape: Shape | None = None


class CodeMissing(Exception):
    """A tenant's memory turned out to need a translation for which its package has no code: `Binder.find` makes it."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A model on the GPU; it and its memory belong to whoever gave the exit stack.

    escapes: device address of the count (8 bytes) of its accesses outside its colored memory; 0 where nobody counts.
    weights: where they wait on the host; None where they are on the device.
    """

    bound: BoundModel
    colors: tuple[int, ...] | None
    notes: tuple[str, ...]
    escapes: int = 0
    weights: HostWeights | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all of it is on the device, in memory without colors."""
        return self.colors is None and self.weights is None


class Binder:
    """preempt: make BE tenants' blocks leave on demand, where their code allows it. channel_map: a file of this GPU, or of
    its kind; None takes the cache's. It is tested on the GPU when the first tenant with colors comes, and measured anew
    where it does not hold. swap_bytes: device memory for weights that wait on the host, all together."""

    def __init__(self, gpu: Gpu, *, preempt: bool, channel_map: Path | None = None, swap_bytes: int = 0) -> None:
        self._gpu = gpu
        self._preempt = preempt
        self._path = channel_map
        self._map: ChannelMap | None = None
        self._swap = SwapSpace(gpu, swap_bytes, setting="server.swap_mib")
        self._shapes: dict[
            tuple[str, tuple[int, ...]], Shape
        ] = {}  # that tenants' memory asked for, by name and colors

    def find(self, tenant: TenantConfig, folder: Path) -> Found:
        """The tenant's package, compiled now when there is none yet (minutes). Doesn't touch the GPU otherwise."""
        if tenant.residency == "host" and tenant.colors is not None:
            raise UnsupportedError(
                f"Tenant {tenant.name!r}: weights on the host and colored memory can't be had in one."
            )
        package, directory = self._package(tenant, folder)
        if package.batch < tenant.batch.max:
            raise MisuseError(
                f"Tenant {tenant.name!r}: batch.max = {tenant.batch.max}, but its package is for batches of {package.batch}."
            )
        if any(buffer.kind is BufferKind.STATE for buffer in package.buffers):
            raise UnsupportedError(f"Tenant {tenant.name!r}: its model keeps state from request to request.")
        notes = (f"compiled for a batch of {package.batch}; smaller ones run padded",) if package.batch > 1 else ()
        shape = self._shapes.get((tenant.name, _colors(tenant)))
        found = Found(package, directory, notes=notes, shape=shape)
        if directory is None or (tenant.colors is not None and shape is None):
            return found
        if shape is None and not self._gpu.info.simulated and (overlap := self._overlap(tenant)) is not None:
            prepare_overlapped([(package, directory)], overlap)  # here, where it keeps nobody waiting
        if shape is not None:
            log.info("tenant %s: its kernels get the translation of its memory", tenant.name)
            colored_kernels(package, directory, shape, mixed=_mixed(tenant), overlap=self._overlap(tenant))
        return self._with_code(found) if self._wants_preemption(tenant) else found

    def _package(self, tenant: TenantConfig, folder: Path) -> tuple[ModelPackage, Path | None]:
        local = folder / tenant.model
        own = tenant.weights or tenant.options or tenant.inputs
        if (local / "package.json").is_file():
            if own:
                raise MisuseError(
                    f"Tenant {tenant.name!r}: a package is taken as it is, without weights, options or inputs."
                )
            return find_package(str(local), tenant.batch.max, self._gpu.info)
        if not self._gpu.info.simulated:
            return compiled_package(tenant, folder, self._gpu.info)
        if own or ":" in tenant.model or tenant.model.endswith(".pt2"):
            raise UnsupportedError(f"Tenant {tenant.name!r}: a simulated GPU has recorded packages of the zoo only.")
        return find_package(tenant.model, tenant.batch.max, self._gpu.info)

    def _wants_preemption(self, tenant: TenantConfig) -> bool:
        return self._preempt and tenant.tenant_class == "BE"

    def _overlap(self, tenant: TenantConfig) -> Tuned | None:
        """Launches of LS models overlap: those are not preempted."""
        return overlap_of(self._gpu, tenant.tenant_class == "LS")

    def _with_code(self, found: Found) -> Found:
        """`found` with code that can be preempted, or a note why there is none."""
        assert found.directory is not None
        try:
            return replace(found, kernels=preemptible_kernels(found.package, found.directory, found.shape))
        except UnsupportedError as error:
            return replace(found, notes=(*found.notes, f"can't be preempted: {error}"))

    def place(
        self, tenant: TenantConfig, found: Found, others: Mapping[str, tuple[int, ...]], undo: ExitStack
    ) -> Placed:
        """Load a model; `undo` gives it back. others: the colors of the tenants that are there, by name.

        MisuseError for colors that overlap theirs, OutOfMemoryError naming the tenant. CodeMissing: to be found again, which
        takes up to a minute, and placed then. Nothing may run on the GPU when the
        first tenant with colors comes, since its map is tested then.
        """
        if tenant.colors is not None:
            return self._place_colored(tenant, found, others, undo)
        if tenant.residency == "host":
            return self._place_hosted(tenant, found, undo)
        bound = bind(found.package, found.directory, self._gpu, tenant=tenant.name, overlap=self._overlap(tenant))
        return self._preemptible(tenant, found, Placed(bound, None, found.notes), undo)

    def _place_hosted(self, tenant: TenantConfig, found: Found, undo: ExitStack) -> Placed:
        """Read the weights into pinned memory, and bind the model to their place in the budget."""
        package, directory, gpu = found.package, found.directory, self._gpu
        image = load_image(package, directory, gpu, tenant=tenant.name)
        undo.callback(image.free)
        address = self._swap.take(weight_bytes(package), tenant.name, undo)
        bound = bind(package, directory, gpu, tenant=tenant.name, weights_at=address, overlap=self._overlap(tenant))
        notes = (*found.notes, "weights on the host: brought in when a request comes and they are not there")
        placed = Placed(bound, None, notes, weights=host_weights(package, image, address))
        return self._preemptible(tenant, found, placed, undo)

    def _preemptible(self, tenant: TenantConfig, found: Found, placed: Placed, undo: ExitStack) -> Placed:
        """`placed` with a model that can be preempted, where it should and can be; it is given to `undo`."""
        bound, notes = placed.bound, placed.notes
        if self._wants_preemption(tenant) and (found.kernels is not None or self._gpu.info.simulated):
            try:
                bound = preempt_model(bound, self._gpu, found.kernels)
            except UnsupportedError as error:
                notes = (*notes, f"can't be preempted: {error}")
            except BaseException:
                bound.close()
                raise
        undo.callback(bound.close)
        return replace(placed, bound=bound, notes=notes)

    def _place_colored(
        self, tenant: TenantConfig, found: Found, others: Mapping[str, tuple[int, ...]], undo: ExitStack
    ) -> Placed:
        colors = _colors(tenant)
        for name, theirs in others.items():
            if set(theirs) & set(colors) and set(theirs) != set(colors):
                raise MisuseError(
                    f"Tenants {name!r} and {tenant.name!r} share some of their colors but not all; color sets are the same "
                    "or have nothing in common."
                )
        escape = Escape.COUNT if tenant.count_escapes else Escape.GUARD
        coloring = Coloring(self._channel_map(), {tenant.name: colors}, escape=escape)
        coloring.check([tenant.name], self._gpu)
        # Pages of its own: tenants come and go, and what of a page is in other colors stays unused.
        demand = Demand(tenant.name, colors, needed_bytes(found.package))
        held = undo.enter_context(ColoredTenants(self._gpu, coloring, [demand]))
        memory = held.memories.get(tenant.name)
        if memory is None:
            raise held.errors.get(tenant.name) or OutOfMemoryError(
                f"Tenant {tenant.name!r}: there is no memory in its colors.", tenant=tenant.name
            )
        shape = memory.translation.shape
        if found.directory is not None and found.shape != shape:
            found = replace(found, shape=shape)
            if not self._is_kept(tenant, found):
                self._shapes[tenant.name, colors] = shape
                raise CodeMissing
            found = self._with_code(found) if self._wants_preemption(tenant) else found
        bound = bind_colored(
            found.package, found.directory, self._gpu, memory, mixed=_mixed(tenant), overlap=self._overlap(tenant)
        )
        notes = (*found.notes, f"memory in colors {', '.join(map(str, colors))}")
        return self._preemptible(tenant, found, Placed(bound, colors, notes, memory.escapes), undo)

    def _is_kept(self, tenant: TenantConfig, found: Found) -> bool:
        """Whether the package has the code that the tenant needs for `found.shape`."""
        package, directory, shape = found.package, found.directory, found.shape
        assert directory is not None
        assert shape is not None
        mixed = _mixed(tenant) and has_mixed(package, shape)
        if not is_colored(directory, shape, mixed=mixed, overlap=self._overlap(tenant)):
            return False
        return not self._wants_preemption(tenant) or is_preemptible(directory, shape)

    def _channel_map(self) -> ChannelMap:
        if self._map is None:
            try:
                self._map = map_for(
                    self._gpu, known=self._path, progress=lambda text: log.info("channel map: %s", text)
                )
            except MissileError as error:
                raise UnsupportedError(f"Colors need a channel map of this GPU: {error}") from error
        return self._map


def _colors(tenant: TenantConfig) -> tuple[int, ...]:
    return tuple(sorted(set(tenant.colors or ())))


def _mixed(tenant: TenantConfig) -> bool:
    """Whether its kernels may be of different forms: LS models are not preempted, so that they need not be of one."""
    return tenant.tenant_class == "LS"
