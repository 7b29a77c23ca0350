"""One snapshot of everything that the live view and `missile top` show, as plain JSON data."""

from __future__ import annotations

import os
import time
from itertools import islice
from typing import Any

from missile import __version__
from missile.serving.access import Principal
from missile.serving.measures import Second
from missile.serving.services import Services
from missile.serving.tenant import Tenant

__all__ = ["snapshot"]

HISTORY_S = 300


def snapshot(services: Services, principal: Principal) -> dict[str, Any]:
    """The tenants that `principal` may see, the device and the server. Times in ms, sizes in bytes; None: no meaning."""
    supervisor = services.supervisor
    return {
        "time": time.time(),
        "server": {
            "version": __version__,
            "uptime_s": round(services.uptime_s, 1),
            "ready": services.ready,
            "draining": services.draining,
            "pending": services.gateway.pending,
            "arena_used_bytes": services.gateway.arena_used,
            "engine_running": supervisor.running,
            "engine_starts": supervisor.starts,
            "front_end_rss_bytes": resident_bytes(os.getpid()),
            "engine_rss_bytes": resident_bytes(supervisor.pid),
        },
        "device": dict(supervisor.facts),
        "tenants": [_tenant(services, t) for t in services.registry.tenants.values() if principal.sees(t.name)],
    }


def _tenant(services: Services, tenant: Tenant) -> dict[str, Any]:
    measures, config = tenant.measures, tenant.config
    recent = measures.recent_ms()
    deployment = tenant.deployment
    granted = services.granted(deployment) if deployment is not None else {}
    return {
        "name": tenant.name,
        "model": config.model.rpartition("/")[2],
        "class": config.tenant_class,
        "state": tenant.state.value,
        "reason": tenant.reason,
        "slo_ms": config.slo_ms,
        "objective": config.objective,
        "weight": config.weight,
        "residency": config.residency,
        "outstanding": tenant.outstanding,
        "queue_limit": config.quota.queue,
        "held_bytes": tenant.held_bytes,
        "answered": measures.answered,
        "refused": dict(measures.refused),
        "rate": round(measures.rate(), 2),
        "p50_ms": recent and round(recent[0], 4),
        "p95_ms": recent and round(recent[1], 4),
        "p99_ms": recent and round(recent[2], 4),
        "attainment_10s": measures.attainment(10),
        "attainment_5m": measures.attainment(300),
        "burn_5m": measures.burn(300),
        "burn_1h": measures.burn(3600),
        "mean_batch": round(measures.items / measures.executions, 2) if measures.executions else None,
        "granted": granted,
        "history": [_second(s) for s in _last(measures.history, HISTORY_S)],
    }


def _last(history: Any, count: int) -> list[Second]:
    return list(islice(history, max(0, len(history) - count), None))


def _second(second: Second) -> list[Any]:
    """[unix second, answered, refused, owed, met, p50, p99], compact: there are hundreds."""
    p50 = None if second.p50_ms is None else round(second.p50_ms, 3)
    p99 = None if second.p99_ms is None else round(second.p99_ms, 3)
    return [second.at_s, second.answered, second.refused, second.owed, second.met, p50, p99]


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, 0 when it can't be read."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
