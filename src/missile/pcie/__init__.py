"""The completely fair PCIe scheduler: who copies next (pure), the engine that copies, and copies in a stream's order."""

from __future__ import annotations

from missile.pcie.engine import CopyEngine, EngineOptions, Stop, TenantCopies
from missile.pcie.link import LinkProfile, choose_options, measure_link
from missile.pcie.policy import FairLink, Granularity
from missile.pcie.runner import CopyThread, Sleeper
from missile.pcie.ticket import CopyState, CopyTicket, Direction, Span
from missile.pcie.weights import Share, nice_weight

__all__ = [
    "CopyEngine",
    "CopyState",
    "CopyThread",
    "CopyTicket",
    "Direction",
    "EngineOptions",
    "FairLink",
    "Granularity",
    "LinkProfile",
    "Share",
    "Sleeper",
    "Span",
    "Stop",
    "TenantCopies",
    "choose_options",
    "measure_link",
    "nice_weight",
]
