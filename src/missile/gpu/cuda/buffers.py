"""Device memory, pinned host memory, and pages with addresses of their own."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError
from missile.gpu.cuda.driver import Driver
from missile.gpu.interface import PhysicalPage

__all__ = ["ALIGNMENT", "CudaBuffer", "CudaHostBuffer", "CudaPage", "CudaRange", "near"]

ALIGNMENT = 512


class CudaBuffer:
    """Device memory from cuMemAlloc. on_free: called once with the size."""

    def __init__(self, cu: Driver, nbytes: int, tenant: str, on_free: Callable[[CudaBuffer], None]) -> None:
        self._cu = cu
        self.tenant = tenant
        self._nbytes = nbytes
        self._on_free = on_free
        # The driver promises 256-byte alignment; sizes in multiples of 512 keep it at 512 in practice, and if not:
        rounded = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        self._base: int | None = int(cu("cuMemAlloc", rounded, tenant=tenant))
        if self._base % ALIGNMENT:
            cu("cuMemFree", self._base)
            self._base = int(cu("cuMemAlloc", rounded + ALIGNMENT, tenant=tenant))
        self._address = -(-self._base // ALIGNMENT) * ALIGNMENT

    @property
    def address(self) -> int:
        return self._address

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def free(self) -> None:
        if self._base is not None:
            base, self._base = self._base, None
            self._on_free(self)
            self._cu.release("cuMemFree", base)


class CudaHostBuffer:
    """Pinned host memory from cuMemHostAlloc."""

    def __init__(self, cu: Driver, nbytes: int, tenant: str, on_free: Callable[[CudaHostBuffer], None]) -> None:
        self._cu = cu
        self.tenant = tenant
        self._on_free = on_free
        self._address: int | None = int(cu("cuMemHostAlloc", max(nbytes, 1), 0, tenant=tenant))
        self._array: npt.NDArray[np.uint8] = np.ndarray(
            nbytes, np.uint8, memoryview((ctypes.c_uint8 * nbytes).from_address(self._address))
        )

    @property
    def address(self) -> int:
        if self._address is None:
            raise MisuseError("This host buffer was freed.")
        return self._address

    @property
    def nbytes(self) -> int:
        return int(self._array.nbytes)

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        return self._array

    def free(self) -> None:
        if self._address is not None:
            address, self._address = self._address, None
            self._array = np.empty(0, np.uint8)
            self._on_free(self)
            self._cu.release("cuMemFreeHost", address)


@contextlib.contextmanager
def near(pci_address: str) -> Iterator[None]:
    """Run on the CPUs of the GPU's NUMA node, so that memory which is pinned now lies there. Nothing on one node."""
    node = _numa_node(pci_address)
    cpus = _cpus(node) & os.sched_getaffinity(0) if node is not None else set()
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _numa_node(pci_address: str) -> int | None:
    """The NUMA node of a PCI device, or None where there is one node only or the system does not say."""
    try:
        if (online := Path("/sys/devices/system/node/online").read_text().strip()) == "0":
            return None
        node = int(Path(f"/sys/bus/pci/devices/{pci_address.lower()}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 and online else None


def _cpus(node: int) -> set[int]:
    text = Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().strip()
    cpus: set[int] = set()
    for span in filter(None, text.split(",")):
        first, _, last = span.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


class CudaPage:
    """One physical page from cuMemCreate."""

    def __init__(self, cu: Driver, nbytes: int, prop: Any, tenant: str, on_release: Callable[[CudaPage], None]) -> None:
        self._cu = cu
        self.tenant = tenant
        self.nbytes = nbytes
        self._on_release = on_release
        self.handle: Any = cu("cuMemCreate", nbytes, prop, 0, tenant=tenant)

    def release(self) -> None:
        """Give the page back. Where it is still mapped, the memory lives until it is unmapped there."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            self._on_release(self)
            self._cu.release("cuMemRelease", handle)


class CudaRange:
    """Device addresses from cuMemAddressReserve."""

    def __init__(
        self, cu: Driver, nbytes: int, page_bytes: int, access: Any, on_free: Callable[[CudaRange], None]
    ) -> None:
        self._cu = cu
        self._nbytes = -(-nbytes // page_bytes) * page_bytes
        self._page = page_bytes
        self._access = access
        self._on_free = on_free
        self._mapped: set[int] = set()  # page indices
        self._address: int | None = int(cu("cuMemAddressReserve", self._nbytes, page_bytes, 0, 0))

    @property
    def address(self) -> int:
        if self._address is None:
            raise MisuseError("This address range was freed.")
        return self._address

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def map(self, offset: int, pages: Sequence[PhysicalPage]) -> None:
        indices = self._indices(offset, len(pages) * self._page)
        if taken := self._mapped.intersection(indices):
            raise MisuseError(f"Offset {min(taken) * self._page} of the address range is mapped already.")
        begin = self.address + offset
        with contextlib.ExitStack() as undo:
            for index, page in enumerate(pages):
                assert isinstance(page, CudaPage)
                if page.handle is None:
                    raise MisuseError("A page that was released can't be mapped.")
                where = begin + index * self._page
                self._cu("cuMemMap", where, self._page, 0, page.handle, 0, tenant=page.tenant)
                undo.callback(self._cu.release, "cuMemUnmap", where, self._page)
            if pages:
                self._cu("cuMemSetAccess", begin, len(pages) * self._page, [self._access], 1)
            undo.pop_all()
        self._mapped.update(indices)

    def unmap(self, offset: int, nbytes: int) -> None:
        indices = self._indices(offset, nbytes)
        if missing := set(indices) - self._mapped:
            raise MisuseError(f"Offset {min(missing) * self._page} of the address range is not mapped.")
        if nbytes:
            self._cu("cuMemUnmap", self.address + offset, nbytes)
            self._mapped.difference_update(indices)

    def free(self) -> None:
        if self._address is not None:
            address, self._address = self._address, None
            for index in sorted(self._mapped):
                self._cu.release("cuMemUnmap", address + index * self._page, self._page)
            self._mapped.clear()
            self._on_free(self)
            self._cu.release("cuMemAddressFree", address, self._nbytes)

    def _indices(self, offset: int, nbytes: int) -> range:
        if offset % self._page or nbytes % self._page:
            raise MisuseError(f"Offset {offset} and size {nbytes} must be multiples of the page size, {self._page}.")
        if offset < 0 or nbytes < 0 or offset + nbytes > self._nbytes:
            raise MisuseError(f"Bytes {offset} to {offset + nbytes} leave the address range of {self._nbytes} bytes.")
        return range(offset // self._page, (offset + nbytes) // self._page)
