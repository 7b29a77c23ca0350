"""The arithmetic of profiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.compiler.package import Bound, KernelProfile, ModelPackage
from missile.compiler.profile import Limits, classify, profile_package, share_total
from missile.gpu import open_gpu

TIMES = st.lists(st.floats(500, 1e6), min_size=1, max_size=50)


@given(TIMES, st.floats(0.05, 1.5))
def test_shares_add_up_and_keep_their_order(raw: list[float], part: float) -> None:
    total = part * sum(raw)
    shared = share_total(np.array(raw), total)
    assert shared.sum() == pytest.approx(total, rel=1e-6)
    assert (shared > 0).all()
    order = np.argsort(raw, kind="stable")
    assert (np.diff(shared[order]) >= -1e-6).all()


@given(st.lists(st.floats(3000, 1e5), min_size=1, max_size=50), st.floats(0, 2000))
def test_constant_overhead_is_found(kernels: list[float], overhead: float) -> None:
    true = np.array(kernels)
    np.testing.assert_allclose(share_total(true + overhead, float(true.sum())), true, rtol=1e-4)


def _profile(solo_ns: float, footprint: int, operations: int, tensor: bool = True) -> KernelProfile:
    return KernelProfile(
        solo_ns=solo_ns,
        read_bytes=footprint,
        write_bytes=0,
        footprint_bytes=footprint,
        operations=operations,
        tensor_ops=tensor,
        blocks=1,
        threads=128,
        blocks_per_sm=1,
        bound=Bound.LATENCY,
    )


def test_bounds() -> None:
    limits = Limits(memory=4800.0, tensor=990_000.0, scalar=60_000.0)
    assert classify(_profile(10_000, 40_000_000, 1_000_000), limits) is Bound.MEMORY
    assert classify(_profile(10_000, 1_000_000, 7_000_000_000), limits) is Bound.COMPUTE
    assert classify(_profile(10_000, 1_000_000, 500_000_000, tensor=False), limits) is Bound.COMPUTE
    assert classify(_profile(3_000, 100_000, 1_000_000), limits) is Bound.LATENCY
    assert classify(_profile(3_000, 100_000, 1_000_000), Limits(0.0, 0.0, 0.0)) is Bound.LATENCY


def test_profile_of_a_simulated_gpu_adds_up(package: ModelPackage) -> None:
    """The simulator stands in for hardware: the measuring code is the same."""
    with open_gpu("sim:h100") as gpu:
        measured = profile_package(package, None, gpu, repeats=2, runs=3)
    assert measured.solo_ns is not None
    kernels = sum(step.profile.solo_ns for step in measured.steps if step.kind == "kernel" and step.profile)
    assert 0.5 * measured.solo_ns <= kernels <= 1.001 * measured.solo_ns
    assert measured.relative_error == package.relative_error
