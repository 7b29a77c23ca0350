"""Preemption on the simulated GPU: what leaves, when, and that every block's time is spent exactly once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missile.errors import MisuseError
from missile.gpu.interface import Launch, Left, Preemption
from missile.gpu.sim import SimulatedGpu, load_spec
from missile.gpu.sim.spec import NoiseTable
from missile.gpu.work import KernelWork

QUIET = load_spec("h100").model_copy(update={"noise": NoiseTable(kernel=0.0, copy=0.0)})
SMS = 132
WAVES = 20
STEP_NS = 100_000.0
STEPS = 6


class Model:
    """A graph of kernels of `WAVES` waves each that look at one control."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu = gpu
        self.control = gpu.create_preempt_control()
        kernel = gpu.load_module(b"", name="tenant").kernel("k")
        work = KernelWork(blocks=SMS * WAVES, solo_ns=STEP_NS)
        self.graph = gpu.create_graph(
            [
                Launch(kernel, (work.blocks, 1, 1), (128, 1, 1), work=work, preempt=Preemption(self.control, step))
                for step in range(STEPS)
            ]
        )
        self.stream = gpu.create_stream()
        self.done = gpu.create_event()

    def launch(self) -> None:
        self.stream.launch_graph(self.graph)
        self.stream.record(self.done)

    def stop_after(self, ns: int) -> None:
        """Raise the flag `ns` from now, and wait until what was launched has ended."""
        self.gpu.wait([], self.gpu.now_ns() + ns)
        self.control.raise_flag()
        self.gpu.synchronize()


@pytest.fixture
def model() -> Model:
    return Model(SimulatedGpu(QUIET))


def test_nothing_leaves_while_the_flag_is_down(model):
    assert model.control.begin(model.stream) == 1
    begin = model.gpu.now_ns()
    model.launch()
    model.gpu.synchronize()
    assert model.control.left() is None
    assert model.gpu.now_ns() - begin == pytest.approx(STEPS * STEP_NS, rel=0.03)


def test_the_gpu_is_free_a_block_s_time_after_the_flag(model):
    request = model.control.begin(model.stream)
    model.launch()
    model.stop_after(250_000)
    flagged = model.gpu.now_ns()
    assert model.control.left() == Left(request, 2)
    # 250 us of work, one wave of the step that ran, and three launches that left.
    assert flagged == pytest.approx(250_000 + STEP_NS / WAVES + 3 * 2_000, abs=15_000)


@settings(max_examples=30, deadline=None)
@given(stops=st.lists(st.integers(1_000, 300_000), max_size=8))
def test_however_often_it_is_stopped_a_request_takes_its_time_once(stops):
    model = Model(SimulatedGpu(QUIET))
    model.control.begin(model.stream)
    model.launch()
    last = (-1, 0.0)
    for ns in stops:
        model.stop_after(ns)
        left = model.control.left()
        if left is None:
            break
        assert (left.request, left.step) >= (1, last[0])
        last = (left.step, 0.0)
        model.control.lower_flag()
        model.control.resume(model.stream, left)
        model.launch()
    model.control.lower_flag()
    model.gpu.synchronize()
    left = model.control.left()
    if left is not None:
        model.control.resume(model.stream, left)
        model.launch()
        model.gpu.synchronize()
    assert model.control.left() is None
    # Waves that were cut off are rounded up, and a launch that leaves takes a microsecond.
    busy = model.gpu.busy_sm_ns / SMS
    assert STEPS * STEP_NS * 0.98 <= busy <= STEPS * STEP_NS + (len(stops) + 1) * (STEP_NS / WAVES + 3_000)


def test_a_new_request_starts_from_the_beginning(model):
    model.control.begin(model.stream)
    model.launch()
    model.stop_after(150_000)
    model.control.lower_flag()
    model.control.resume(model.stream, model.control.left())
    model.launch()
    model.gpu.synchronize()
    request = model.control.begin(model.stream)
    begin = model.gpu.now_ns()
    model.launch()
    model.gpu.synchronize()
    assert model.gpu.now_ns() - begin == pytest.approx(STEPS * STEP_NS, rel=0.03)
    model.control.begin(model.stream)
    model.control.raise_flag()
    model.launch()
    model.gpu.synchronize()
    assert model.control.left() == Left(request + 1, 0)


def test_a_kernel_whose_blocks_all_run_is_not_cut(model):
    gpu, control = model.gpu, model.control
    kernel = gpu.load_module(b"", name="tenant").kernel("k")
    work = KernelWork(blocks=SMS, solo_ns=50_000.0)
    launch = Launch(kernel, (work.blocks, 1, 1), (128, 1, 1), work=work, preempt=Preemption(control, 0))
    control.begin(model.stream)
    begin = gpu.now_ns()
    model.stream.launch(launch)
    model.stop_after(20_000)
    assert control.left() is None
    assert gpu.now_ns() - begin == pytest.approx(50_000, abs=12_000)


def test_a_control_belongs_to_its_gpu(model):
    with pytest.raises(MisuseError, match="another GPU"):
        model.control.begin(object())
