"""What Missile raises, and what holds afterwards.

Every error that a user can cause or meet is a `MissileError`: one clear sentence, and an exit code for the
command line. `docs/errors.md` is the contract of what is still usable after each of them.
"""

from __future__ import annotations

__all__ = [
    "GpuError",
    "InternalError",
    "KernelFaultError",
    "MissileError",
    "MisuseError",
    "NoisyGpuError",
    "OutOfMemoryError",
    "UnsupportedError",
]


class MissileError(Exception):
    """Base of all errors that Missile reports. `str(error)` is one sentence for a person."""

    exit_code: int = 1


class MisuseError(MissileError):
    """The caller asked for something that makes no sense: unknown name, absurd value, broken file.

    Nothing was started and nothing changed. Exit code 2.
    """

    exit_code = 2


class UnsupportedError(MissileError):
    """The request makes sense but this GPU, driver, model or installation can't do it. Nothing changed."""


class NoisyGpuError(MissileError):
    """A measurement was refused because the GPU is too noisy for a sure answer (something else runs on it)."""


class OutOfMemoryError(MissileError):
    """Device or pinned memory ran out, or a tenant met its memory limit. What existed before still works.

    Attributes: `requested` and `available` in bytes (-1: not known), `tenant` ("" where none).
    """

    def __init__(self, message: str, *, requested: int = -1, available: int = -1, tenant: str = "") -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available
        self.tenant = tenant


class GpuError(MissileError):
    """A call to the GPU's driver failed.

    Attributes: `call` (the driver's function), `code` (its status name), `tenant` ("" where none) and
    `usable`: what still works, "gpu" (everything but this call), or "nothing" (the context is lost).
    """

    def __init__(self, call: str, code: str, *, tenant: str = "", usable: str = "gpu", detail: str = "") -> None:
        who = f" for tenant {tenant!r}" if tenant else ""
        still = "the GPU stays usable" if usable == "gpu" else "this process's GPU context is lost"
        super().__init__(f"{call} failed{who}: {code}{f' ({detail})' if detail else ''}; {still}.")
        self.call = call
        self.code = code
        self.tenant = tenant
        self.usable = usable


class KernelFaultError(GpuError):
    """A tenant's kernel faulted (illegal address, trap, launch failure): the context is lost for every tenant.

    The results gathered before the fault are valid; nothing measured after it is.
    """

    def __init__(self, call: str, code: str, *, tenant: str = "", detail: str = "") -> None:
        super().__init__(call, code, tenant=tenant, usable="nothing", detail=detail)


class InternalError(MissileError):
    """Missile broke one of its own invariants. Please report it."""
