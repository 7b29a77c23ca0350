"""The one way to the CUDA driver: its bindings, loaded when first needed, behind one checker.

Every call goes through `Driver`, which turns a failing status into an error of `missile.errors`, with the call's name and
the tenant. A context that a kernel fault has destroyed stays destroyed: the checker remembers the first such error and
raises it again, said as what it is, for whatever is asked next. `docs/errors.md` is the contract.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from missile.errors import GpuError, KernelFaultError, MissileError, OutOfMemoryError, UnsupportedError

__all__ = ["Driver", "classify", "load", "why_unavailable"]

# Streams share the driver's work queues, 8 by default; one that waits for its kernels then holds up another's copies.
# Read by the driver when a context is made; what the user has set stays (docs/design/cuda.md).
_QUEUES = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_MAX_COPY_CONNECTIONS")
_MOST_QUEUES = "32"

# What a kernel did wrong. All of them destroy the context for everybody in the process.
_FAULTS = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ILLEGAL_ADDRESS",
        "LAUNCH_TIMEOUT",
        "ASSERT",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "TENSOR_MEMORY_LEAK",
    )
)
# The context is gone, through no kernel's fault that the driver could name.
_LOST = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "CONTEXT_IS_DESTROYED",
        "ECC_UNCORRECTABLE",
        "NVLINK_UNCORRECTABLE",
        "CONTAINED",
        "EXTERNAL_DEVICE",
        "DEINITIALIZED",
        "MPS_CLIENT_TERMINATED",
        "UNKNOWN",
    )
)
_UNSUPPORTED = {
    "CUDA_ERROR_NOT_SUPPORTED": "this GPU or driver does not support it",
    "CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER": "it needs a newer NVIDIA driver",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernel was built for another kind of GPU",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "the kernel's PTX is newer than this driver understands",
    "CUDA_ERROR_JIT_COMPILER_NOT_FOUND": "the driver's PTX compiler is missing",
    "CUDA_ERROR_NO_DEVICE": "there is no such GPU",
    "CUDA_ERROR_INVALID_DEVICE": "there is no such GPU",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process holds the GPU exclusively",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the NVIDIA kernel module and the driver library differ in version",
}


def load() -> Any:
    """The bindings' driver module, initialised. UnsupportedError says in one sentence why there is none."""
    reason, api = _open()
    if reason is not None:
        raise UnsupportedError(f"No CUDA GPU can be used: {reason}.")
    return api


def why_unavailable() -> str | None:
    """Why this machine's GPUs can't be used, in a few words, or None when at least one can."""
    return _open()[0]


def _import() -> Any:
    from cuda.bindings import driver

    return driver


def _open() -> tuple[str | None, Any]:
    try:
        api = _import()
    except ImportError:
        return "the CUDA bindings are not installed (pip install 'missile[cuda]')", None
    for name in _QUEUES:
        os.environ.setdefault(name, _MOST_QUEUES)
    try:
        (status,) = api.cuInit(0)
    except (RuntimeError, OSError):  # the bindings look for libcuda at the first call
        return "no NVIDIA driver was found", None
    if status.name == "CUDA_ERROR_NO_DEVICE":
        return "the NVIDIA driver found no GPU", None
    if status:
        return f"the NVIDIA driver does not start (cuInit: {status.name})", None
    status, count = api.cuDeviceGetCount()
    if status or not count:
        return "the NVIDIA driver found no GPU", None
    return None, api


def classify(call: str, code: str, *, tenant: str = "", detail: str = "") -> MissileError:
    """The error that a failed `call` with status name `code` means. Pure.

    Out of memory carries no byte counts here: the allocator that knows them raises its own.
    """
    if code == "CUDA_ERROR_OUT_OF_MEMORY":
        who = f" for tenant {tenant!r}" if tenant else ""
        return OutOfMemoryError(
            f"GPU memory ran out in {call}{who}; what was loaded before still works.", tenant=tenant
        )
    if code in _FAULTS:
        return KernelFaultError(call, code, tenant=tenant, detail=detail)
    if code in _UNSUPPORTED:
        return UnsupportedError(f"{call} is impossible here: {_UNSUPPORTED[code]} ({code}).")
    return GpuError(call, code, tenant=tenant, usable="nothing" if code in _LOST else "gpu", detail=detail)


class Driver:
    """Checked calls: `cu("cuMemAlloc", nbytes, tenant="resnet34")` returns what the driver returned.

    context: made current on whichever thread calls (one thread at a time; the object itself takes no lock).
    suspects: asked, when a kernel fault surfaces, for the tenants whose kernels were unfinished.
    """

    def __init__(self, api: Any, suspects: Callable[[], tuple[str, ...]] = tuple) -> None:
        self.api = api
        self.suspects = suspects
        self.context: Any = None
        self._thread = 0
        self._lost: GpuError | None = None

    @property
    def lost(self) -> GpuError | None:
        """The error that destroyed the context, or None while it lives."""
        return self._lost

    def __call__(self, call: str, *arguments: Any, tenant: str = "") -> Any:
        """Call `api.call(*arguments)`; None, one value or a tuple, as the driver returns. Raises what `classify` says."""
        self.enter(call)
        status, *values = getattr(self.api, call)(*arguments)
        if status:
            raise self.failure(call, status, tenant=tenant)
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)

    def enter(self, call: str) -> None:
        """What every call starts with; hot paths that call `api` themselves use it too."""
        if self._lost is not None:
            raise _again(self._lost, call)
        if threading.get_ident() != self._thread and self.context is not None:
            self.api.cuCtxSetCurrent(self.context)
            self._thread = threading.get_ident()

    def failure(self, call: str, status: Any, *, tenant: str = "", detail: str = "") -> MissileError:
        """The error for a non-zero `status`; remembers it when it means that the context is lost."""
        code: str = status.name
        if code in _FAULTS:
            # A fault surfaces at any later call, whoever makes it: the culprit is among those still running.
            suspects = self.suspects()
            if len(suspects) > 1:
                detail = f"one of {', '.join(repr(name) for name in suspects)}" + (f"; {detail}" if detail else "")
            tenant = suspects[0] if len(suspects) == 1 else "" if suspects else tenant
        error = classify(call, code, tenant=tenant, detail=detail)
        if isinstance(error, GpuError) and error.usable == "nothing":
            self._lost = error
        return error

    def release(self, call: str, *arguments: Any) -> None:
        """Give something back. Silent when the context is lost: the driver has freed everything with it."""
        if self._lost is None:
            self.enter(call)
            (status, *_) = getattr(self.api, call)(*arguments)
            if status:
                raise self.failure(call, status)


def _again(first: GpuError, call: str) -> GpuError:
    """The refusal of `call` because `first` has destroyed the context."""
    detail = f"refused: {first.call} met this before"
    if isinstance(first, KernelFaultError):
        return KernelFaultError(call, first.code, tenant=first.tenant, detail=detail)
    return GpuError(call, first.code, tenant=first.tenant, usable="nothing", detail=detail)
