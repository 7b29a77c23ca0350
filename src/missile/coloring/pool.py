"""The colored pool: physical pages that several tenants share, each seeing the frames of its own colors only.

A page can be mapped more than once, so each tenant has a range of addresses of its own in which the pages lie in the
order that its translation wants. What a tenant may touch in them is a matter of its kernels' translation.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from missile.coloring.shape import LOGICAL_BASE, WINDOW, Escape, Form
from missile.coloring.shares import Share
from missile.coloring.translation import PairTranslation, ShadowTranslation, StepTranslation, Translation
from missile.errors import MisuseError, OutOfMemoryError
from missile.gpu.interface import AddressRange, DeviceBuffer, Fill, Gpu, PhysicalPage

__all__ = ["ColoredBuffer", "ColoredPool", "TenantMemory"]

_ALIGNMENT = 512  # of buffers in logical memory, bytes


class ColoredPool:
    """Pages of `gpu`, `count` at first. Owns them and every tenant's mappings, until `close`. Not thread-safe.

    addresses: where each page can be measured, for `ChannelMap.classify`: valid until `close`.
    """

    def __init__(self, gpu: Gpu, count: int) -> None:
        if count < 1:
            raise MisuseError(f"A pool of {count} pages holds nothing.")
        self._gpu = gpu
        self._pages: list[PhysicalPage] = []
        self._tenants: dict[str, TenantMemory] = {}
        self._windows: list[AddressRange] = []
        self.addresses = np.empty(0, np.int64)
        try:
            self.grow(count)
        except BaseException:
            self.close()
            raise

    @property
    def page_count(self) -> int:
        return len(self._pages)

    def grow(self, count: int) -> None:
        """Add `count` pages behind the others. OutOfMemoryError leaves the pool as it was."""
        page_bytes = self._gpu.info.page_bytes
        fresh: list[PhysicalPage] = []
        with ExitStack() as undo:
            for _ in range(count):
                fresh.append(self._gpu.create_page())
                undo.callback(fresh[-1].release)
            window = self._gpu.reserve(count * page_bytes)
            undo.callback(window.free)
            window.map(0, fresh)
            undo.pop_all()
        self._pages += fresh
        self._windows.append(window)
        where = window.address + np.arange(count, dtype=np.int64) * page_bytes
        self.addresses = np.concatenate([self.addresses, where])

    def attach(self, share: Share, *, quota: int | None = None) -> TenantMemory:
        """Map `share`'s pages for its tenant and bring its table to the GPU. quota: bytes it may hold (None: all it has).

        MisuseError when the tenant is there already, the share is of another pool, or it takes memory that a tenant has.
        Nothing is left behind by an error.
        """
        if share.tenant in self._tenants:
            raise MisuseError(f"Tenant {share.tenant!r} has colored memory already.")
        if not share.pages or max(share.pages) >= len(self._pages):
            raise MisuseError(f"The share of tenant {share.tenant!r} names pages that this pool does not have.")
        for memory in self._tenants.values():
            memory.check_apart(share)
        with ExitStack() as undo:
            wide = share.translation.shape.wide
            span = self._gpu.reserve(len(share.pages) * self._gpu.info.page_bytes + (0 if wide else WINDOW))
            undo.callback(span.free)
            start = 0 if wide else -span.address % WINDOW
            span.map(start, [self._pages[number] for number in share.pages])
            owned: list[DeviceBuffer] = []
            table = self._upload(share.translation, share.tenant, owned, undo)
            escapes = 0
            if share.translation.shape.escape is Escape.COUNT:
                owned.append(self._gpu.allocate(8, tenant=share.tenant))
                undo.callback(owned[-1].free)
                escapes = owned[-1].address
                self._zero(escapes, 8)
            memory = TenantMemory(self, share, span, start, tuple(owned), table, escapes, quota)
            undo.pop_all()
        self._tenants[share.tenant] = memory
        return memory

    def held(self) -> dict[str, int]:
        """Bytes of buffers that each attached tenant holds."""
        return {name: memory.in_use for name, memory in self._tenants.items()}

    def close(self) -> None:
        """Take every tenant's mappings away and give the pages back. Idempotent. No work uses them any more."""
        for memory in list(self._tenants.values()):
            memory.close()
        for window in self._windows:
            window.free()
        for page in self._pages:
            page.release()
        self._windows, self._pages = [], []

    def __enter__(self) -> ColoredPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _forget(self, tenant: str) -> None:
        self._tenants.pop(tenant, None)

    def _upload(self, translation: Translation, tenant: str, owned: list[DeviceBuffer], undo: ExitStack) -> int:
        """Address of the translation's table in memory of its own; 0 where it has none."""
        table = translation.table()
        if not table.size:
            return 0
        buffer = self._gpu.allocate(table.nbytes, tenant=tenant)
        undo.callback(buffer.free)
        owned.append(buffer)
        staging = self._gpu.allocate_host(table.nbytes, tenant=tenant)
        try:
            staging.array[:] = table.view(np.uint8).reshape(-1)
            stream = self._gpu.create_stream()
            try:
                stream.copy_to_device(buffer.address, staging)
                stream.synchronize()
            finally:
                stream.close()
        finally:
            staging.free()
        return buffer.address

    def _zero(self, address: int, nbytes: int) -> None:
        stream = self._gpu.create_stream()
        try:
            stream.launch(Fill(address, nbytes))
            stream.synchronize()
        finally:
            stream.close()


