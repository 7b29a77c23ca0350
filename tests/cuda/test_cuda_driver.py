"""The checker over the CUDA driver, against a fake driver: no GPU and no bindings needed."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from missile.errors import GpuError, KernelFaultError, MissileError, OutOfMemoryError, UnsupportedError
from missile.gpu.cuda import driver
from missile.gpu.cuda.driver import Driver, classify


class Status(int):
    """Like the bindings' CUresult: an int that is zero on success, with a name."""

    name: str

    def __new__(cls, name: str) -> Status:
        status = super().__new__(cls, 0 if name == "CUDA_SUCCESS" else 1)
        status.name = name
        return status


class FakeApi:
    """Answers every call with what was scripted for it (success, and the arguments, otherwise)."""

    def __init__(self, **script: str) -> None:
        self.script = script
        self.calls: list[str] = []

    def __getattr__(self, call: str):  # type: ignore[no-untyped-def]
        def answer(*arguments: object) -> tuple[object, ...]:
            self.calls.append(call)
            return (Status(self.script.get(call, "CUDA_SUCCESS")), *arguments)

        return answer


@pytest.mark.parametrize(
    ("code", "kind", "usable"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", OutOfMemoryError, None),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", KernelFaultError, "nothing"),
        ("CUDA_ERROR_LAUNCH_FAILED", KernelFaultError, "nothing"),
        ("CUDA_ERROR_ILLEGAL_INSTRUCTION", KernelFaultError, "nothing"),
        ("CUDA_ERROR_MISALIGNED_ADDRESS", KernelFaultError, "nothing"),
        ("CUDA_ERROR_ASSERT", KernelFaultError, "nothing"),
        ("CUDA_ERROR_ECC_UNCORRECTABLE", GpuError, "nothing"),
        ("CUDA_ERROR_INVALID_VALUE", GpuError, "gpu"),
        ("CUDA_ERROR_NOT_SUPPORTED", UnsupportedError, None),
        ("CUDA_ERROR_NO_BINARY_FOR_GPU", UnsupportedError, None),
    ],
)
def test_a_status_means_one_kind_of_error(code: str, kind: type[MissileError], usable: str | None) -> None:
    error = classify("cuSomething", code, tenant="resnet34")
    assert type(error) is kind
    assert "cuSomething" in str(error)
    assert "\n" not in str(error)
    if usable is not None:
        assert isinstance(error, GpuError)
        assert (error.usable, error.call, error.code, error.tenant) == (usable, "cuSomething", code, "resnet34")


def test_values_come_back_as_the_driver_returns_them() -> None:
    cu = Driver(FakeApi())
    assert cu("cuNothing") is None
    assert cu("cuOne", 7) == 7
    assert cu("cuTwo", 7, 8) == (7, 8)


def test_a_refused_call_leaves_the_gpu_usable() -> None:
    cu = Driver(FakeApi(cuMemAlloc="CUDA_ERROR_OUT_OF_MEMORY", cuBad="CUDA_ERROR_INVALID_VALUE"))
    with pytest.raises(OutOfMemoryError) as raised:
        cu("cuMemAlloc", 1 << 40, tenant="bert")
    assert raised.value.tenant == "bert"
    with pytest.raises(GpuError, match="stays usable"):
        cu("cuBad")
    assert cu.lost is None
    assert cu("cuGood", 1) == 1


def test_a_fault_is_remembered_and_nothing_is_asked_of_the_driver_again() -> None:
    api = FakeApi(cuStreamQuery="CUDA_ERROR_ILLEGAL_ADDRESS")
    cu = Driver(api, lambda: ("resnet152",))
    with pytest.raises(KernelFaultError) as first:
        cu("cuStreamQuery")
    before = list(api.calls)
    with pytest.raises(KernelFaultError) as later:
        cu("cuMemAlloc", 4, tenant="bert")
    cu.release("cuMemFree", 4)
    assert api.calls == before
    assert first.value.tenant == later.value.tenant == "resnet152"
    assert later.value.call == "cuMemAlloc"
    assert "cuStreamQuery met this before" in str(later.value)
    assert cu.lost is first.value


def test_a_fault_names_every_suspect_when_several_tenants_were_running() -> None:
    cu = Driver(FakeApi(cuEventQuery="CUDA_ERROR_LAUNCH_FAILED"), lambda: ("a", "b"))
    with pytest.raises(KernelFaultError, match="one of 'a', 'b'") as raised:
        cu("cuEventQuery", tenant="c")
    assert raised.value.tenant == ""


def test_the_caller_is_not_blamed_for_anothers_fault() -> None:
    cu = Driver(FakeApi(cuMemcpyHtoDAsync="CUDA_ERROR_ILLEGAL_ADDRESS"), lambda: ("guilty",))
    with pytest.raises(KernelFaultError) as raised:
        cu("cuMemcpyHtoDAsync", tenant="caller")
    assert raised.value.tenant == "guilty"


def test_the_context_is_made_current_once_per_thread() -> None:
    api = FakeApi()
    cu = Driver(api)
    cu.context = object()
    cu("cuOne", 1)
    cu("cuOne", 1)
    worker = threading.Thread(target=lambda: cu("cuOne", 1))
    worker.start()
    worker.join()
    assert api.calls == ["cuCtxSetCurrent", "cuOne", "cuOne", "cuCtxSetCurrent", "cuOne"]


def _bindings(init: str, count: int = 1) -> SimpleNamespace:
    return SimpleNamespace(cuInit=lambda _: (Status(init),), cuDeviceGetCount=lambda: (Status("CUDA_SUCCESS"), count))


def test_why_unavailable_gives_one_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_bindings() -> None:
        raise ModuleNotFoundError("No module named 'cuda'")

    def no_driver(_: int) -> None:
        raise RuntimeError("libcuda.so.1 not found")

    monkeypatch.setattr(driver, "_import", no_bindings)
    assert "bindings are not installed" in (driver.why_unavailable() or "")
    monkeypatch.setattr(driver, "_import", lambda: SimpleNamespace(cuInit=no_driver))
    assert driver.why_unavailable() == "no NVIDIA driver was found"
    monkeypatch.setattr(driver, "_import", lambda: _bindings("CUDA_ERROR_NO_DEVICE"))
    assert driver.why_unavailable() == "the NVIDIA driver found no GPU"
    monkeypatch.setattr(driver, "_import", lambda: _bindings("CUDA_SUCCESS", 0))
    assert driver.why_unavailable() == "the NVIDIA driver found no GPU"
    monkeypatch.setattr(driver, "_import", lambda: _bindings("CUDA_ERROR_SYSTEM_NOT_READY"))
    assert "CUDA_ERROR_SYSTEM_NOT_READY" in (driver.why_unavailable() or "")
    with pytest.raises(UnsupportedError, match="No CUDA GPU can be used"):
        driver.load()
    monkeypatch.setattr(driver, "_import", lambda: _bindings("CUDA_SUCCESS"))
    assert driver.why_unavailable() is None
