from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest

from missile.errors import GpuError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.runtime.tenant import Tenant


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h100", seed=1) as opened:
        yield opened


@pytest.fixture
def tenant() -> Callable[..., Tenant]:
    """A tenant from few words: `tenant("a", "LS", rate=300)`; without a rate, a closed loop."""

    def make(name: str, kind: str = "BE", model: str = "synthetic-tiny", rate: float = 0, **more: Any) -> Tenant:
        arrivals = {"kind": "poisson", "rate_per_s": rate} if rate else {"kind": "closed"}
        return Tenant.model_validate({"name": name, "class": kind, "model": model, "arrivals": arrivals, **more})

    return make


@pytest.fixture
def fail_copy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Make copy number `number` to the device fail, of those from `sources` (None: from anywhere): `fail_copy(gpu, 60)`.
    What comes back are the sources of all so far."""

    def fail(gpu: Gpu, number: int, sources: Collection[Any] | None = None) -> list[Any]:
        kind: Any = type(gpu.create_stream())
        whole, seen = kind.copy_to_device, []

        def copy(stream: Any, target: int, source: Any, **more: Any) -> None:
            counts = sources is None or any(source is one for one in sources)
            if counts:
                seen.append(source)
            if counts and len(seen) == number:
                raise GpuError("cuMemcpyHtoDAsync", "CUDA_ERROR_INVALID_VALUE")
            whole(stream, target, source, **more)

        monkeypatch.setattr(kind, "copy_to_device", copy)
        return seen

    return fail
