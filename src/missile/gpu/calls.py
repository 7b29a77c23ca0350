"""What compiled code needs of a GPU's driver to copy without Python: addresses of its functions. Only hardware has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from missile.errors import MissileError
from missile.gpu.interface import Event

__all__ = ["DriverCalls", "HasDriverCalls"]


@dataclass(frozen=True, slots=True)
class DriverCalls:
    """Addresses of C functions that return 0 for success, 600 from `query` while the event has not been reached.

    set_context(context); to_device(target, source, bytes, stream); to_host(target, source, bytes, stream);
    record(event, stream); query(event); write(stream, address, value, 0) of 32 bits on the device, in order.
    context: what set_context takes, once on every thread that calls the others.
    event_handle: what record and query take. failure: the error that a status other than 0 means, as the GPU's own calls
    would raise it.
    """

    set_context: int
    to_device: int
    to_host: int
    record: int
    query: int
    write: int
    context: int
    event_handle: Callable[[Event], int]
    failure: Callable[[str, int], MissileError]


@runtime_checkable
class HasDriverCalls(Protocol):
    """A `Gpu` with a driver below it."""

    def driver_calls(self) -> DriverCalls: ...
