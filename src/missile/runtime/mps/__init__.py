"""The `mps` policy: tenants in processes of their own under NVIDIA's Multi-Process Service."""

from __future__ import annotations

from missile.runtime.mps.pool import MpsPool, MpsSettings, is_mps

__all__ = ["MpsPool", "MpsSettings", "is_mps"]