class ColoredBuffer:
    """A range of a tenant's logical memory. `address` means something to kernels bound to the tenant only."""

    def __init__(self, memory: TenantMemory, offset: int, nbytes: int) -> None:
        self._memory: TenantMemory | None = memory
        self._offset = offset
        self.nbytes = nbytes

    @property
    def address(self) -> int:
        return LOGICAL_BASE + self._offset

    def free(self) -> None:
        if self._memory is not None:
            memory, self._memory = self._memory, None
            memory._give_back(self._offset, self.nbytes)


class TenantMemory:
    """One tenant's colored memory. Created by `ColoredPool.attach`; an allocator of logical addresses.

    constants: the last parameter of every launch of the tenant's colored kernels, by value. escapes: address of the counter
    of accesses outside its memory, 0 where they are not counted.
    """

    def __init__(
        self,
        pool: ColoredPool,
        share: Share,
        span: AddressRange,
        start: int,
        owned: tuple[DeviceBuffer, ...],
        table: int,
        escapes: int,
        quota: int | None,
    ) -> None:
        self._pool = pool
        self._share = share
        self._span: AddressRange | None = span
        self._owned = owned
        self._limit = min(share.nbytes, share.nbytes if quota is None else quota)
        self._free: list[tuple[int, int]] = [
            (share.translation.shape.head_bytes, share.nbytes // _ALIGNMENT * _ALIGNMENT)
        ]
        self.base = span.address + start
        self.escapes = escapes
        self.constants = share.translation.constants(self.base, table=table, escapes=escapes)
        self._shadow: bytes | None = None
        self.in_use = 0

    @property
    def tenant(self) -> str:
        return self._share.tenant

    @property
    def colors(self) -> tuple[int, ...]:
        """Of the channel map."""
        return self._share.colors

    @property
    def translation(self) -> Translation:
        return self._share.translation

    @property
    def limit(self) -> int:
        """Bytes that the tenant may hold."""
        return self._limit

    @property
    def table_bytes(self) -> int:
        """What the translation takes beside the tenant's own memory: its table in global memory."""
        return sum(buffer.nbytes for buffer in self._owned)

    def shadow(self) -> bytes:
        """`constants` for kernels of another form that translate as this memory does: they have an entry for every frame
        (`compiler.colored.shadow_shape`).

        The table is made, and brought to the GPU, when it is first asked for; it stays until `close`.
        """
        if self._span is None:
            raise MisuseError(f"The colored memory of tenant {self.tenant!r} was given back.")
        if self._shadow is None:
            this = self.translation
            same: Translation = (
                StepTranslation.of(this) if isinstance(this, PairTranslation) else ShadowTranslation.of(this)
            )
            owned: list[DeviceBuffer] = []
            with ExitStack() as undo:
                table = self._pool._upload(same, self.tenant, owned, undo)
                undo.pop_all()
            self._owned = (*self._owned, *owned)
            self._shadow = same.constants(self.base, table=table, escapes=self.escapes)
        return self._shadow

    def check_apart(self, other: Share) -> None:
        """MisuseError when `other` takes memory of this tenant: shares that were not planned together may."""
        mine = self._share
        if set(mine.pages).isdisjoint(other.pages):
            return
        mixed = (mine.translation.shape.form is Form.PAIR) != (other.translation.shape.form is Form.PAIR)
        if mixed or set(mine.colors) & set(other.colors):
            raise MisuseError(
                f"The shares of tenants {mine.tenant!r} and {other.tenant!r} overlap: they have to be planned together."
            )

    def allocate(self, nbytes: int, *, tenant: str = "") -> ColoredBuffer:
        """Logical memory for the tenant, aligned to 512 bytes. OutOfMemoryError saying how much is missing."""
        if self._span is None:
            raise MisuseError(f"The colored memory of tenant {self.tenant!r} was given back.")
        if nbytes < 1:
            raise MisuseError(f"Can't allocate {nbytes} bytes.")
        if tenant not in ("", self.tenant):
            raise MisuseError(f"Tenant {tenant!r} can't have memory of tenant {self.tenant!r}.")
        room = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        place = next((index for index, (_, size) in enumerate(self._free) if size >= room), None)
        if place is None or self.in_use + nbytes > self._limit:
            left = max(0, min(self._limit - self.in_use, max((size for _, size in self._free), default=0)))
            raise OutOfMemoryError(
                f"Tenant {self.tenant!r} asked for {nbytes} bytes of colored memory; {left} are left of {self._limit}, "
                f"{nbytes - left} are missing.",
                requested=nbytes,
                available=left,
                tenant=self.tenant,
            )
        offset, size = self._free[place]
        if size == room:
            del self._free[place]
        else:
            self._free[place] = (offset + room, size - room)
        self.in_use += nbytes
        return ColoredBuffer(self, offset, nbytes)

    def _give_back(self, offset: int, nbytes: int) -> None:
        """Take a buffer's place back, joined with free places beside it."""
        self.in_use -= nbytes
        room = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        merged: list[tuple[int, int]] = []
        for start, size in sorted([*self._free, (offset, room)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self._free = merged

    def close(self) -> None:
        """Unmap the tenant's pages and free its table. Idempotent."""
        if self._span is not None:
            span, self._span = self._span, None
            span.free()
            for buffer in self._owned:
                buffer.free()
            self._pool._forget(self.tenant)
