"""Where the weights of tenants with residency "host" go on the device while they are there: one budget for all of them."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Final

from missile.errors import MisuseError
from missile.gpu.interface import DeviceBuffer, Gpu

__all__ = ["SwapSpace", "choose_place"]

_ALIGNMENT: Final = 1 << 20


def choose_place(taken: Collection[tuple[int, int]], nbytes: int, budget: int) -> int:
    """The offset in `budget` bytes at which `nbytes`, no more than that, displace least of what is there, the lowest such.
    Pure.

    taken: (offset, bytes) of the others, which may overlap each other: whoever runs displaces those whom it overlaps, and
    displaced weights come in again whole.
    """
    # From any other place one can move down to one of these, and meet nobody new.
    ends = {0} | {-(-(offset + size) // _ALIGNMENT) * _ALIGNMENT for offset, size in taken}

    def displaced(at: int) -> int:
        return sum(size for offset, size in taken if at < offset + size and offset < at + nbytes)

    return min((at for at in ends if at + nbytes <= budget), key=lambda at: (displaced(at), at))


class SwapSpace:
    """Device memory of `budget` bytes, held while there are tenants in it. Belongs to the engine's thread.

    setting: what the user calls the budget, in MiB; for messages.
    """

    def __init__(self, gpu: Gpu, budget: int, *, setting: str) -> None:
        self._gpu = gpu
        self._budget = budget
        self._setting = setting
        self._memory: DeviceBuffer | None = None
        self._taken: dict[int, tuple[int, int]] = {}
        self._next = 0

    def take(self, nbytes: int, tenant: str, undo: ExitStack) -> int:
        """A device address for `nbytes` of a tenant's weights, until `undo`. MisuseError when they are larger than the
        budget or there is none, OutOfMemoryError."""
        if not self._budget:
            raise MisuseError(
                f"Tenant {tenant!r}: residency = host needs {self._setting}, the device memory for such weights."
            )
        if nbytes > self._budget:
            raise MisuseError(
                f"Tenant {tenant!r} has {-(-nbytes >> 20)} MiB of weights on the host and {self._setting} is "
                f"{self._budget >> 20}."
            )
        if self._memory is None:
            self._memory = self._gpu.allocate(self._budget, tenant="swap")
        offset = choose_place(self._taken.values(), nbytes, self._budget)
        self._next += 1
        self._taken[self._next] = (offset, nbytes)
        undo.callback(self._give_back, self._next)
        return self._memory.address + offset

    def _give_back(self, number: int) -> None:
        del self._taken[number]
        if not self._taken and self._memory is not None:
            memory, self._memory = self._memory, None
            memory.free()
