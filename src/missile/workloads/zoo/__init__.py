"""Models that Missile defines itself."""

from __future__ import annotations

__all__ = ["decoder"]
