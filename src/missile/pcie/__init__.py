"""The completely fair PCIe scheduler: who copies next (pure), the engine that copies, and weights that live on the host."""

from __future__ import annotations

from missile.pcie.engine import CopyEngine, EngineOptions, Stop, TenantCopies
from missile.pcie.link import LinkProfile, choose_options, measure_link
from missile.pcie.policy import FairLink, Granularity
from missile.pcie.runner import CopyThread, Sleeper
from missile.pcie.swap import HostModel, Swapper, SwapRun, WeightSlice, segments
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
    "HostModel",
    "LinkProfile",
    "Share",
    "Sleeper",
    "Span",
    "Stop",
    "SwapRun",
    "Swapper",
    "TenantCopies",
    "WeightSlice",
    "choose_options",
    "measure_link",
    "nice_weight",
    "segments",
]
