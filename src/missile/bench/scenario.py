"""A bench scenario: who shares the GPU, how their requests arrive, and which policies are compared. A TOML file.

Pure data: what a model, trace or policy name means is looked up when the scenario is run. docs/scenario.md describes
every field.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from missile.compiler.objective import Objective, OverlapChoice
from missile.errors import MisuseError
from missile.runtime.tenant import Tenant, TenantName
from missile.workloads.arrivals import (
    Arrivals,
    BurstArrivals,
    ClosedLoop,
    DisbArrivals,
    PeriodicArrivals,
    PoissonArrivals,
    TraceArrivals,
)

__all__ = [
    "Scenario",
    "default_scenario",
    "describe_arrivals",
    "format_scenario",
    "parse_scenario",
    "read_scenario",
]

_ARRIVAL_KINDS = {"poisson", "periodic", "closed", "bursts", "trace", "disb"}


class Scenario(BaseModel):
    """What `missile bench` runs. Times in seconds.

    swap_mb: device memory for the weights of all tenants with residency "host" together, MiB. overlap: how launches of LS
    models overlap, under all policies alike: as it was measured to be fastest alone on the GPU, or beside BE work; or not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: TenantName = "unnamed"
    description: str = ""
    device: str = "auto"
    seed: int = Field(0, ge=0, lt=2**31)
    duration_s: float = Field(gt=0, le=3600)
    warmup_s: float = Field(0.0, ge=0)
    repeats: int = Field(1, ge=1, le=100)
    policies: tuple[str, ...] = Field(min_length=1)
    swap_mb: int | None = Field(None, ge=1)
    overlap: OverlapChoice = OverlapChoice.ALONE
    tenants: tuple[Tenant, ...] = Field(alias="tenant", min_length=1)

    @field_validator("policies")
    @classmethod
    def _policies_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _require_distinct(value, "policy")
        return value

    @field_validator("tenants")
    @classmethod
    def _tenants_once(cls, value: tuple[Tenant, ...]) -> tuple[Tenant, ...]:
        _require_distinct([tenant.name for tenant in value], "tenant name")
        return value

    @model_validator(mode="after")
    def _warmup_fits(self) -> Scenario:
        if self.warmup_s >= self.duration_s:
            raise ValueError(f"warmup_s ({self.warmup_s:g}) must be shorter than duration_s ({self.duration_s:g})")
        return self

    @model_validator(mode="after")
    def _swap_has_room(self) -> Scenario:
        hosted = [tenant.name for tenant in self.tenants if tenant.hosted]
        if hosted and self.swap_mb is None:
            raise ValueError(
                f'tenant {hosted[0]!r} has residency "host", so swap_mb must say how much GPU memory its weights may take'
            )
        return self

    @property
    def swap_bytes(self) -> int | None:
        return None if self.swap_mb is None else self.swap_mb << 20

    @property
    def objective(self) -> Objective | None:
        """What `load_tenants` takes for `overlap`."""
        return self.overlap.objective

    def changed(self, **fields: Any) -> Scenario:
        """A copy with the given fields replaced, validated again. Fields that are None stay as they are."""
        given = {name: value for name, value in fields.items() if value is not None}
        return _validate(self.model_dump(by_alias=True) | given, "The command line")


def _require_distinct(values: Sequence[str], what: str) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{what} {twice[0]!r} is given twice")


def parse_scenario(text: str, source: str = "The scenario") -> Scenario:
    """Read a scenario from TOML text. MisuseError names `source` and the first wrong field."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MisuseError(f"{source} is not valid TOML: {error}.") from error
    return _validate(raw, source)


def read_scenario(path: Path) -> Scenario:
    """Read a scenario file. MisuseError when it is missing, not text or has a wrong field."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MisuseError(f"There is no scenario file at {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"{path} can't be read: {error}.") from error
    return parse_scenario(text, str(path))


def default_scenario() -> Scenario:
    """The scenario that `missile bench` runs without arguments."""
    path = resources.files("missile.bench").joinpath("scenarios", "default.toml")
    return parse_scenario(path.read_text(encoding="utf-8"), "The default scenario")


def format_scenario(scenario: Scenario) -> str:
    """`scenario` as TOML text that `parse_scenario` reads back to an equal scenario."""
    raw = scenario.model_dump(mode="json", by_alias=True, exclude_none=True)
    tenants = raw.pop("tenant")
    lines = [f"{key} = {_toml(value)}" for key, value in raw.items()]
    for tenant in tenants:
        lines += ["", "[[tenant]]", *(f"{key} = {_toml(value)}" for key, value in tenant.items())]
    return "\n".join(lines) + "\n"


def describe_arrivals(spec: Arrivals) -> str:
    """`spec` in a few words, for tables and the report."""
    match spec:
        case PoissonArrivals():
            return f"Poisson, {spec.rate_per_s:g}/s"
        case PeriodicArrivals():
            return f"periodic, {spec.rate_per_s:g}/s" + (f", late by up to {spec.jitter:.0%}" if spec.jitter else "")
        case BurstArrivals():
            return (
                f"bursts of {spec.burst_per_s:g}/s between {spec.quiet_per_s:g}/s, {spec.rate_per_s:.3g}/s on average"
            )
        case TraceArrivals():
            scaled = [f"scaled to {spec.rate_per_s:g}/s"] if spec.rate_per_s else []
            scaled += [f"{spec.compression:g} times as fast"] if spec.compression != 1 else []
            scaled += [f"{spec.rate_scale:g} times as many"] if spec.rate_scale != 1 else []
            return ", ".join([f"recorded trace {spec.name}", *scaled])
        case DisbArrivals():
            return f"DISB workload {spec.workload}, task {spec.task}"
        case ClosedLoop():
            think = f", {spec.think_ms:g} ms between" if spec.think_ms else ""
            return f"closed loop, {spec.depth} outstanding{think}"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + "".join(_toml_character(character) for character in value) + '"'
    return repr(value)


def _toml_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x20 or code == 0x7F else character


def _validate(raw: dict[str, Any], source: str) -> Scenario:
    try:
        return Scenario.model_validate(raw)
    except ValidationError as error:
        raise MisuseError(f"{source}: {_first_problem(error, raw)}.") from error


def _first_problem(error: ValidationError, raw: dict[str, Any]) -> str:
    """The first error as "field: what is wrong", with tenants called by their names."""
    first = error.errors()[0]
    path: list[str] = []
    for part in first["loc"]:
        if isinstance(part, int):
            path[-1] += _label(raw.get("tenant"), part) if path == ["tenant"] else f"[{part}]"
        elif path[-1:] != ["arrivals"] or part not in _ARRIVAL_KINDS:
            path.append(part)
    field = ".".join(path)
    known = {"missing": "is missing", "extra_forbidden": "is not a field of a scenario"}
    if first["type"] in known:
        return f"{field} {known[first['type']]}"
    message = first["msg"].removeprefix("Value error, ").removesuffix(".")
    if message.startswith("Input should "):
        message = message.removeprefix("Input ") + (f", not {given!r}" if _is_short(given := first["input"]) else "")
    return f"{field}: {message}" if field else message


def _is_short(value: object) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 60)


def _label(tenants: Any, index: int) -> str:
    tenant = tenants[index] if isinstance(tenants, list) and index < len(tenants) else None
    name = tenant.get("name") if isinstance(tenant, dict) else None
    return f" {name!r}" if isinstance(name, str) else f" {index + 1}"
