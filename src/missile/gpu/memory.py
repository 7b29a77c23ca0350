"""Who has how much GPU memory: a ledger, and adaptors that put accounting or a limit in front of any allocator.

An allocator is anything with `allocate(nbytes, tenant=...)`; a `Gpu` is one. Adaptors wrap, they don't flag:
`LimitedAllocator(TrackedAllocator(gpu), {"resnet152": 8 << 30})` is one too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from missile.errors import InternalError, OutOfMemoryError
from missile.gpu.interface import DeviceBuffer

__all__ = ["Allocator", "Ledger", "LimitedAllocator", "TrackedAllocator"]


class Allocator(Protocol):
    """Gives out device memory on behalf of tenants."""

    def allocate(self, nbytes: int, *, tenant: str = "") -> DeviceBuffer: ...


class Ledger:
    """Bytes in use and at most in use, by tenant ("" for memory of nobody in particular). Pure accounting."""

    def __init__(self) -> None:
        self._in_use: dict[str, int] = {}
        self._peak: dict[str, int] = {}

    def charge(self, tenant: str, nbytes: int) -> None:
        now = self._in_use.get(tenant, 0) + nbytes
        self._in_use[tenant] = now
        self._peak[tenant] = max(self._peak.get(tenant, 0), now)

    def refund(self, tenant: str, nbytes: int) -> None:
        """InternalError when more comes back than was charged."""
        left = self._in_use.get(tenant, 0) - nbytes
        if left < 0:
            raise InternalError(f"Tenant {tenant!r} gave back {-left} bytes more than it had.")
        self._in_use[tenant] = left

    def in_use(self, tenant: str) -> int:
        return self._in_use.get(tenant, 0)

    def peak(self, tenant: str) -> int:
        return self._peak.get(tenant, 0)

    def total(self) -> int:
        return sum(self._in_use.values())

    def by_tenant(self) -> dict[str, int]:
        """Bytes in use of every tenant that ever had any."""
        return dict(self._in_use)


class _ChargedBuffer:
    """A buffer whose `free` also takes it off the ledger, once."""

    def __init__(self, buffer: DeviceBuffer, ledger: Ledger, tenant: str) -> None:
        self._buffer = buffer
        self._ledger = ledger
        self._tenant = tenant
        self._freed = False

    @property
    def address(self) -> int:
        return self._buffer.address

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def free(self) -> None:
        if not self._freed:
            self._freed = True
            self._buffer.free()
            self._ledger.refund(self._tenant, self._buffer.nbytes)


class TrackedAllocator:
    """Keeps a ledger of what goes through it. `ledger` may be shared among several."""

    def __init__(self, upstream: Allocator, ledger: Ledger | None = None) -> None:
        self._upstream = upstream
        self.ledger = ledger or Ledger()

    def allocate(self, nbytes: int, *, tenant: str = "") -> DeviceBuffer:
        buffer = self._upstream.allocate(nbytes, tenant=tenant)
        self.ledger.charge(tenant, buffer.nbytes)
        return _ChargedBuffer(buffer, self.ledger, tenant)


class LimitedAllocator:
    """Holds each tenant to its limit (bytes); tenants without one are not limited."""

    def __init__(self, upstream: Allocator, limits: Mapping[str, int]) -> None:
        self._tracked = TrackedAllocator(upstream)
        self._limits = dict(limits)

    @property
    def ledger(self) -> Ledger:
        return self._tracked.ledger

    def allocate(self, nbytes: int, *, tenant: str = "") -> DeviceBuffer:
        """OutOfMemoryError, before anything is taken from upstream, when the tenant's limit does not allow it."""
        limit = self._limits.get(tenant)
        if limit is not None:
            left = limit - self.ledger.in_use(tenant)
            if nbytes > left:
                raise OutOfMemoryError(
                    f"Tenant {tenant!r} asked for {nbytes} bytes of GPU memory with {left} of its {limit} left.",
                    requested=nbytes,
                    available=left,
                    tenant=tenant,
                )
        return self._tracked.allocate(nbytes, tenant=tenant)
