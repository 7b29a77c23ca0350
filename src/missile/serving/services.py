"""What the server can tell and do, as plain data: both protocols answer from here."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from missile import __version__
from missile.serving.access import Access, Principal
from missile.serving.config import ServerConfig
from missile.serving.gateway import Gateway
from missile.serving.measures import Totals
from missile.serving.refusal import Reason, Refusal
from missile.serving.regions import Regions
from missile.serving.registry import Registry
from missile.serving.supervisor import Supervisor
from missile.serving.tenant import Deployment, State, Tenant
from missile.serving.tensors import DATATYPES, TensorSignature

__all__ = ["EXTENSIONS", "Services"]

EXTENSIONS = [
    "binary_tensor_data",
    "model_configuration",
    "statistics",
    "parameters",
    "schedule_policy(priority,timeout)",
]


def _duration(totals: Totals) -> dict[str, int]:
    return {"count": totals.count, "ns": totals.ns}


@dataclass(slots=True)
class Services:
    """What one server consists of, and its answers that are the same over REST and gRPC. `reload` reads the config again."""

    config: ServerConfig
    access: Access
    registry: Registry
    gateway: Gateway
    regions: Regions
    supervisor: Supervisor
    reload: Callable[[], Awaitable[dict[str, list[str]]]]
    started_at: float
    draining: bool = False

    @property
    def ready(self) -> bool:
        return not self.draining and self.registry.ready

    def model_ready(self, name: str, version: str) -> bool:
        return self.registry.find(name, version).state is State.READY

    def granted(self, deployment: Deployment) -> dict[str, Any]:
        """What the engine last said of a deployment (`TenantFacts`); until then, what its load told."""
        return {"memory_bytes": deployment.memory_bytes, **self.supervisor.tenant_facts.get(deployment.slot, {})}

    def check_open(self) -> None:
        """NOT_READY while the server drains."""
        if self.draining:
            raise Refusal(Reason.NOT_READY, "The server is stopping.")

    def server_metadata(self) -> dict[str, Any]:
        extensions = list(EXTENSIONS)
        if self.regions.enabled:
            extensions.append("system_shared_memory")
        extensions.append("model_repository" if self.config.repository_control else "model_repository(index)")
        return {"name": "missile", "version": __version__, "extensions": extensions}

    def model_metadata(self, name: str, version: str) -> dict[str, Any]:
        tenant = self.registry.find(name, version)
        signature = tenant.ready().signature
        axis = [-1] if signature.max_batch else []

        def described(tensors: tuple[TensorSignature, ...]) -> list[dict[str, Any]]:
            return [{"name": t.name, "datatype": t.datatype, "shape": [*axis, *t.shape]} for t in tensors]

        return {
            "name": name,
            "versions": [tenant.config.version],
            "platform": "missile_cpu" if self.supervisor.facts.get("device") == "cpu" else "missile_gpu",
            "inputs": described(signature.inputs),
            "outputs": described(signature.outputs),
        }

    def model_config(self, name: str, version: str) -> dict[str, Any]:
        """In the form of the model configuration extension; what is Missile's own is among its `parameters`."""
        tenant = self.registry.find(name, version)
        config = tenant.config
        signature = tenant.ready().signature

        def described(tensors: tuple[TensorSignature, ...]) -> list[dict[str, Any]]:
            return [
                {"name": t.name, "data_type": "TYPE_" + DATATYPES[t.datatype].name, "dims": list(t.shape) or [1]}
                for t in tensors
            ]

        facts = self.supervisor.facts
        parameters = {
            "class": config.tenant_class,
            "isolation": str(facts.get("isolation", "")),
            "weight": f"{config.weight:g}",
        }
        if config.slo_ms is not None:
            parameters["slo_ms"] = f"{config.slo_ms:g}"
        result: dict[str, Any] = {
            "name": name,
            "platform": "missile",
            "backend": "missile",
            "version_policy": {"specific": {"versions": [int(config.version)]}},
            "max_batch_size": signature.max_batch,
            "input": described(signature.inputs),
            "output": described(signature.outputs),
            "instance_group": [
                {"name": name, "count": 1, "kind": "KIND_CPU" if facts.get("device") == "cpu" else "KIND_GPU"}
            ],
            "parameters": {key: {"string_value": value} for key, value in parameters.items()},
        }
        if config.batch.max > 1:
            result["dynamic_batching"] = {
                "preferred_batch_size": [config.batch.max],
                "max_queue_delay_microseconds": int(config.batch.delay_ms * 1000),
            }
        return result

    def statistics(self, principal: Principal, name: str = "", version: str = "") -> dict[str, Any]:
        """Of one model, or of all that `principal` may see."""
        if name:
            tenants = [self.registry.find(name, version)]
        else:
            tenants = [t for t in self.registry.tenants.values() if principal.sees(t.name)]
        return {"model_stats": [self._statistics(tenant) for tenant in tenants]}

    @staticmethod
    def _statistics(tenant: Tenant) -> dict[str, Any]:
        m = tenant.measures
        return {
            "name": tenant.name,
            "version": tenant.config.version,
            "last_inference": m.last_inference_ms,
            "inference_count": m.items,
            "execution_count": m.executions,
            "inference_stats": {
                "success": _duration(m.success),
                "fail": _duration(m.fail),
                "queue": _duration(m.queue_total),
                "compute_input": _duration(m.copy_in_total),
                "compute_infer": _duration(m.execute_total),
                "compute_output": _duration(m.copy_out_total),
                "cache_hit": _duration(Totals()),
                "cache_miss": _duration(Totals()),
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": _duration(copy_in),
                    "compute_infer": _duration(execute),
                    "compute_output": _duration(copy_out),
                }
                for size, (copy_in, execute, copy_out) in sorted(m.batches.items())
            ],
        }

    def repository_index(self, principal: Principal, *, only_ready: bool = False) -> list[dict[str, str]]:
        return [
            {"name": t.name, "version": t.config.version, "state": t.state.value, "reason": t.reason}
            for t in self.registry.tenants.values()
            if principal.sees(t.name) and (t.state is State.READY or not only_ready)
        ]

    async def repository_load(self, name: str, parameters: dict[str, Any]) -> None:
        """Load a configured model again. What a client sends never becomes a model: UNSUPPORTED with parameters."""
        self._check_repository()
        if parameters:
            raise Refusal(Reason.UNSUPPORTED, "Models and their settings come from the server's configuration only.")
        await self.registry.load(name)

    async def repository_unload(self, name: str) -> None:
        self._check_repository()
        await self.registry.unload(name)

    def _check_repository(self) -> None:
        if not self.config.repository_control:
            raise Refusal(
                Reason.FORBIDDEN, "Loading and unloading by clients is turned off (server.repository_control = false)."
            )

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.started_at
