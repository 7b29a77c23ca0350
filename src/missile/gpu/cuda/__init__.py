"""The GPU interface on NVIDIA hardware, through the CUDA driver. Nothing is loaded before it is needed."""

from __future__ import annotations

from missile.gpu.cuda.gpu import CudaGpu

__all__ = ["CudaGpu"]
