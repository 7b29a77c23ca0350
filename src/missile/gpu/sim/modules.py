"""Modules and kernels of the simulated GPU: names only, since kernels run as work, not as code."""

from __future__ import annotations

import re

from missile.errors import MisuseError
from missile.gpu.sim.spec import GpuSpec

__all__ = ["SimKernel", "SimModule"]

_ENTRY = re.compile(rb"\.entry\s+([A-Za-z_$%][\w$]*)")


class SimKernel:
    """An entry point. `tenant` is the one that errors name."""

    def __init__(self, name: str, tenant: str, spec: GpuSpec) -> None:
        self._name = name
        self.tenant = tenant
        self._sm = spec.sm

    @property
    def name(self) -> str:
        return self._name

    @property
    def registers(self) -> int:
        return 0

    def blocks_per_sm(self, threads: int, shared_bytes: int) -> int:
        if threads < 1 or shared_bytes < 0:
            raise MisuseError(f"A block of {threads} threads and {shared_bytes} shared bytes makes no sense.")
        sm = self._sm
        by_shared = sm.shared_kib * 1024 // shared_bytes if shared_bytes else sm.max_blocks
        return max(0, min(sm.max_blocks, sm.max_threads // threads, by_shared))


class SimModule:
    """Loaded code. PTX text has the entry points that it declares; anything else is taken to have every name.

    `name` is "TENANT" or "TENANT/WHAT", as on hardware.
    """

    def __init__(self, image: bytes, name: str, spec: GpuSpec) -> None:
        self._name = name
        self._spec = spec
        self._entries = tuple(match.decode() for match in _ENTRY.findall(image))

    def kernel(self, name: str) -> SimKernel:
        if self._entries and name not in self._entries:
            of = f" {self._name!r}" if self._name else ""
            raise MisuseError(f"Module{of} has no kernel {name!r}; it has {', '.join(self._entries)}.")
        return SimKernel(name, self._name.partition("/")[0], self._spec)

    def close(self) -> None:
        """Nothing to give back."""
