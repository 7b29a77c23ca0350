"""Which translations each kernel is fastest with, as it was measured: data for `color_kernels`.

`autotune/colored/GPU.json` has, for each form of translation, the fastest placement of the kernels that were measured, and
those that a larger table of the same memory (`shadow_shape`) makes faster, by a digest of their code.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from missile.coloring.shape import Form
from missile.compiler.ptx.rewrite import USUAL, Placement
from missile.compiler.tuning import AUTOTUNE
from missile.errors import MisuseError
from missile.files import write_whole

__all__ = ["PLACEMENTS", "PlacementTable", "digest"]

PLACEMENTS = AUTOTUNE / "colored"
_FORMAT = 1
_DEBUG = re.compile(
    r"^\s*(//.*|\.(file|loc)\b.*|\.global .*\bassert\w+_\d+\[.*)\n|^\s*\.section\s[^{]*\{[^}]*\}\n?", re.MULTILINE
)


def digest(ptx: str) -> str:
    """Of a kernel's code, whatever files it was written in."""
    return sha256(_DEBUG.sub("", ptx).encode()).hexdigest()[:20]


@dataclass(slots=True)
class PlacementTable:
    """best: placement by form and digest; kernels that are not in it take the usual one. shadowed: digests of kernels that
    are faster with the larger table of `shadow_shape` than with the form given.
    """

    gpu: str
    best: dict[Form, dict[str, Placement]] = field(default_factory=dict)
    shadowed: dict[Form, set[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, gpu: str, folder: Path = PLACEMENTS) -> PlacementTable:
        """The table of a GPU by its name; an empty one where there is none. MisuseError for a broken file."""
        path = _path(gpu, folder)
        try:
            raw = json.loads(path.read_text())
            if raw["format"] != _FORMAT:
                raise ValueError(f"format {raw['format']!r}")
            best = {
                Form(form): {key: Placement(value) for key, value in entries.items()}
                for form, entries in raw["placements"].items()
            }
            shadowed = {Form(form): set(digests) for form, digests in raw["shadowed"].items()}
            return cls(str(raw["gpu"]), best, shadowed)
        except FileNotFoundError:
            return cls(gpu)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MisuseError(f"The table of placements {path} can't be read: {error}.") from error

    def find(self, form: Form, ptx: str) -> Placement:
        """The best placement for a kernel, as far as it is known."""
        return self.best.get(form, {}).get(digest(ptx), USUAL)

    def note(self, form: Form, ptx: str, placement: Placement | None) -> None:
        """Keep what was measured; None: nothing was."""
        entries = self.best.setdefault(form, {})
        if placement is None:
            entries.pop(digest(ptx), None)
        else:
            entries[digest(ptx)] = placement

    def is_shadowed(self, form: Form, ptx: str) -> bool:
        """Whether a kernel of `form` is faster with the larger table."""
        return digest(ptx) in self.shadowed.get(form, ())

    def note_shadowed(self, form: Form, ptx: str, faster: bool) -> None:
        """Keep what was measured."""
        digests = self.shadowed.setdefault(form, set())
        (digests.add if faster else digests.discard)(digest(ptx))

    def save(self, folder: Path = PLACEMENTS) -> None:
        """Write the table, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        placements = {str(form): dict(sorted(entries.items())) for form, entries in sorted(self.best.items())}
        shadowed = {str(form): sorted(digests) for form, digests in sorted(self.shadowed.items())}
        content = {"format": _FORMAT, "gpu": self.gpu, "placements": placements, "shadowed": shadowed}
        write_whole(_path(self.gpu, folder), json.dumps(content, indent=1) + "\n")


def _path(gpu: str, folder: Path) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', gpu)}.json"
