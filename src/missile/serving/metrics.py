"""Prometheus metrics, computed from the tenants' measures when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from missile.serving.measures import BUCKETS_S, Histogram
from missile.serving.services import Services
from missile.serving.state import resident_bytes
from missile.serving.tenant import State, Tenant

__all__ = ["Metrics"]

_WINDOWS = {"5m": 300, "1h": 3600}
_GRANTED = {
    "sms_granted": "SMs granted to the tenant",
    "sms_used": "SMs of the tenant's lanes while they had its work, mean over the last interval",
    "link_granted": "Share of the host link granted to the tenant (0 to 1)",
    "link_used": "Share of the host link the tenant used (0 to 1)",
}
_COUNTED = {
    "preemptions": "Launches of the tenant that were preempted",
    "lent_seconds": "Seconds in which the tenant had work on the GPU beside LS requests that could afford it",
    "guard_hits": "Accesses that the translation guard caught",
    "cold_starts": "Times the tenant's weights were brought to the GPU",
}


class Metrics(Collector):
    """`text` is what `/metrics` answers. refusals: requests answered with an error, by reason."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.refusals: dict[str, int] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def count_refusal(self, label: str) -> None:
        self.refusals[label] = self.refusals.get(label, 0) + 1

    def collect(self) -> Iterator[Metric]:
        yield from self._server()
        yield from self._requests()
        yield from self._slo()
        yield from self._granted()

    def _tenants(self) -> list[Tenant]:
        return list(self._services.registry.tenants.values())

    def _server(self) -> Iterator[Metric]:
        services, supervisor = self._services, self._services.supervisor
        facts = supervisor.facts
        info = GaugeMetricFamily(
            "missile_device_info",
            "What executes (always 1)",
            labels=["device", "name", "simulated", "policy", "isolation"],
        )
        info.add_metric([str(facts.get(k, "")) for k in ("device", "name", "simulated", "policy", "isolation")], 1)
        yield info
        yield GaugeMetricFamily("missile_ready", "1 when every tenant is ready", value=float(services.ready))
        yield GaugeMetricFamily(
            "missile_engine_running", "1 while the engine process runs", value=float(supervisor.running)
        )
        yield CounterMetricFamily(
            "missile_engine_starts", "Times the engine process was started", value=supervisor.starts
        )
        yield GaugeMetricFamily(
            "missile_arena_used_bytes", "Memory held by requests", value=services.gateway.arena_used
        )
        resident = GaugeMetricFamily("missile_resident_bytes", "Resident memory of a process", labels=["process"])
        resident.add_metric(["front_end"], resident_bytes(os.getpid()))
        resident.add_metric(["engine"], resident_bytes(supervisor.pid))
        yield resident
        rejected = CounterMetricFamily(
            "missile_rejected", "Requests answered with an error, by reason", labels=["reason"]
        )
        for reason, count in sorted(self.refusals.items()):
            rejected.add_metric([reason], count)
        yield rejected

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "missile_requests", "Requests by outcome (ok, or why not)", labels=["tenant", "class", "outcome"]
        )
        items = CounterMetricFamily(
            "missile_items", "Items inferred (a request's batch counts whole)", labels=["tenant"]
        )
        executions = CounterMetricFamily("missile_executions", "Batches executed", labels=["tenant"])
        for tenant in self._tenants():
            measures, kind = tenant.measures, tenant.config.tenant_class
            requests.add_metric([tenant.name, kind, "ok"], measures.answered)
            for reason, count in sorted(measures.refused.items()):
                requests.add_metric([tenant.name, kind, reason], count)
            items.add_metric([tenant.name], measures.items)
            executions.add_metric([tenant.name], measures.executions)
        yield from (requests, items, executions)
        total = HistogramMetricFamily(
            "missile_latency_seconds", "Request complete at the server to answer ready", labels=["tenant", "class"]
        )
        parts = HistogramMetricFamily(
            "missile_part_seconds", "What a request's time went into: queue, copy or execute", labels=["tenant", "part"]
        )
        for tenant in self._tenants():
            measures = tenant.measures
            _add(total, [tenant.name, tenant.config.tenant_class], measures.total)
            for part in ("queue", "copy", "execute"):
                _add(parts, [tenant.name, part], getattr(measures, part))
        yield from (total, parts)

    def _slo(self) -> Iterator[Metric]:
        slo = GaugeMetricFamily("missile_slo_seconds", "The latency an LS tenant was promised", labels=["tenant"])
        objective = GaugeMetricFamily(
            "missile_slo_objective", "Share of requests that should meet it", labels=["tenant"]
        )
        attainment = GaugeMetricFamily(
            "missile_slo_attainment", "Share of requests that met it", labels=["tenant", "window"]
        )
        burn = GaugeMetricFamily(
            "missile_slo_burn", "Speed at which the error budget goes (1: just allowed)", labels=["tenant", "window"]
        )
        for tenant in self._tenants():
            if tenant.config.slo_ms is None:
                continue
            slo.add_metric([tenant.name], tenant.config.slo_ms / 1000.0)
            objective.add_metric([tenant.name], tenant.config.objective)
            for window, seconds in _WINDOWS.items():
                for family, read in ((attainment, tenant.measures.attainment), (burn, tenant.measures.burn)):
                    if (value := read(seconds)) is not None:
                        family.add_metric([tenant.name, window], value)
        yield from (slo, objective, attainment, burn)

    def _granted(self) -> Iterator[Metric]:
        def gauge(name: str, text: str, read: Callable[[Tenant], float | None]) -> GaugeMetricFamily:
            family = GaugeMetricFamily(name, text, labels=["tenant"])
            for tenant in self._tenants():
                if (value := read(tenant)) is not None:
                    family.add_metric([tenant.name], value)
            return family

        yield gauge("missile_tenant_ready", "1 when the tenant serves", lambda t: float(t.state is State.READY))
        yield gauge("missile_outstanding", "Requests waiting or running", lambda t: t.outstanding)
        yield gauge("missile_held_bytes", "Request memory the tenant holds", lambda t: t.held_bytes)
        yield gauge(
            "missile_memory_bytes", "Device memory the tenant's model holds", lambda t: self._fact(t, "memory_bytes")
        )
        for name, text in _GRANTED.items():
            yield gauge(f"missile_{name}", text, lambda t, name=name: self._fact(t, name))  # type: ignore[misc]
        yield gauge("missile_colors_granted", "Colors the tenant owns", self._colors)
        for name, text in _COUNTED.items():
            family = CounterMetricFamily(f"missile_{name}", text, labels=["tenant"])
            for tenant in self._tenants():
                if (value := self._fact(tenant, name)) is not None:
                    family.add_metric([tenant.name], value)
            yield family

    def _facts(self, tenant: Tenant) -> dict[str, Any]:
        deployment = tenant.deployment
        return self._services.granted(deployment) if deployment is not None else {}

    def _fact(self, tenant: Tenant, name: str) -> float | None:
        value = self._facts(tenant).get(name)
        return None if value is None else float(value)

    def _colors(self, tenant: Tenant) -> float | None:
        colors = self._facts(tenant).get("colors")
        return None if colors is None else float(len(colors))


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    edges = [f"{edge:g}" for edge in BUCKETS_S] + ["+Inf"]
    family.add_metric(labels, list(zip(edges, accumulate(histogram.counts), strict=True)), histogram.sum_ns / 1e9)
