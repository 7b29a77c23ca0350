"""Folders of rewritten code beside a package's kernels: written whole, and current or not."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from missile.errors import MisuseError

__all__ = ["is_kept", "keep", "target_of"]

_VERSION = "version"


def target_of(text: str, name: str) -> str:
    """The GPU that PTX is for: in its first lines, so that the rest need not be parsed for it. MisuseError without one."""
    found = re.search(r"^\s*\.target\s+(\w+)", text, re.MULTILINE)
    if found is None:
        raise MisuseError(f"The PTX of kernel {name!r} does not say which GPU it is for.")
    return found[1]


def is_kept(folder: Path, version: str) -> bool:
    """Whether `folder` was written by `version` of what writes it."""
    try:
        return (folder / _VERSION).read_text() == version
    except OSError:
        return False


def keep(folder: Path, files: Mapping[str, bytes], version: str) -> None:
    """Make `folder` hold `files`, all or none, in place of what is there. Raises OSError.

    Each writer has a folder of its own until then, so that processes that write the same don't meet in one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        part.chmod(0o755)  # as other folders of a package, which several users may share
        for name, content in files.items():
            (part / name).write_bytes(content)
        (part / _VERSION).write_text(version)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
