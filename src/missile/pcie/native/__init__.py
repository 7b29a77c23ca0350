"""The copy engine's hot loop in C: built when first needed, where there is a compiler. Everything works without it."""

from __future__ import annotations

from missile.pcie.native.build import Library, library
from missile.pcie.native.lane import NativeLane

__all__ = ["Library", "NativeLane", "library"]
