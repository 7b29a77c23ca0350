"""GPUs: one interface, two implementations (hardware through the CUDA driver, and simulated)."""

from __future__ import annotations

from missile.gpu.registry import known_devices, open_gpu, resolve

__all__ = ["known_devices", "open_gpu", "resolve"]
