"""Missile: software isolation of one NVIDIA GPU between latency-sensitive and best-effort inference tenants.

`missile.probe(device)` recovers a GPU's channel map; it is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "probe":
        return importlib.import_module("missile.probe")
    raise AttributeError(f"module 'missile' has no attribute {name!r}")
