"""The serving configuration: a TOML file that a person writes, checked field by field before anything starts."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from missile.errors import MissileError, MisuseError
from missile.runtime.policies import create_policy
from missile.serving.tensors import DATATYPES

__all__ = [
    "BatchRule",
    "Limits",
    "Quota",
    "ServerConfig",
    "ServingConfig",
    "TenantConfig",
    "TensorConfig",
    "Token",
    "parse_config",
    "read_config",
]

POLICIES_SERVED = ("streams", "priority", "partition", "missile")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Port = Annotated[int, Field(ge=0, le=65535)]
Milliseconds = Annotated[float, Field(gt=0, le=3_600_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class Token(_Strict):
    """Who may do what. Exactly one source: `sha256` (hex digest of the token), `env` (a variable's name) or `file`.

    role: each includes those before it: read (health, metadata, metrics, view), infer, admin (reload, load, unload).
    tenants: the tenants it is good for; empty means all.
    """

    role: Literal["read", "infer", "admin"]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    env: str | None = None
    file: str | None = None
    tenants: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.sha256, self.env, self.file)) != 1:
            raise ValueError("give exactly one of sha256, env and file")
        return self


class Limits(_Strict):
    """What one request or one client may take. Times in seconds, sizes in MiB."""

    body_mib: int = Field(default=64, ge=1, le=4096)
    bodies_mib: int = Field(default=1024, ge=1)  # bodies being received, all connections together
    tensors: int = Field(default=64, ge=1, le=4096)
    connections: int = Field(default=1024, ge=1)
    header_seconds: float = Field(default=10.0, gt=0)  # to send the request's head
    body_seconds: float = Field(default=30.0, gt=0)  # to send the body
    write_seconds: float = Field(default=30.0, gt=0)  # to take the answer
    idle_seconds: float = Field(default=300.0, gt=0)  # between two requests of a connection
    arena_mib: int = Field(default=512, ge=16, le=65536)  # memory between front end and engine


class ServerConfig(_Strict):
    """Where to listen, on what device, and who may come in. `grpc_port = -1` turns gRPC off; port 0 takes a free one."""

    host: str = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Annotated[int, Field(ge=-1, le=65535)] = 8001
    device: str = "auto"
    policy: str = "priority"  # how a GPU is shared, as `missile bench` names it; the CPU device has none
    ls_share: float | None = Field(default=None, gt=0, lt=1)  # of the SMs, for all LS tenants: an option of the policy
    channel_map: str | None = None  # a file of `missile probe`, for tenants with colors; else the cache's, or measured
    tls_certificate: str | None = None
    tls_key: str | None = None
    tokens: list[Token] = Field(default_factory=list)
    repository_control: bool = False  # load and unload by clients
    shared_memory: Literal["auto", "on", "off"] = "auto"  # auto: only on a loopback address
    swap_mib: int = Field(default=0, ge=0)  # device memory for the weights of tenants with residency = "host"
    spin_us: int = Field(default=4000, ge=0, le=1_000_000)  # mean gap between calls up to which the engine stays awake
    cpu_threads: int = Field(default=0, ge=0)  # 0: what PyTorch chooses
    drain_seconds: float = Field(default=30.0, ge=0)
    watchdog_seconds: float = Field(default=60.0, gt=0)  # an engine silent for this long is started anew
    limits: Limits = Field(default_factory=Limits)

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def shared_memory_on(self) -> bool:
        return self.shared_memory == "on" or (self.shared_memory == "auto" and self.loopback)

    @property
    def policy_text(self) -> str:
        """`policy` with `ls_share` among its options."""
        if self.ls_share is None:
            return self.policy
        return f"{self.policy}{',' if ':' in self.policy else ':'}ls_share={self.ls_share!r}"

    @model_validator(mode="after")
    def _policy_serves(self) -> Self:
        name = self.policy.partition(":")[0]
        if name not in POLICIES_SERVED:
            raise ValueError(f"policy {name!r} can't serve; those that can are {', '.join(POLICIES_SERVED)}")
        try:
            create_policy(self.policy_text)
        except MissileError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _open_only_with_tokens(self) -> Self:
        if not self.loopback and not self.tokens:
            raise ValueError(f"host {self.host!r} is not a loopback address, so tokens are required")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key come together")
        return self


class BatchRule(_Strict):
    """How requests are merged: up to `max` items; the first waits at most `delay_ms` for others."""

    max: int = Field(default=1, ge=1, le=4096)
    delay_ms: float = Field(default=0.0, ge=0, le=10_000)


class Quota(_Strict):
    """What a tenant may hold at once. What goes beyond is refused at once, so that overload never piles up.

    queue: requests waiting or running. wait_ms: a request that would have to wait longer than this, by the service
    times seen so far, is shed. memory_mib: request and answer tensors held between front end and engine.
    """

    queue: int = Field(default=256, ge=1, le=2048)
    wait_ms: Milliseconds | None = None
    requests_per_s: Annotated[float, Field(gt=0)] | None = None
    burst: int = Field(default=32, ge=1)
    memory_mib: int = Field(default=128, ge=1)


class TensorConfig(_Strict):
    """One input as the model takes it. shape without the batch axis where the model has one (`batched`)."""

    name: str
    datatype: str
    shape: list[Annotated[int, Field(ge=0)]]

    @field_validator("datatype")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DATATYPES:
            raise ValueError(f"unknown datatype {value!r}; known: {', '.join(DATATYPES)}")
        return value


class TenantConfig(_Strict):
    """One tenant: a model, what it is promised and what it may use.

    model: a zoo name, a `.pt2` file from torch.export (relative to the config's folder), or `module:factory`.
    weights: a .safetensors file loaded into the module, by parameter name.
    weight: its share among tenants of its class, of time and of the link.
    colors: those of the channel map that its memory on the GPU is in; two tenants have the same or none in common.
    count_escapes: count accesses of its kernels outside its colored memory, which the translation's guard catches in any
    case; its code is slower for it.
    objective: share of LS requests that should meet the SLO (for the burn rate).
    finite_inputs: refuse inputs that hold NaN or infinity.
    """

    name: str
    model: str
    tenant_class: Literal["LS", "BE"] = Field(alias="class")
    slo_ms: Milliseconds | None = None
    objective: float = Field(default=0.99, gt=0, lt=1)
    version: str = "1"
    weights: str | None = None
    weight: float = Field(default=1.0, gt=0, le=1000)
    residency: Literal["device", "host"] = "device"
    colors: list[Annotated[int, Field(ge=0, le=255)]] | None = Field(default=None, min_length=1)
    count_escapes: bool = False
    batch: BatchRule = Field(default_factory=BatchRule)
    batched: bool = True
    quota: Quota = Field(default_factory=Quota)
    timeout_ms: Milliseconds | None = None
    finite_inputs: bool = False
    inputs: list[TensorConfig] = Field(default_factory=list, alias="input")
    outputs: list[str] = Field(default_factory=list)  # names, in the model's order; else output0, output1, ...
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)  # keyword arguments of the factory

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(f"{value!r} is not a name: letters, digits, '.', '_' and '-', at most 64, no '.' first")
        return value

    @field_validator("version")
    @classmethod
    def _version(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9]{1,9}", value):
            raise ValueError("a version is a number, written as a string")
        return value

    @model_validator(mode="after")
    def _class_rules(self) -> Self:
        if self.tenant_class == "LS":
            if self.slo_ms is None:
                raise ValueError("an LS tenant needs slo_ms")
            if self.batch.delay_ms > 0.1 * self.slo_ms:
                raise ValueError(
                    f"batch.delay_ms = {self.batch.delay_ms:g} is more than a tenth of slo_ms = {self.slo_ms:g}: "
                    "the SLO has no room for it"
                )
        if self.batch.delay_ms > 0 and self.batch.max == 1:
            raise ValueError("batch.delay_ms makes no sense with batch.max = 1")
        if self.count_escapes and self.colors is None:
            raise ValueError("count_escapes needs colors: only colored memory is guarded")
        if self.batch.max > 1 and not self.batched:
            raise ValueError("batch.max > 1 needs a model with a batch axis (batched = true)")
        return self

    @property
    def wait_ms(self) -> float:
        """The longest predicted wait that is still accepted, ms: ten SLOs for LS and a second for BE unless said."""
        if self.quota.wait_ms is not None:
            return self.quota.wait_ms
        return min(10.0 * self.slo_ms, 1000.0) if self.slo_ms is not None else 1000.0


class ServingConfig(_Strict):
    server: ServerConfig = Field(default_factory=ServerConfig)
    tenants: list[TenantConfig] = Field(default_factory=list, alias="tenant")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        seen: set[str] = set()
        for tenant in self.tenants:
            if tenant.name in seen:
                raise ValueError(f"two tenants are named {tenant.name!r}")
            seen.add(tenant.name)
        for token in self.server.tokens:
            if unknown := sorted(set(token.tenants) - seen):
                raise ValueError(f"a token names the unknown tenant {unknown[0]!r}; known: {', '.join(sorted(seen))}")
        return self


def _where(location: tuple[int | str, ...], raw: Any) -> str:
    """`tenant "detector": slo_ms` reads better than `tenant.0.slo_ms`."""
    if len(location) >= 2 and location[0] == "tenant" and isinstance(location[1], int):
        entry = raw["tenant"][location[1]] if isinstance(raw, dict) else {}
        name = (
            entry.get("name", f"number {location[1] + 1}") if isinstance(entry, dict) else f"number {location[1] + 1}"
        )
        rest = ".".join(str(part) for part in location[2:])
        return f"tenant {name!r}{f': {rest}' if rest else ''}"
    return ".".join(str(part) for part in location)


def parse_config(text: str, name: str = "the configuration") -> ServingConfig:
    """Check TOML text. MisuseError names the field, says what is wrong with it and, for an unknown field, that it is."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MisuseError(f"{name} is not valid TOML: {error}.") from error
    try:
        return ServingConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        if first["type"] == "extra_forbidden":
            message = "there is no such field"
        elif first["type"] not in ("missing", "value_error"):
            message = f"{message}, not {first['input']!r:.80}"
        where = _where(first["loc"], raw)
        raise MisuseError(f"{name}: {f'{where}: ' if where else ''}{message}.") from error


def read_config(path: Path) -> ServingConfig:
    """Read and check a file. MisuseError when it can't be read or isn't valid."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"{path} can't be read: {error}.") from error
    return parse_config(text, str(path))
