"""Where each kernel lets the next launch start, as it was measured to be fastest: data for code that overlaps.

`autotune/overlap/GPU.json` has it by objective, by memory (plain, or the form of translation) and by a digest of the
kernel's code as it was compiled, before colors: that stays the same, whatever the color sets. What is not in it
lets the next launch start before its first store.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from missile.coloring.shape import Form
from missile.compiler.objective import Objective
from missile.compiler.placements import digest
from missile.compiler.ptx.overlap import Dependents, Overlap
from missile.compiler.tuning import AUTOTUNE
from missile.errors import MisuseError
from missile.files import write_whole

__all__ = ["DEFAULT", "OVERLAPS", "PLAIN", "OverlapTable", "Overlapping", "Tuned", "memory_of"]

OVERLAPS = AUTOTUNE / "overlap"
PLAIN = "plain"
DEFAULT = Dependents.LATE
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Tuned:
    """Each kernel as the table has it. Stands where one `Overlap` for all kernels may stand."""

    objective: Objective = Objective.ALONE

    @property
    def name(self) -> str:
        """Different for code that may differ, but for other contents of the table."""
        return f"tuned-{self.objective}"


Overlapping = Overlap | Tuned


def memory_of(form: Form | None) -> str:
    """The table's name for plain memory (None) or for a form of translation."""
    return PLAIN if form is None else str(form)


@dataclass(slots=True)
class OverlapTable:
    """places: by objective, memory and digest."""

    gpu: str
    places: dict[Objective, dict[str, dict[str, Dependents]]] = field(default_factory=dict)

    @classmethod
    def load(cls, gpu: str, folder: Path | None = None) -> OverlapTable:
        """The table of a GPU by its name; an empty one where there is none. MisuseError for a broken file."""
        path = _path(gpu, folder or OVERLAPS)
        try:
            raw = json.loads(path.read_text())
            if raw["format"] != _FORMAT:
                raise ValueError(f"format {raw['format']!r}")
            places = {
                Objective(objective): {
                    str(memory): {str(key): Dependents(place) for place, digests in entries.items() for key in digests}
                    for memory, entries in memories.items()
                }
                for objective, memories in raw["places"].items()
            }
            return cls(str(raw["gpu"]), places)
        except FileNotFoundError:
            return cls(gpu)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MisuseError(f"The table of overlapping launches {path} can't be read: {error}.") from error

    def find(self, objective: Objective, memory: str, ptx: str) -> Dependents:
        """For a kernel by its code, as it was compiled."""
        return self.places.get(objective, {}).get(memory, {}).get(digest(ptx), DEFAULT)

    def note(self, objective: Objective, memory: str, ptx: str, place: Dependents) -> None:
        """Keep what was measured."""
        entries = self.places.setdefault(objective, {}).setdefault(memory, {})
        if place is DEFAULT:
            entries.pop(digest(ptx), None)
        else:
            entries[digest(ptx)] = place

    def overlap_for(self, how: Overlapping, memory: str, ptx: str) -> Overlap:
        """How one kernel overlaps."""
        return how if isinstance(how, Overlap) else Overlap(self.find(how.objective, memory, ptx))

    def save(self, folder: Path | None = None) -> None:
        """Write the table, whole or not at all."""
        places = {
            str(objective): {memory: _by_place(entries) for memory, entries in sorted(memories.items())}
            for objective, memories in sorted(self.places.items())
        }
        content = {"format": _FORMAT, "gpu": self.gpu, "places": places}
        write_whole(_path(self.gpu, folder or OVERLAPS), json.dumps(content, indent=1) + "\n")


def _by_place(entries: dict[str, Dependents]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, place in sorted(entries.items()):
        found.setdefault(str(place), []).append(key)
    return dict(sorted(found.items()))


def _path(gpu: str, folder: Path) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', gpu)}.json"
