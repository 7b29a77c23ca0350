"""Device code: modules, their kernels, and the cheapest launch that Python allows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from missile.errors import GpuError, MisuseError
from missile.gpu.cuda.driver import Driver
from missile.gpu.interface import Launch

__all__ = ["CudaKernel", "CudaModule"]

_LOG_BYTES = 16 << 10
_MAX_PARAMETERS = 4096
_KEPT_ARGUMENTS = 4096
_BAD_IMAGES = frozenset({"CUDA_ERROR_INVALID_PTX", "CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_INVALID_SOURCE"})


class _Arguments:
    """A kernel's arguments in memory of their own, and the array of pointers to them whose `address` a launch takes.

    Holds `params`, so that no other tuple can get its id. The driver copies the arguments before a launch returns.
    """

    __slots__ = ("_pointers", "_values", "address", "params")

    def __init__(self, params: tuple[bytes, ...]) -> None:
        self.params = params
        self._values = [ctypes.create_string_buffer(value, max(len(value), 1)) for value in params]
        self._pointers = (ctypes.c_void_p * len(params))(*map(ctypes.addressof, self._values))
        self.address = ctypes.addressof(self._pointers) if params else 0


class CudaKernel:
    """A CUfunction with its parameter layout. Arguments are packed once and used again while their tuple is."""

    def __init__(self, cu: Driver, function: Any, name: str, tenant: str, shared_limit: int) -> None:
        attribute = cu.api.CUfunction_attribute
        self._cu = cu
        self._function = function
        self._name = name
        self._shared_limit = shared_limit
        self._shared_allowed = cu(
            "cuFuncGetAttribute", attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, function
        )
        self._static_shared = cu("cuFuncGetAttribute", attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
        self._registers = cu("cuFuncGetAttribute", attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function)
        self._max_threads = cu("cuFuncGetAttribute", attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function)
        self.tenant = tenant
        self._launch = cu.api.cuLaunchKernel
        layout = _parameters(cu, function)
        self._sizes = [size for _, size in layout]
        self._packed: dict[int, _Arguments] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def registers(self) -> int:
        return int(self._registers)

    @property
    def largest_shared_bytes(self) -> int:
        """The most dynamic shared memory that a launch may ask for, bytes."""
        return int(self._shared_limit - self._static_shared)

    def blocks_per_sm(self, threads: int, shared_bytes: int) -> int:
        self._allow_shared(shared_bytes)
        return int(self._cu("cuOccupancyMaxActiveBlocksPerMultiprocessor", self._function, threads, shared_bytes))

    def launch(self, stream: Any, launch: Launch, *, early: bool = False) -> None:
        """Enqueue `launch`, whose kernel this is, on the CUstream `stream`.

        early: it may start while the kernel before it runs, as soon as all blocks of that allow it (a dependent launch).
        """
        cu = self._cu
        cu.enter("cuLaunchKernel")
        params, shared = launch.params, launch.shared_bytes
        packed = self._packed.get(id(params))
        if packed is None or packed.params is not params:
            packed = self._pack(params)
        if shared > self._shared_allowed:
            self._allow_shared(shared)
        if early:
            (status,) = cu.api.cuLaunchKernelEx(self._early(stream, launch), self._function, packed.address, 0)
        else:
            (status,) = self._launch(self._function, *launch.grid, *launch.block, shared, stream, packed.address, 0)
        if status:
            raise self._refusal(status, launch)

    def _early(self, stream: Any, launch: Launch) -> Any:
        """The configuration of a dependent launch."""
        api = self._cu.api
        attribute = api.CUlaunchAttribute()
        attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block
        config.sharedMemBytes = launch.shared_bytes
        config.hStream = stream
        config.attrs = [attribute]
        config.numAttrs = 1
        return config

    def _pack(self, params: tuple[bytes, ...]) -> _Arguments:
        """The arguments as the driver wants them, kept for the next launch with the same tuple."""
        if [len(value) for value in params] != self._sizes:
            raise MisuseError(
                f"Kernel {self._name!r} takes arguments of {self._sizes} bytes, not {[len(p) for p in params]}."
            )
        if len(self._packed) >= _KEPT_ARGUMENTS:
            self._packed.clear()
        packed = self._packed[id(params)] = _Arguments(params)
        return packed

    def _allow_shared(self, nbytes: int) -> None:
        if nbytes <= self._shared_allowed:
            return
        if nbytes > self.largest_shared_bytes:
            raise MisuseError(
                f"Kernel {self._name!r} asks for {nbytes} bytes of shared memory; at most {self.largest_shared_bytes} fit."
            )
        attribute = self._cu.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._cu("cuFuncSetAttribute", self._function, attribute, nbytes)
        self._shared_allowed = nbytes

    def _refusal(self, status: Any, launch: Launch) -> Exception:
        if status.name == "CUDA_ERROR_INVALID_VALUE":
            return MisuseError(
                f"Kernel {self._name!r} can't be launched with grid {launch.grid}, block {launch.block} "
                f"(at most {self._max_threads} threads) and {launch.shared_bytes} bytes of shared memory."
            )
        return self._cu.failure("cuLaunchKernel", status, tenant=self.tenant, detail=f"kernel {self._name}")


class CudaModule:
    """A CUmodule. `name` is "TENANT" or "TENANT/WHAT": errors name the part before the slash as the tenant."""

    def __init__(
        self,
        cu: Driver,
        image: bytes,
        name: str,
        shared_limit: int,
        on_close: Callable[[object], None] = lambda _: None,
    ) -> None:
        self._cu = cu
        self._on_close = on_close
        self._name = name
        self._shared_limit = shared_limit
        self._kernels: dict[str, CudaKernel] = {}
        self._native: Any = _load(cu, image, name)

    def kernel(self, name: str) -> CudaKernel:
        if (known := self._kernels.get(name)) is not None:
            return known
        try:
            function = self._cu("cuModuleGetFunction", self._native, name.encode())
        except GpuError as error:
            if error.code != "CUDA_ERROR_NOT_FOUND":
                raise
            raise MisuseError(
                f"Module {self._name!r} has no kernel {name!r}; it has: {', '.join(self._names()) or 'none'}."
            ) from None
        self._cu("cuFuncLoad", function)  # else the first launch would load it, and wait for the GPU to do so
        kernel = CudaKernel(self._cu, function, name, self._name.partition("/")[0], self._shared_limit)
        self._kernels[name] = kernel
        return kernel

    def close(self) -> None:
        if self._native is not None:
            native, self._native = self._native, None
            self._on_close(self)
            self._kernels.clear()
            self._cu.release("cuModuleUnload", native)

    def _names(self) -> list[str]:
        count = self._cu("cuModuleGetFunctionCount", self._native)
        if not count:
            return []
        functions = self._cu("cuModuleEnumerateFunctions", count, self._native)
        return sorted(self._cu("cuFuncGetName", function).decode() for function in functions)


def _load(cu: Driver, image: bytes, name: str) -> Any:
    option = cu.api.CUjit_option
    log = bytearray(_LOG_BYTES)
    cu.enter("cuModuleLoadDataEx")
    status, module = cu.api.cuModuleLoadDataEx(
        image if image.startswith(b"\x7fELF") else image.rstrip(b"\0") + b"\0",  # PTX is a C string to the driver
        2,
        [option.CU_JIT_ERROR_LOG_BUFFER, option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES],
        [log, len(log)],
    )
    if not status:
        return module
    said = log.split(b"\0", 1)[0].decode(errors="replace").strip()
    if status.name in _BAD_IMAGES:
        raise MisuseError(
            f"Module {name!r} can't be loaded ({status.name}): {said or 'it is neither PTX nor a cubin'}."
        )
    raise cu.failure("cuModuleLoadDataEx", status, tenant=name.partition("/")[0], detail=said)


def _parameters(cu: Driver, function: Any) -> list[tuple[int, int]]:
    """(offset, size) of each parameter, bytes. The driver has no count: it refuses the first index past the end."""
    layout: list[tuple[int, int]] = []
    while len(layout) < _MAX_PARAMETERS:
        status, offset, size = cu.api.cuFuncGetParamInfo(function, len(layout))
        if status:
            break
        layout.append((int(offset), int(size)))
    return layout
