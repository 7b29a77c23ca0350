"""`missile pcie`'s measurements in one piece: the link, four ways to copy side by side, and shares by weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from missile.gpu.interface import Gpu
from missile.pcie.direct import Copier, Direct, DirectCopier
from missile.pcie.engine import CopyEngine, EngineOptions
from missile.pcie.link import LinkProfile, choose_options, measure_link
from missile.pcie.load import Bulk, LoadResult, Requests, Source, run_load
from missile.pcie.summary import latency_summary, share_deviation
from missile.pcie.ticket import Direction
from missile.pcie.weights import MIB, Share, nice_weight

__all__ = ["SCHEDULER", "SHARE_CASES", "Plan", "Report", "measure"]

SCHEDULER = "missile"

SHARE_CASES: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("1:1", (1, 1)),
    ("1:2:4", (1, 2, 4)),
    ("1:10", (1, 10)),
    ("nice 0:5", (nice_weight(0), nice_weight(5))),
)

_SMALL, _LARGE = "ls 4 KiB", "ls 1 MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long, in seconds of the GPU's clock, and how much. rate: LS copies per second, of each size."""

    compare_s: float
    shares_s: float
    rate: float = 300.0
    bulk_bytes: int = 256 * MIB
    bulk_tenants: int = 3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured. compared: by way of copying, to the device; to_host: the scheduler, the other way; shares: by
    weights. In these a loop in Python that never sleeps makes the copies (`Source.SPINNING`). native_source: what the
    scheduler does to copies that a loop in C submits, "alone", "beside", "alone to host" and "to host"; empty unless
    native: the scheduler's hot loop was compiled code. `as_dict` is what the JSON holds."""

    link: LinkProfile
    options: EngineOptions
    plan: Plan
    compared: dict[str, LoadResult]
    alone: LoadResult
    to_host: LoadResult
    native_source: dict[str, LoadResult]
    native: bool
    shares: dict[str, tuple[dict[str, float], LoadResult]]

    def as_dict(self) -> dict[str, Any]:
        granularity = self.options.granularity
        link = self.link.as_dict()
        return {
            "device": self.link.device,
            "gpu": self.link.gpu,
            "simulated": self.link.simulated,
            "link": link,
            "chosen": {
                "solo_bytes": granularity.solo,
                "shared_bytes": granularity.shared,
                "short_bytes": granularity.short,
                "depth": self.options.depth,
                "ahead_bytes": self.options.ahead if self.native else 0,
                "native": self.native,
                "bypass_bytes": {"h2d": self.options.h2d_bypass, "d2h": self.options.d2h_bypass},
            },
            "compared": {name: _compared(result) for name, result in self.compared.items()},
            "alone": _compared(self.alone),
            "to_host": _compared(self.to_host, Direction.D2H),
            "native_source": {
                name: _compared(result, Direction.D2H if name.endswith("host") else Direction.H2D)
                for name, result in self.native_source.items()
            },
            "shares": {name: share_deviation(result, weights) for name, (weights, result) in self.shares.items()},
        }


def measure(gpu: Gpu, plan: Plan, *, progress: Callable[[str], None] | None = None) -> Report:
    """Measure everything. Blocks for about 6 x `compare_s` (10 with a hot loop in C) + 4 x `shares_s`, and a second more."""
    say = progress or (lambda _: None)
    say("raw link")
    link = measure_link(gpu)
    options = choose_options(link)
    requests = [
        Requests(name=_LARGE, nbytes=MIB, rate=plan.rate),
        Requests(name=_SMALL, nbytes=4 << 10, rate=plan.rate),
    ]
    bulk = [Bulk(name=f"bulk {index + 1}", nbytes=plan.bulk_bytes) for index in range(plan.bulk_tenants)]

    def run(
        copier: Copier,
        bulk: Sequence[Bulk],
        requests: Sequence[Requests],
        seconds: float = plan.compare_s,
        source: Source = Source.SPINNING,
    ) -> LoadResult:
        return run_load(gpu, copier, bulk, requests, duration_s=seconds, seed=plan.seed, source=source)

    back = (Direction.D2H,)
    bulk_back = [replace(tenant, directions=back) for tenant in bulk]
    requests_back = [replace(tenant, direction=Direction.D2H) for tenant in requests]
    say("latency-sensitive copies alone")
    engine = CopyEngine(gpu, options)
    native = engine.native
    alone = run(engine, [], requests)
    compared = {}
    for how in Direct:
        say(f"beside bulk copies: {how}")
        compared[how.value] = run(DirectCopier(gpu, how), bulk, requests)
    say(f"beside bulk copies: {SCHEDULER}")
    compared[SCHEDULER] = run(CopyEngine(gpu, options), bulk, requests)
    say(f"beside bulk copies to the host: {SCHEDULER}")
    to_host = run(CopyEngine(gpu, options), bulk_back, requests_back)
    native_source = {}
    if native:
        cases: dict[str, tuple[Sequence[Bulk], Sequence[Requests]]] = {
            "alone": ([], requests),
            "beside": (bulk, requests),
            "alone to host": ([], requests_back),
            "to host": (bulk_back, requests_back),
        }
        for name, (others, mine) in cases.items():
            say(f"copies from a loop in C: {name}")
            native_source[name] = run(CopyEngine(gpu, options), others, mine, source=Source.NATIVE)
    shares = {}
    for case, weights in SHARE_CASES:
        say(f"shares {case}")
        named = {f"tenant {index + 1}": weight for index, weight in enumerate(weights)}
        tenants = [Bulk(name=name, share=Share(weight=weight), nbytes=64 * MIB) for name, weight in named.items()]
        quiet = run(CopyEngine(gpu, options), tenants, [], plan.shares_s, Source.SLEEPING)
        shares[case] = (named, quiet)
    return Report(link, options, plan, compared, alone, to_host, native_source, native, shares)


def _compared(result: LoadResult, direction: Direction = Direction.H2D) -> dict[str, Any]:
    return {
        "seconds": result.duration_ns / 1e9,
        "bytes_per_s": result.rate(direction),
        "cpu_cores": round(result.cpu_seconds * 1e9 / result.duration_ns, 4),
        "engine_cpu_cores": round(result.engine_cpu_seconds * 1e9 / result.duration_ns, 4),
        "latency": {name: latency_summary(times) for name, times in result.latency_ns.items()},
        "submitted_late": {name: latency_summary(times) for name, times in result.late_ns.items()},
        "unfinished": result.unfinished,
    }
