"""PTX text to a cubin with the assembler that PyTorch or Triton bring along: needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from missile.errors import UnsupportedError

__all__ = ["assemble", "find_ptxas"]

_BUNDLED = (("torch", "bin/ptxas"), ("triton", "backends/nvidia/bin/ptxas"))
_TOO_NEW = re.compile(r"Unsupported \.version \S+; current version is '([\d.]+)'")
_VERSION = re.compile(r"^(\.version\s+)\S+", re.MULTILINE)


@cache
def find_ptxas() -> Path:
    """The assembler that Inductor takes, so that colored code differs from plain code in nothing else: what
    TRITON_PTXAS_PATH names, PyTorch's, Triton's, else the one on the path. UnsupportedError when there is none.
    """
    chosen = os.environ.get("TRITON_PTXAS_PATH")
    if chosen and Path(chosen).is_file():
        return Path(chosen)
    for package, where in _BUNDLED:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None and (path := Path(spec.origin).parent / where).is_file():
            return path
    found = shutil.which("ptxas")
    if found is None:
        raise UnsupportedError("There is no ptxas: it comes with Triton (pip install 'missile[torch]') and with CUDA.")
    return Path(found)


def assemble(ptx: str, *, arch: str, name: str = "") -> bytes:
    """The cubin of `ptx` for `arch` ("sm_90a"). UnsupportedError with the assembler's first complaint.

    Text of a newer version of the language than the assembler's is tried as of its own: it may use nothing new.
    """
    with tempfile.TemporaryDirectory(prefix="missile-ptx-") as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        complaint = _run(ptx, arch, source, target)
        if complaint and (newer := _TOO_NEW.search(complaint)):
            complaint = _run(_VERSION.sub(rf"\g<1>{newer[1]}", ptx, count=1), arch, source, target)
        if complaint:
            raise UnsupportedError(f"Kernel {name!r} can't be assembled for {arch}: {complaint}")
        return target.read_bytes()


def _run(ptx: str, arch: str, source: Path, target: Path) -> str:
    """Assemble `ptx` into the file `target`; what the assembler complains of, "" when it does not."""
    source.write_text(ptx)
    done = subprocess.run(
        [find_ptxas(), f"-arch={arch}", "-lineinfo", source, "-o", target], capture_output=True, text=True, check=False
    )
    if not done.returncode:
        return ""
    said = (done.stderr or done.stdout).strip().splitlines()
    return said[0].replace(str(source), "its PTX") if said else f"exit status {done.returncode}"
