"""What a CUDA device says about itself. Nothing here is assumed from its name."""

from __future__ import annotations

from typing import Any

from missile.errors import GpuError, UnsupportedError
from missile.gpu.cuda import partitions
from missile.gpu.cuda.driver import Driver
from missile.gpu.interface import GpuInfo, Level

__all__ = ["access_description", "allocation_properties", "describe", "pci_address"]

# cuDevSmResourceSplitByCount with streams of green contexts: CUDA 12.4 brought the first, 12.5 the second.
_GREEN_CONTEXTS_SINCE = 12050


def pci_address(cu: Driver, device: Any) -> str:
    """ "0000:1b:00.0", as sysfs and NVML name it."""
    return str(cu("cuDeviceGetPCIBusId", 32, device).split(b"\0", 1)[0].decode())


def allocation_properties(cu: Driver, device: Any) -> Any:
    """CUmemAllocationProp of a plain physical page on `device`."""
    api = cu.api
    prop = api.CUmemAllocationProp()
    prop.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    prop.location.id = int(device)
    return prop


def access_description(cu: Driver, device: Any) -> Any:
    """CUmemAccessDesc: `device` may read and write."""
    access = cu.api.CUmemAccessDesc()
    access.location.type = cu.api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = int(device)
    access.flags = cu.api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def describe(cu: Driver, device: Any, ordinal: int) -> tuple[GpuInfo, partitions.SmLimits | None]:
    """The device's GpuInfo, and how its SMs can be cut (None where they can't). Needs a current context."""
    api = cu.api

    def attribute(name: str) -> int:
        return int(cu("cuDeviceGetAttribute", getattr(api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

    driver_version = int(cu("cuDriverGetVersion"))
    sms = attribute("MULTIPROCESSOR_COUNT")
    limits: partitions.SmLimits | None = None
    if driver_version >= _GREEN_CONTEXTS_SINCE:
        try:
            limits = partitions.limits(cu, device)
        except (GpuError, UnsupportedError):
            limits = None
    level = Level.CORE
    least, greatest = cu("cuCtxGetStreamPriorityRange")
    if attribute("STREAM_PRIORITIES_SUPPORTED") and least != greatest:
        level = Level.PRIORITIES
        if limits is not None:
            level = Level.PARTITIONS
            if attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"):
                level = Level.MEMORY_LAB
    page = 0
    if attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"):
        granularity = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        page = int(cu("cuMemGetAllocationGranularity", allocation_properties(cu, device), granularity))
    name = cu("cuDeviceGetName", 256, device).split(b"\0", 1)[0].decode()
    address = pci_address(cu, device)
    notes, extra = _management_notes(address)
    extra["pci_address"] = address
    # Two transfers per memory clock; kHz and bits.
    extra["memory_bytes_per_s"] = attribute("MEMORY_CLOCK_RATE") * 2e3 * attribute("GLOBAL_MEMORY_BUS_WIDTH") / 8
    info = GpuInfo(
        name=name,
        device=f"cuda:{ordinal}",
        simulated=False,
        level=level,
        sms=sms,
        l2_bytes=attribute("L2_CACHE_SIZE"),
        memory_bytes=int(cu("cuDeviceTotalMem", device)),
        page_bytes=page,
        sm_granularity=limits.granularity if limits else 0,
        sm_minimum=limits.minimum if limits else 0,
        copy_engines=attribute("ASYNC_ENGINE_COUNT"),
        compute_capability=(attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
        clock_hz=attribute("CLOCK_RATE") * 1e3,
        driver=extra.pop("driver", ""),
        runtime=f"CUDA {driver_version // 1000}.{driver_version % 1000 // 10}",
        uuid="GPU-" + _uuid(cu("cuDeviceGetUuid", device)),
        notes=notes,
        extra=extra,
    )
    return info, limits


def _uuid(native: Any) -> str:
    text = bytes(native.bytes).hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _management_notes(address: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What NVML adds: things that a person should know before trusting a measurement. Empty without nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return ("nvidia-ml-py is not installed: other processes, ECC and MIG were not looked at",), {}
    notes: list[str] = []
    extra: dict[str, Any] = {}
    try:
        pynvml.nvmlInit()
        try:
            _ask(pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(address.encode()), notes, extra)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        notes.append(f"NVML does not answer: {error}")
    return tuple(notes), extra


def _ask(nvml: Any, handle: Any, notes: list[str], extra: dict[str, Any]) -> None:
    import os

    def maybe(call: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, call)(handle, *arguments)
        except nvml.NVMLError:
            return None

    extra["driver"] = str(nvml.nvmlSystemGetDriverVersion())
    if (clock := maybe("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM)) is not None:
        extra["max_sm_clock_mhz"] = int(clock)
    others = [p.pid for p in maybe("nvmlDeviceGetComputeRunningProcesses") or () if p.pid != os.getpid()]
    if others:
        extra["other_processes"] = others
        notes.append(f"{len(others)} other process(es) use this GPU (pid {', '.join(map(str, others))})")
    if (mig := maybe("nvmlDeviceGetMigMode")) is not None and mig[0]:
        notes.append("MIG mode is on: only one instance of this GPU is seen")
    if (ecc := maybe("nvmlDeviceGetEccMode")) is not None:
        extra["ecc"] = bool(ecc[0])
        if not ecc[0]:
            notes.append("ECC is off")
    mode = maybe("nvmlDeviceGetComputeMode")
    if mode not in (None, nvml.NVML_COMPUTEMODE_DEFAULT):
        notes.append("the compute mode is exclusive: one process at a time can use this GPU")
