"""What both parts of the isolation benchmark keep in their files: what was measured on, and rows of JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from missile.bench.environment import describe_environment
from missile.errors import MisuseError
from missile.files import write_whole
from missile.gpu.interface import Gpu
from missile.validation import first_problem

__all__ = ["Record", "Row", "header_of"]


class Row(BaseModel):
    """One entry of a result."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Row):
    """A result: whose it is, and how far it got. Subclasses say which of their fields are `rows`, one a line in the file.

    derived: name under which the file also has what follows from the rows, for readers without this code.
    """

    rows: ClassVar[str]
    derived: ClassVar[str]

    created: str
    simulated: bool
    gpu: str
    device: str
    uuid: str
    environment: dict[str, Any]
    seconds: float = 0.0
    interrupted: bool = False

    @classmethod
    def read(cls, path: Path) -> Self:
        """MisuseError for a file that is missing, broken or of another kind."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                content.pop(cls.derived, None)
            return cls.model_validate(content)
        except FileNotFoundError:
            raise MisuseError(f"There are no isolation results at {path}.") from None
        except OSError as error:
            raise MisuseError(f"{path} can't be read: {error.strerror}.") from error
        except ValidationError as error:
            raise MisuseError(f"{path} is not a result of `missile bench isolation`: {first_problem(error)}.") from None
        except ValueError:
            raise MisuseError(f"{path} is not a whole result of `missile bench isolation`: it is truncated.") from None

    @classmethod
    def before(cls, path: Path, gpu: Gpu) -> Self | None:
        """What an earlier run left at `path`, None where there is nothing. MisuseError when it is another GPU's."""
        if not path.exists():
            return None
        found = cls.read(path)
        if (found.gpu, found.uuid, found.device) != (gpu.info.name, gpu.info.uuid, gpu.info.device):
            raise MisuseError(
                f"{path} holds results of another GPU, {found.gpu} {found.uuid}; choose another folder with -o."
            )
        return found

    def write(self, path: Path, derived: list[Any]) -> None:
        """Write `path` whole or leave it as it was. MisuseError when it can't be written."""
        content = self.model_dump(mode="json", by_alias=True)
        listed = {self.derived: [row.model_dump(mode="json") for row in derived], self.rows: content.pop(self.rows)}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        for name, rows in listed.items():
            lines.append(f" {json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]")
        try:
            write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")
        except OSError as error:
            raise MisuseError(f"{path} can't be written: {error.strerror}.") from error


def header_of(gpu: Gpu) -> dict[str, Any]:
    """The fields of a `Record` that say what is measured on, now."""
    info = gpu.info
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "simulated": info.simulated,
        "gpu": info.name,
        "device": info.device,
        "uuid": info.uuid,
        "environment": describe_environment(info),
    }
