"""A bench scenario: who shares the GPU, how their requests arrive, and which policies are compared. A TOML file.

Pure data: what a model, trace or policy name means is looked up when the scenario is run. docs/scenario.md describes
every field.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from missile.errors import MisuseError

__all__ = [
    "Arrivals",
    "Bursts",
    "ClosedLoop",
    "Periodic",
    "Poisson",
    "Recorded",
    "Scenario",
    "Tenant",
    "TenantClass",
    "default_scenario",
    "format_scenario",
    "parse_scenario",
    "read_scenario",
]

Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TenantClass(StrEnum):
    """LS: has deadlines to meet. BE: takes what is left."""

    LS = "LS"
    BE = "BE"


class Poisson(_Strict):
    """Independent arrivals, `rate` requests/s on average."""

    kind: Literal["poisson"] = "poisson"
    rate: Rate

    def __str__(self) -> str:
        return f"Poisson, {self.rate:g}/s"


class Periodic(_Strict):
    """One request every 1/`rate` s, each moved by up to `jitter` periods."""

    kind: Literal["periodic"] = "periodic"
    rate: Rate
    jitter: float = Field(0.0, ge=0, le=1)

    def __str__(self) -> str:
        return f"periodic, {self.rate:g}/s" + (f" ± {self.jitter:.0%} of a period" if self.jitter else "")


class Bursts(_Strict):
    """Bursts of `size` requests at once; the bursts arrive by Poisson so that `rate` requests/s arrive on average."""

    kind: Literal["bursts"] = "bursts"
    rate: Rate
    size: int = Field(4, ge=1, le=10_000)

    def __str__(self) -> str:
        return f"bursts of {self.size}, {self.rate:g}/s on average"


class Recorded(_Strict):
    """A recorded trace by name, its time stretched so that `rate` requests/s arrive on average (None: as recorded)."""

    kind: Literal["trace"] = "trace"
    trace: str = Field(min_length=1)
    rate: Rate | None = None

    def __str__(self) -> str:
        return f"recorded trace {self.trace}" + (f", scaled to {self.rate:g}/s" if self.rate else "")


class ClosedLoop(_Strict):
    """`in_flight` requests are always outstanding: the next is issued when one is done."""

    kind: Literal["closed"] = "closed"
    in_flight: int = Field(1, ge=1, le=64)

    def __str__(self) -> str:
        return "closed loop" + (f", {self.in_flight} in flight" if self.in_flight > 1 else "")


Arrivals = Annotated[Poisson | Periodic | Bursts | Recorded | ClosedLoop, Field(discriminator="kind")]


class Tenant(_Strict):
    """One model with its requests.

    An LS tenant's objective is `slo_ms`, or `slo_factor` times its own solo p99; a BE tenant has none.
    """

    name: Name
    tenant_class: TenantClass = Field(alias="class")
    model: str = Field(min_length=1)
    batch: int = Field(1, ge=1, le=4096)
    arrivals: Arrivals
    slo_ms: float | None = Field(None, gt=0)
    slo_factor: float | None = Field(None, ge=1)
    weight: float = Field(1.0, gt=0, le=1000)

    @property
    def latency_sensitive(self) -> bool:
        return self.tenant_class is TenantClass.LS

    @model_validator(mode="after")
    def _one_objective(self) -> Tenant:
        given = [name for name in ("slo_ms", "slo_factor") if getattr(self, name) is not None]
        if self.latency_sensitive and len(given) != 1:
            raise ValueError("an LS tenant needs either slo_ms or slo_factor")
        if not self.latency_sensitive and given:
            raise ValueError(f"a BE tenant has no objective, so no {given[0]}")
        return self


class Scenario(_Strict):
    """What `missile bench` runs. Times in seconds."""

    name: Name = "unnamed"
    description: str = ""
    device: str = "auto"
    seed: int = Field(0, ge=0, lt=2**31)
    duration_s: float = Field(gt=0, le=3600)
    warmup_s: float = Field(0.0, ge=0)
    repeats: int = Field(1, ge=1, le=100)
    policies: tuple[str, ...] = Field(min_length=1)
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
    kinds = {"poisson", "periodic", "bursts", "trace", "closed"}
    path: list[str] = []
    for part in first["loc"]:
        if isinstance(part, int):
            path[-1] += _label(raw.get("tenant"), part) if path == ["tenant"] else f"[{part}]"
        elif not (part in kinds and path[-1:] == ["arrivals"]):
            path.append(part)
    field = ".".join(path)
    known = {"missing": "is missing", "extra_forbidden": "is not a field of a scenario"}
    if first["type"] in known:
        return f"{field} {known[first['type']]}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    given = first["input"]
    shown = f", not {given!r}" if isinstance(given, str | int | float) else ""
    return f"{field}: {message}{shown}" if field else message


def _label(tenants: Any, index: int) -> str:
    tenant = tenants[index] if isinstance(tenants, list) and index < len(tenants) else None
    name = tenant.get("name") if isinstance(tenant, dict) else None
    return f" {name!r}" if isinstance(name, str) else f" {index + 1}"
