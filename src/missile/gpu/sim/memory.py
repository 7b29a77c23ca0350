"""Device and host memory of a simulated GPU: addresses, physical pages, and bytes that cost nothing until touched.

Device addresses are never given out twice, so use after `free` is always noticed. Memory nobody has written reads as zeros.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError, OutOfMemoryError
from missile.gpu.interface import PhysicalPage

__all__ = ["DeviceMemory", "SimAddressRange", "SimDeviceBuffer", "SimHostBuffer", "SimPage"]

Bytes = npt.NDArray[np.uint8]

ALIGNMENT = 512
_FIRST_DEVICE_ADDRESS = 0x7000_0000_0000
_FIRST_HOST_ADDRESS = 0x7F00_0000_0000
_HOST_PAGE = 4096


class Backing:
    """`nbytes` of contents, all zeros until written."""

    __slots__ = ("_array", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._array: Bytes | None = None

    @property
    def touched(self) -> bool:
        return self._array is not None

    @property
    def array(self) -> Bytes:
        if self._array is None:
            self._array = np.zeros(self.nbytes, np.uint8)
        return self._array


# A stretch of contents: (whose, offset in it, bytes).
Stretch = tuple[Backing, int, int]


class _Mapped(Protocol):
    address: int
    nbytes: int

    def stretches(self, offset: int, nbytes: int) -> Iterator[Stretch]: ...
    def physical(self, offset: int) -> int: ...


_T = TypeVar("_T", bound=_Mapped)


class SimHostBuffer:
    """Pinned host memory. Contents exist once `array` was asked for."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self._contents: Backing | None = Backing(nbytes)

    @property
    def contents(self) -> Backing:
        if self._contents is None:
            raise MisuseError(f"The host buffer of {self.nbytes} bytes was freed.")
        return self._contents

    @property
    def array(self) -> Bytes:
        return self.contents.array

    def free(self) -> None:
        self._contents = None


class SimPage:
    """One physical page. Its memory is given back once it is released and no range maps it."""

    def __init__(self, memory: DeviceMemory, frame: int) -> None:
        self._memory = memory
        self.frame = frame
        self.contents = Backing(memory.page_bytes)
        self.released = False
        self.mappings = 0

    def release(self) -> None:
        if not self.released:
            self.released = True
            self.unmapped(0)

    def unmapped(self, count: int = 1) -> None:
        """`count` mappings less."""
        self.mappings -= count
        if self.released and not self.mappings:
            self._memory.give_back(self.frame)


class _Slab:
    """Physical pages that hold one large allocation, or several small ones. Given back when the last is freed."""

    def __init__(self, frames: list[int]) -> None:
        self.frames = frames
        self.used = 0
        self.users = 0


class SimDeviceBuffer:
    """An ordinary allocation."""

    def __init__(self, memory: DeviceMemory, address: int, nbytes: int, slab: _Slab, slab_offset: int) -> None:
        self._memory = memory
        self.address = address
        self.nbytes = nbytes
        self._contents = Backing(nbytes)
        self._slab: _Slab | None = slab
        self._slab_offset = slab_offset

    def stretches(self, offset: int, nbytes: int) -> Iterator[Stretch]:
        yield self._contents, offset, nbytes

    def physical(self, offset: int) -> int:
        assert self._slab is not None
        page, within = divmod(self._slab_offset + offset, self._memory.page_bytes)
        return self._slab.frames[page] + within

    def free(self) -> None:
        if self._slab is not None:
            slab, self._slab = self._slab, None
            self._memory.forget(self)
            self._memory.leave(slab)


