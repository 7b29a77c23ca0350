"""Missile: software isolation of one NVIDIA GPU between latency-sensitive and best-effort inference tenants."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
