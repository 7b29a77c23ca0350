from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

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
