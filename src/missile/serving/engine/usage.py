"""What a tenant's model has used of the GPU and of the host link: taken over from the live engine, which counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from missile.serving.engine.live import LiveEngine

__all__ = ["Usage"]

_SPAN_NS: Final = 100_000_000  # shortest time over which use is averaged


@dataclass(slots=True)
class Usage:
    """sms: on average, over the last span. link: the share of its rate; None where copies are not scheduled. preempted:
    times its blocks were made to leave. cold: times its weights came in from the host. moved: bytes to the device in this
    span. lent_ns: time beside LS requests that could afford it."""

    sms: float = 0.0
    link: float | None = None
    preempted: int = 0
    cold: int = 0
    moved: int = 0
    lent_ns: int = 0
    _since_ns: int = 0
    _sm_ns: int = 0

    def begin(self, now_ns: int) -> None:
        """With a live engine that has counted nothing."""
        self._since_ns, self._sm_ns = now_ns, 0

    def note(self, live: LiveEngine, number: int, hosted_bytes: int, now_ns: int) -> None:
        """Take over what `live` has counted for tenant `number`. hosted_bytes: of its weights that wait on the host."""
        if hosted_bytes:
            cold = live.cold_starts(number)
            self.cold += cold
            self.moved += cold * hosted_bytes
        took = now_ns - self._since_ns
        if took >= _SPAN_NS:
            self.sms = (live.sm_ns[number] - self._sm_ns) / took
            rate = live.link_rate
            self.link = None if rate is None else min(1.0, self.moved / (rate * took * 1e-9))
            self._sm_ns, self._since_ns, self.moved = live.sm_ns[number], now_ns, 0
        self.preempted += live.preemptions[number]
        self.lent_ns += live.lent_ns[number]
        live.preemptions[number] = live.lent_ns[number] = 0