class SimAddressRange:
    """Reserved addresses with room for whole pages."""

    def __init__(self, memory: DeviceMemory, address: int, nbytes: int) -> None:
        self._memory = memory
        self.address = address
        self.nbytes = nbytes
        self._pages: list[SimPage | None] = [None] * (nbytes // memory.page_bytes)
        self._freed = False

    def map(self, offset: int, pages: Sequence[PhysicalPage]) -> None:
        first = self._slots(offset, len(pages) * self._memory.page_bytes).start
        for index, page in enumerate(pages):
            if not isinstance(page, SimPage) or page.released:
                raise MisuseError("A page that was released, or is another GPU's, can't be mapped.")
            if self._pages[first + index] is not None:
                at = (first + index) * self._memory.page_bytes
                raise MisuseError(f"There is a page mapped at offset {at} of the range already.")
        for index, page in enumerate(pages):
            assert isinstance(page, SimPage)
            page.mappings += 1
            self._pages[first + index] = page

    def unmap(self, offset: int, nbytes: int) -> None:
        slots = self._slots(offset, nbytes)
        for slot in slots:
            if self._pages[slot] is None:
                raise MisuseError(f"No page is mapped at offset {slot * self._memory.page_bytes} of the range.")
        for slot in slots:
            page = self._pages[slot]
            assert page is not None
            self._pages[slot] = None
            page.unmapped()

    def free(self) -> None:
        if self._freed:
            return
        self._freed = True
        for page in self._pages:
            if page is not None:
                page.unmapped()
        self._pages = []
        self._memory.forget(self)

    def stretches(self, offset: int, nbytes: int) -> Iterator[Stretch]:
        page_bytes = self._memory.page_bytes
        while nbytes:
            slot, within = divmod(offset, page_bytes)
            length = min(page_bytes - within, nbytes)
            yield self._page(slot).contents, within, length
            offset += length
            nbytes -= length

    def physical(self, offset: int) -> int:
        slot, within = divmod(offset, self._memory.page_bytes)
        return self._page(slot).frame + within

    def _page(self, slot: int) -> SimPage:
        page = self._pages[slot]
        if page is None:
            address = self.address + slot * self._memory.page_bytes
            raise MisuseError(f"Device address {address:#x} is reserved but no page is mapped there.")
        return page

    def _slots(self, offset: int, nbytes: int) -> range:
        page = self._memory.page_bytes
        if self._freed:
            raise MisuseError("The address range was freed.")
        if offset % page or nbytes % page or offset < 0 or nbytes < 0:
            raise MisuseError(f"Mappings are whole pages: offset {offset} and {nbytes} bytes, pages of {page} bytes.")
        if offset + nbytes > self.nbytes:
            raise MisuseError(f"The range has {self.nbytes} bytes; offset {offset} and {nbytes} bytes go beyond it.")
        return range(offset // page, (offset + nbytes) // page)


class DeviceMemory:
    """Who has which physical page and which address. frames: physical addresses of all pages, in the order of supply."""

    def __init__(self, page_bytes: int, frames: Sequence[int]) -> None:
        self.page_bytes = page_bytes
        self.total_bytes = len(frames) * page_bytes
        self._frames = list(reversed(frames))
        self._next_device = _FIRST_DEVICE_ADDRESS
        self._next_host = _FIRST_HOST_ADDRESS
        self._slab: _Slab | None = None
        self._starts: list[int] = []
        self._mapped: dict[int, _Mapped] = {}

    # --- supply
    @property
    def free_bytes(self) -> int:
        """Bytes of pages that nobody has."""
        return len(self._frames) * self.page_bytes

    def allocate(self, nbytes: int, tenant: str) -> SimDeviceBuffer:
        _positive(nbytes, "A device allocation")
        room = -(-nbytes // ALIGNMENT) * ALIGNMENT
        slab = self._slab
        if room > self.page_bytes // 2:
            slab = _Slab(self._take(-(-room // self.page_bytes), nbytes, tenant))
        elif slab is None or slab.used + room > self.page_bytes:
            self._slab = slab = _Slab(self._take(1, nbytes, tenant))
        offset, slab.used = slab.used, slab.used + room
        slab.users += 1
        return self._remember(SimDeviceBuffer(self, self._addresses(nbytes, ALIGNMENT), nbytes, slab, offset))

    def allocate_host(self, nbytes: int) -> SimHostBuffer:
        _positive(nbytes, "A host allocation")
        address = self._next_host
        self._next_host += -(-nbytes // _HOST_PAGE) * _HOST_PAGE
        return SimHostBuffer(address, nbytes)

    def create_page(self, tenant: str) -> SimPage:
        return SimPage(self, self._take(1, self.page_bytes, tenant)[0])

    def reserve(self, nbytes: int) -> SimAddressRange:
        _positive(nbytes, "A reservation")
        if nbytes % self.page_bytes:
            raise MisuseError(f"A reservation is whole pages of {self.page_bytes} bytes, not {nbytes} bytes.")
        return self._remember(SimAddressRange(self, self._addresses(nbytes, self.page_bytes), nbytes))

    def give_back(self, frame: int) -> None:
        self._frames.append(frame)

    def leave(self, slab: _Slab) -> None:
        """One allocation less in `slab`."""
        slab.users -= 1
        if not slab.users:
            self._frames.extend(reversed(slab.frames))
            if slab is self._slab:
                self._slab = None

    def _take(self, pages: int, nbytes: int, tenant: str) -> list[int]:
        if pages > len(self._frames):
            who = f"Tenant {tenant!r} asked for" if tenant else "There was a request for"
            raise OutOfMemoryError(
                f"{who} {nbytes} bytes of device memory; {self.free_bytes} are free.",
                requested=nbytes,
                available=self.free_bytes,
                tenant=tenant,
            )
        return [self._frames.pop() for _ in range(pages)]

    def _addresses(self, nbytes: int, alignment: int) -> int:
        address = -(-self._next_device // alignment) * alignment
        self._next_device = address + nbytes + ALIGNMENT  # a gap, so that running over the end is noticed
        return address

    # --- look-up
    def _remember(self, mapped: _T) -> _T:
        bisect.insort(self._starts, mapped.address)
        self._mapped[mapped.address] = mapped
        return mapped

    def forget(self, mapped: _Mapped) -> None:
        del self._mapped[mapped.address]
        del self._starts[bisect.bisect_left(self._starts, mapped.address)]

    def _find(self, address: int, nbytes: int) -> tuple[_Mapped, int]:
        position = bisect.bisect_right(self._starts, address) - 1
        if position >= 0:
            mapped = self._mapped[self._starts[position]]
            offset = address - mapped.address
            if offset + nbytes <= mapped.nbytes and (offset < mapped.nbytes or not nbytes):
                return mapped, offset
        raise MisuseError(f"{nbytes} bytes at device address {address:#x} do not lie within one live allocation.")

    def check(self, address: int, nbytes: int) -> None:
        """MisuseError unless all of it is memory."""
        mapped, offset = self._find(address, nbytes)
        for _ in mapped.stretches(offset, nbytes):
            pass

    def physical(self, addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Physical address of each device address, same shape. MisuseError for what is not memory."""
        pages, where = np.unique(addresses & ~np.int64(ALIGNMENT - 1), return_inverse=True)
        bases = np.empty(len(pages), np.int64)
        for index, page in enumerate(pages.tolist()):
            mapped, offset = self._find(page, 1)
            bases[index] = mapped.physical(offset)
        return bases[where].reshape(addresses.shape) + (addresses & np.int64(ALIGNMENT - 1))

    # --- contents
    def fill(self, address: int, nbytes: int, value: int) -> None:
        for contents, offset, length in self._stretches(address, nbytes):
            if value or contents.touched:
                contents.array[offset : offset + length] = value

    def copy(self, target: int, source: int, nbytes: int) -> None:
        _move(self._stretches(target, nbytes), self._stretches(source, nbytes))

    def write(self, target: int, source: Backing, offset: int, nbytes: int) -> None:
        """Host to device."""
        _move(self._stretches(target, nbytes), iter([(source, offset, nbytes)]))

    def read(self, target: Backing, offset: int, source: int, nbytes: int) -> None:
        """Device to host."""
        _move(iter([(target, offset, nbytes)]), self._stretches(source, nbytes))

    def _stretches(self, address: int, nbytes: int) -> Iterator[Stretch]:
        mapped, offset = self._find(address, nbytes)
        return mapped.stretches(offset, nbytes)


def _move(targets: Iterator[Stretch], sources: Iterator[Stretch]) -> None:
    """Move bytes from one sequence of stretches into another of the same total length."""
    source, source_at, source_left = None, 0, 0
    for target, at, left in targets:
        while left:
            if source is None or not source_left:
                source, source_at, source_left = next(sources)
            length = min(left, source_left)
            if source.touched:
                target.array[at : at + length] = source.array[source_at : source_at + length]
            elif target.touched:
                target.array[at : at + length] = 0
            at, left = at + length, left - length
            source_at, source_left = source_at + length, source_left - length


def _positive(nbytes: int, what: str) -> None:
    if nbytes <= 0:
        raise MisuseError(f"{what} needs at least 1 byte, not {nbytes}.")
