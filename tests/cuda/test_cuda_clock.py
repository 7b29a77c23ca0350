"""Event times on the host's clock, against a simulated pair of drifting oscillators."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from missile.gpu.cuda.clock import EventClock
from missile.gpu.cuda.driver import Driver


class FakeEvents:
    """Events of a GPU whose clock runs `drift` faster than the host's; records arrive after `delay` ns.

    As in the driver, elapsed times are float32 milliseconds.
    """

    CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0)
    CUresult = SimpleNamespace(CUDA_ERROR_NOT_READY=600)

    def __init__(self, drift: float, delays: list[int]) -> None:
        self.host = 1_000_000_000
        self.drift = drift
        self.delays = delays
        self.reached: dict[int, int] = {}  # host time

    def now(self) -> int:
        self.host += 100
        return self.host

    def cuEventCreate(self, _: int) -> tuple[int, int]:
        self.reached[len(self.reached)] = 0
        return 0, len(self.reached) - 1

    def cuEventRecord(self, event: int, _: object) -> tuple[int]:
        self.delays.append(self.delays.pop(0))
        self.reached[event] = self.host + self.delays[-1]
        return (0,)

    def cuEventQuery(self, event: int) -> tuple[int]:
        self.host += 700
        return (0 if self.host >= self.reached[event] else 600,)

    def cuEventElapsedTime(self, first: int, last: int) -> tuple[int, float]:
        exact = (self.reached[last] - self.reached[first]) * (1 + self.drift) * 1e-6
        return 0, float(np.float32(exact))


@pytest.mark.parametrize("drift", [0.0, 40e-6, -40e-6])
def test_the_error_stays_within_its_bound_for_minutes(drift: float) -> None:
    api = FakeEvents(drift, [3_000, 45_000, 2_000, 9_000])
    clock = EventClock(Driver(api), None, api.now)
    _, event = api.cuEventCreate(0)
    # Drift over one renewal interval, and float32's last digit, come on top of the anchor's own bound.
    allowance = 0.7e9 * abs(drift) + 50
    for _ in range(2_000):
        api.host += 150_000_000
        api.cuEventRecord(event, None)
        api.host += 60_000
        error = abs(clock.host_ns(event) - api.reached[event])
        assert error <= clock.error_ns + allowance
    assert clock.error_ns <= 5_000
