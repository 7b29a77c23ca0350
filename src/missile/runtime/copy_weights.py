"""Weights on the host's link from what tenants copy and from their objectives. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from missile.runtime.prediction import Demand

__all__ = ["copy_weights"]

_PART_OF_ROOM = 0.1  # of the time between a tenant's time alone and its objective: what waiting for the link may take
_STEPS = 200
_MOST = 0.9  # of the link, for LS tenants together: BE copies go on


def copy_weights(demands: Sequence[Demand], weights: Mapping[str, float], rate: float) -> dict[str, float]:
    """By tenant: its weight among all tenants that copy at once. BE tenants keep theirs, LS tenants have at least theirs.

    weights: as the tenants have them. rate: of the link, bytes/s. An LS tenant with an objective gets so large a share that
    the longer of its two copies, beside everybody else's, takes at most what the link takes for it and a tenth of the
    room that its objective leaves. LS tenants get nine tenths of the link together at most, each less in proportion where
    they ask for more.
    """
    shares = {}
    for demand in demands:
        if demand.latency_sensitive and demand.slo_ns is not None and demand.copy_bytes:
            ideal = demand.copy_bytes / rate * 1e9
            shares[demand.name] = ideal / (ideal + _PART_OF_ROOM * max(demand.slo_ns - demand.service_ns, 0.0))
    asked = sum(shares.values())
    scale = min(_MOST / asked, 1.0) if asked else 1.0
    found = dict(weights)
    # Raising one lowers the shares of the others: until all have theirs. Each step leaves 0.9 of what is missing at most.
    for _ in range(_STEPS):
        total = sum(found.values())
        found.update({name: max(found[name], share * scale * total) for name, share in shares.items()})
    return found
