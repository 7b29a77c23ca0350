"""The simulated GPU (docs/simulator.md)."""

from __future__ import annotations

from missile.gpu.sim.gpu import SimulatedGpu
from missile.gpu.sim.spec import Faults, GpuSpec, load_spec

__all__ = ["Faults", "GpuSpec", "SimulatedGpu", "load_spec"]
