"""Who shares the GPU: a tenant's class, model, requests, objective and limits. Pure data, validated when it is made."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from missile.workloads.arrivals import Arrivals, ClosedLoop, effective

__all__ = ["Tenant", "TenantClass", "TenantName"]

TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]


class TenantClass(StrEnum):
    """LS: has deadlines to meet. BE: takes what is left."""

    LS = "LS"
    BE = "BE"


class Tenant(BaseModel):
    """One model with its requests.

    model: one of the twelve, a synthetic one ("synthetic-copy"), or a package directory. batch: None means the model's
    usual one. An LS tenant's objective is `slo_ms`, or `slo_factor` times its own solo p99; a BE tenant has none.
    weight: its share among tenants of its class. copy_weight: its share of the link to the host among all tenants, where
    copies are scheduled; None: `weight`, or what the planner finds. memory_limit_mb: most device memory it may hold (MiB).
    residency: where its weights are while it does nothing: "host" has them copied in when a request needs them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    name: TenantName
    tenant_class: TenantClass = Field(alias="class")
    model: str = Field(min_length=1)
    batch: int | None = Field(None, ge=1, le=4096)
    arrivals: Arrivals
    slo_ms: float | None = Field(None, gt=0)
    slo_factor: float | None = Field(None, ge=1)
    weight: float = Field(1.0, gt=0, le=1000)
    copy_weight: float | None = Field(None, gt=0, le=1e6)
    memory_limit_mb: int | None = Field(None, ge=1)
    residency: Literal["device", "host"] = "device"

    @property
    def latency_sensitive(self) -> bool:
        return self.tenant_class is TenantClass.LS

    @property
    def hosted(self) -> bool:
        """Whether its weights wait on the host."""
        return self.residency == "host"

    @property
    def closed_loop(self) -> ClosedLoop | None:
        """Its closed loop, or None when its arrivals don't depend on its completions."""
        spec = effective(self.arrivals)
        return spec if isinstance(spec, ClosedLoop) else None

    @model_validator(mode="after")
    def _one_objective(self) -> Tenant:
        given = [name for name in ("slo_ms", "slo_factor") if getattr(self, name) is not None]
        if self.latency_sensitive and len(given) > 1:
            raise ValueError("slo_ms and slo_factor: give one of them")
        if not self.latency_sensitive and given:
            raise ValueError(f"a BE tenant has no objective, so no {given[0]}")
        return self
