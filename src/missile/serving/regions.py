"""System shared memory that clients registered: their tensors are read from it and written to it.

Regions are read and written through their descriptor, never mapped: a client that truncates its region gets an error
instead of taking the server down, and nothing of it stays visible here after it was unregistered.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from missile.serving.access import Principal
from missile.serving.refusal import Reason, Refusal

__all__ = ["Region", "RegionSlice", "Regions"]

_DIRECTORY = "/dev/shm"
_KEY = re.compile(r"/?([A-Za-z0-9_-][A-Za-z0-9._-]{0,200})")
_MOST = 1024  # regions of one principal


@dataclass(slots=True)
class Region:
    """A registered range: `nbytes` from `offset` of the object `key`. Closed when it is unregistered."""

    name: str
    key: str
    offset: int
    nbytes: int
    descriptor: int

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@dataclass(frozen=True, slots=True)
class RegionSlice:
    """`nbytes` at `offset` of a region, for one tensor."""

    region: Region
    offset: int
    nbytes: int

    def read_into(self, target: memoryview) -> None:
        """INVALID when the region is shorter than it was, or has been unregistered."""
        done = 0
        start = self.region.offset + self.offset
        try:
            while done < len(target):
                got = os.preadv(self._descriptor(), [target[done:]], start + done)
                if got == 0:
                    break
                done += got
        except OSError:
            done = -1
        if done != len(target):
            raise Refusal(
                Reason.INVALID, f"Shared memory region {self.region.name!r} is shorter than it was registered."
            )

    def write_from(self, source: memoryview) -> None:
        """INVALID when it can't be written; what lies beyond the region's registered end is never touched."""
        done = 0
        start = self.region.offset + self.offset
        try:
            if os.fstat(self._descriptor()).st_size >= start + len(source):  # else the write would make it longer
                while done < len(source):
                    done += os.pwritev(self._descriptor(), [source[done:]], start + done)
        except OSError:
            done = -1
        if done != len(source):
            raise Refusal(Reason.INVALID, f"Shared memory region {self.region.name!r} can't be written.")

    @contextmanager
    def detached(self) -> Iterator[RegionSlice]:
        """The same bytes through a descriptor of their own: unregistering the region meanwhile takes nothing away."""
        own = replace(self.region, descriptor=os.dup(self._descriptor()))
        try:
            yield RegionSlice(own, self.offset, self.nbytes)
        finally:
            own.close()

    def _descriptor(self) -> int:
        if self.region.descriptor < 0:
            raise Refusal(Reason.INVALID, f"Shared memory region {self.region.name!r} was unregistered.")
        return self.region.descriptor


class Regions:
    """Regions by who registered them and name. `enabled` False: everything but an empty status is UNSUPPORTED."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._regions: dict[tuple[str, str], Region] = {}

    def register(self, principal: Principal, name: str, key: str, offset: int, nbytes: int) -> None:
        """Refusals: INVALID for a bad key, range or object; CONFLICT for a name in use."""
        self._check_enabled()
        match = _KEY.fullmatch(key)
        if not name or len(name) > 256 or match is None:
            raise Refusal(
                Reason.INVALID, "A shared memory region needs a name and a key of letters, digits, '.', '_' and '-'."
            )
        if (principal.key, name) in self._regions:
            raise Refusal(Reason.CONFLICT, f"Shared memory region {name!r} is registered already.")
        if sum(1 for owner, _ in self._regions if owner == principal.key) >= _MOST:
            raise Refusal(Reason.OVERLOADED, f"More than {_MOST} shared memory regions are registered.")
        if offset < 0 or nbytes <= 0:
            raise Refusal(Reason.INVALID, f"Shared memory region {name!r}: offset and byte_size make no range.")
        try:
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(f"{_DIRECTORY}/{match[1]}", flags)
        except OSError:
            raise Refusal(
                Reason.INVALID, f"Shared memory region {name!r}: there is no object {key!r} that this server may use."
            ) from None
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or offset + nbytes > found.st_size:
            os.close(descriptor)
            raise Refusal(
                Reason.INVALID,
                f"Shared memory region {name!r}: {nbytes} bytes from {offset} do not lie in {key!r}, "
                f"which has {found.st_size} bytes.",
            )
        self._regions[principal.key, name] = Region(name, key, offset, nbytes, descriptor)

    def unregister(self, principal: Principal, name: str) -> None:
        """Forget one region, or all of `principal`'s when `name` is empty. Unknown names are no error."""
        self._check_enabled()
        for known in [k for k in self._regions if k[0] == principal.key and name in ("", k[1])]:
            self._regions.pop(known).close()

    def status(self, principal: Principal, name: str = "") -> list[Region]:
        """Those of `principal`. NOT_FOUND for an unknown name."""
        found = [r for (owner, n), r in self._regions.items() if owner == principal.key and name in ("", n)]
        if name and not found:
            raise Refusal(Reason.NOT_FOUND, f"There is no shared memory region {name!r:.80}.")
        return found

    def slice(self, principal: Principal, name: str, offset: int, nbytes: int) -> RegionSlice:
        """A tensor's place. INVALID for an unknown region or a range outside it."""
        self._check_enabled()
        region = self._regions.get((principal.key, name))
        if region is None:
            raise Refusal(Reason.INVALID, f"There is no shared memory region {name!r:.80}.")
        if offset < 0 or nbytes < 0 or offset + nbytes > region.nbytes:
            raise Refusal(
                Reason.INVALID,
                f"{nbytes} bytes from {offset} do not lie in shared memory region {name!r}, "
                f"which has {region.nbytes} bytes.",
            )
        return RegionSlice(region, offset, nbytes)

    def close(self) -> None:
        for region in self._regions.values():
            region.close()
        self._regions.clear()

    def _check_enabled(self) -> None:
        if not self.enabled:
            raise Refusal(Reason.UNSUPPORTED, "Shared memory is turned off on this server.")
