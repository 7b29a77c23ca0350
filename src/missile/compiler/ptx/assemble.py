"""PTX text to a cubin with the assembler that Triton brings along: needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from missile.errors import UnsupportedError

__all__ = ["assemble", "find_ptxas"]


def find_ptxas() -> Path:
    """Triton's ptxas, else the one on the path. UnsupportedError when there is neither."""
    try:
        import triton
    except ImportError:
        pass
    else:
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        if bundled.is_file():
            return bundled
    found = shutil.which("ptxas")
    if found is None:
        raise UnsupportedError("There is no ptxas: it comes with Triton (pip install 'missile[torch]') and with CUDA.")
    return Path(found)


def assemble(ptx: str, *, arch: str, name: str = "") -> bytes:
    """The cubin of `ptx` for `arch` ("sm_90a"). UnsupportedError with the assembler's first complaint."""
    ptxas = find_ptxas()
    with tempfile.TemporaryDirectory(prefix="missile-ptx-") as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        done = subprocess.run(
            [ptxas, f"-arch={arch}", "-lineinfo", source, "-o", target], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            complaint = said[0].replace(str(source), "its PTX") if said else f"exit status {done.returncode}"
            raise UnsupportedError(f"Kernel {name!r} can't be assembled for {arch}: {complaint}")
        return target.read_bytes()
