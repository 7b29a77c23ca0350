"""Which launches the driver is told to let overlap, against a fake driver: no GPU and no bindings needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from missile.gpu.cuda.modules import CudaKernel
from missile.gpu.cuda.streams import CudaEvent, CudaStream
from missile.gpu.interface import Copy, Fill, Launch, Priority


class FakeApi:
    """Notes launches: "full" or "early"; has what a kernel asks for when it is made."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.configs: list[Any] = []

    def cuLaunchKernel(self, *arguments: Any) -> tuple[int]:
        self.launches.append("full")
        return (0,)

    def cuLaunchKernelEx(self, config: Any, *arguments: Any) -> tuple[int]:
        assert [a.id for a in config.attrs] == ["serialization"]
        assert config.numAttrs == config.attrs[0].value.programmaticStreamSerializationAllowed == 1
        self.configs.append(config)
        self.launches.append("early")
        return (0,)

    def cuFuncGetParamInfo(self, *arguments: Any) -> tuple[int, int, int]:
        return 1, 0, 0

    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="serialization")
    CUstreamWaitValue_flags = SimpleNamespace(CU_STREAM_WAIT_VALUE_GEQ=0)

    def CUlaunchConfig(self) -> Any:
        return SimpleNamespace()

    def CUlaunchAttribute(self) -> Any:
        return SimpleNamespace(value=SimpleNamespace())

    def __getattr__(self, name: str) -> Any:
        return FakeApi()  # enumerations


class FakeDriver:
    def __init__(self) -> None:
        self.api = FakeApi()

    def __call__(self, call: str, *arguments: Any) -> int:
        return 0

    def enter(self, call: str) -> None: ...


@pytest.fixture
def cu() -> FakeDriver:
    return FakeDriver()


def launch(cu: FakeDriver, *, overlaps: bool) -> Launch:
    kernel = CudaKernel(cu, 1, "k", "tenant", 1 << 16)  # type: ignore[arg-type]
    return Launch(kernel, (3, 2, 1), (128, 1, 1), overlaps=overlaps)


def stream_of(cu: FakeDriver) -> CudaStream:
    return CudaStream(cu, 7, Priority.LOW, None, lambda _: None)  # type: ignore[arg-type]


def test_the_first_launch_and_those_that_dont_wait_start_as_usual(cu: FakeDriver) -> None:
    stream = stream_of(cu)
    for overlaps in (True, True, False, True):
        stream.launch(launch(cu, overlaps=overlaps))
    assert cu.api.launches == ["full", "early", "full", "early"]
    config = cu.api.configs[0]
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 2, 1)
    assert (config.blockDimX, config.sharedMemBytes, config.hStream) == (128, 0, 7)


def _event(cu: FakeDriver) -> CudaEvent:
    return CudaEvent(cu, None, timing=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "between",
    [
        lambda stream, cu: stream.launch(Fill(0, 8)),
        lambda stream, cu: stream.launch(Copy(0, 8, 8)),
        lambda stream, cu: stream.record(_event(cu)),
        lambda stream, cu: stream.wait(_event(cu)),
        lambda stream, cu: stream.raise_latch(SimpleNamespace(address=0), 1),
        lambda stream, cu: stream.wait_latch(SimpleNamespace(address=0), 1),
    ],
    ids=["fill", "copy", "record", "wait", "raise latch", "wait latch"],
)
def test_a_launch_behind_anything_but_a_launch_starts_as_usual(cu: FakeDriver, between: Any) -> None:
    stream = stream_of(cu)
    stream.launch(launch(cu, overlaps=True))
    between(stream, cu)
    stream.launch(launch(cu, overlaps=True))
    stream.launch(launch(cu, overlaps=True))
    assert cu.api.launches == ["full", "full", "early"]
