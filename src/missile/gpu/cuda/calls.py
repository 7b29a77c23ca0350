"""The driver's own C functions for copies, for code that runs without Python."""

from __future__ import annotations

import ctypes

from missile.errors import MissileError
from missile.gpu.calls import DriverCalls
from missile.gpu.cuda.driver import Driver
from missile.gpu.cuda.streams import CudaEvent
from missile.gpu.interface import Event

__all__ = ["driver_calls"]


def driver_calls(cu: Driver) -> DriverCalls:
    """Their addresses. The library is the one that the bindings have loaded; the versioned names are its ABI's."""
    library = ctypes.CDLL("libcuda.so.1")

    def address(name: str) -> int:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0

    def failure(call: str, status: int) -> MissileError:
        return cu.failure(call, cu.api.CUresult(status))

    return DriverCalls(
        set_context=address("cuCtxSetCurrent"),
        to_device=address("cuMemcpyHtoDAsync_v2"),
        to_host=address("cuMemcpyDtoHAsync_v2"),
        record=address("cuEventRecord"),
        query=address("cuEventQuery"),
        write=address("cuStreamWriteValue32_v2"),
        context=int(cu.context),
        event_handle=_event_handle,
        failure=failure,
    )


def _event_handle(event: Event) -> int:
    assert isinstance(event, CudaEvent)
    return int(event.handle)
