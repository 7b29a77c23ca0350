"""The tenants and their life: loaded, tuned, replaced, removed, and loaded again after the engine was lost.

Changes run one at a time; serving goes on while they do.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping

from missile.errors import MissileError
from missile.serving.config import TenantConfig
from missile.serving.refusal import Reason, Refusal
from missile.serving.supervisor import EngineLost, Supervisor
from missile.serving.tenant import Deployment, State, Tenant

__all__ = ["Registry"]

log = logging.getLogger("missile.registry")

# What can change while a model stays loaded.
_TUNABLE = {"tenant_class", "slo_ms", "objective", "weight", "quota", "timeout_ms", "finite_inputs"}
_MAX_CRASHES = 2


def _same_model(one: TenantConfig, other: TenantConfig) -> bool:
    return one.model_dump(exclude=_TUNABLE) == other.model_dump(exclude=_TUNABLE) and one.batch.max == other.batch.max


class Registry:
    """All tenants by name. `version` of a tenant is fixed by its configuration."""

    def __init__(self, supervisor: Supervisor, *, drain_s: float) -> None:
        self._supervisor = supervisor
        self._drain_s = drain_s
        self._tenants: dict[str, Tenant] = {}
        self._changing = asyncio.Lock()
        self._retired: set[asyncio.Task[None]] = set()
        self._loading: Tenant | None = None

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        return self._tenants

    def find(self, name: str, version: str = "") -> Tenant:
        """NOT_FOUND for an unknown name or version. It does not list the others: a token may not see them."""
        tenant = self._tenants.get(name)
        if tenant is None:
            raise Refusal(Reason.NOT_FOUND, f"There is no model {name!r:.80}.")
        if version and version != tenant.config.version:
            raise Refusal(
                Reason.NOT_FOUND, f"Model {name!r} has no version {version!r:.40}; it has {tenant.config.version!r}."
            )
        return tenant

    @property
    def ready(self) -> bool:
        return self._supervisor.running and all(t.state is State.READY for t in self._tenants.values())

    async def apply(self, wanted: Iterable[TenantConfig]) -> dict[str, list[str]]:
        """Make the tenants those of a configuration. What stays serves on; what changed is swapped when it is loaded.

        Returns names by what happened to them: added, removed, tuned, replaced, failed. A failed replacement leaves
        the old model serving.
        """
        async with self._changing:
            done: dict[str, list[str]] = {k: [] for k in ("added", "removed", "tuned", "replaced", "failed")}
            by_name = {config.name: config for config in wanted}
            for name in [n for n in self._tenants if n not in by_name]:
                self._remove(self._tenants.pop(name))
                done["removed"].append(name)
            for name, config in by_name.items():
                tenant = self._tenants.get(name)
                if tenant is None:
                    tenant = self._tenants[name] = Tenant(config)
                    done["added" if await self._load(tenant) else "failed"].append(name)
                elif config == tenant.config and tenant.state is State.READY:
                    continue
                elif _same_model(config, tenant.config) and tenant.deployment is not None:
                    tenant.tune(config)
                    self._supervisor.tune(tenant.deployment.slot, config)
                    done["tuned"].append(name)
                else:
                    done["replaced" if await self._load(tenant, config) else "failed"].append(name)
            return done

    async def load(self, name: str) -> None:
        """Load a configured tenant (again). Refusal when it can't be."""
        async with self._changing:
            tenant = self.find(name)
            tenant.load_crashes = 0
            if not await self._load(tenant):
                raise Refusal(Reason.INVALID, f"Model {name!r} {tenant.reason}.")

    async def unload(self, name: str) -> None:
        """Stop serving a tenant and give back what its model holds; it stays configured."""
        async with self._changing:
            tenant = self.find(name)
            tenant.state, tenant.reason = State.UNLOADING, "is being unloaded"
            if tenant.deployment is not None:
                await self._retire(tenant.deployment)
            tenant.deployment = None
            tenant.state, tenant.reason = State.UNAVAILABLE, "was unloaded"

    async def reload_all(self) -> None:
        """After the engine was started anew: load everybody who was not unloaded on purpose."""
        async with self._changing:
            for tenant in sorted(self._tenants.values(), key=lambda t: t.config.tenant_class, reverse=True):
                if tenant.state is State.LOADING:
                    await self._load(tenant)

    def lose(self) -> None:
        """The engine is gone and every deployment with it."""
        if self._loading is not None:
            self._loading.load_crashes += 1
        for tenant in self._tenants.values():
            tenant.deployment = None
            if tenant.load_crashes >= _MAX_CRASHES:
                tenant.state = State.UNAVAILABLE
                tenant.reason = "ended the engine each time it was loaded"
            elif tenant.state in (State.READY, State.LOADING):
                tenant.state, tenant.reason = State.LOADING, "is being loaded again, after the engine stopped"

    async def _load(self, tenant: Tenant, config: TenantConfig | None = None) -> bool:
        """Load `config` (or the tenant's own) beside what serves, and swap. False when it can't be; the reason is kept."""
        config = config or tenant.config
        started = time.monotonic()
        if tenant.deployment is None:
            tenant.state, tenant.reason = State.LOADING, "is being loaded"
        self._loading = tenant
        try:
            reply = await self._supervisor.load(config)
        except EngineLost:
            if tenant.state is State.UNAVAILABLE:
                log.error("tenant %s %s", tenant.name, tenant.reason)
            return False
        except MissileError as error:
            log.error("tenant %s can't be loaded: %s", tenant.name, error)
            if tenant.deployment is None:
                tenant.state, tenant.reason = State.UNAVAILABLE, f"could not be loaded: {str(error).rstrip('.')}"
            return False
        finally:
            self._loading = None
        old = tenant.deployment
        tenant.tune(config)
        tenant.deployment = Deployment(reply.slot, reply.signature, reply.memory_bytes, reply.notes)
        tenant.state, tenant.reason, tenant.load_crashes = State.READY, "", 0
        log.info("tenant %s is ready after %.1f s (%s)", tenant.name, time.monotonic() - started, config.model)
        for note in reply.notes:
            log.info("tenant %s: %s", tenant.name, note)
        if old is not None:
            self._retire_soon(old)
        return True

    def _remove(self, tenant: Tenant) -> None:
        tenant.state, tenant.reason = State.UNLOADING, "is being removed"
        if tenant.deployment is not None:
            self._retire_soon(tenant.deployment)

    def _retire_soon(self, deployment: Deployment) -> None:
        task = asyncio.create_task(self._retire(deployment))
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)

    async def _retire(self, deployment: Deployment) -> None:
        """Let what is in flight end, then unload."""
        give_up = time.monotonic() + self._drain_s
        while deployment.outstanding and time.monotonic() < give_up:
            await asyncio.sleep(0.01)
        await self._supervisor.unload(deployment.slot)
