"""Weights on the host: placement in the budget, copying under way while running, eviction by need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from missile.errors import GpuError, MisuseError, OutOfMemoryError
from missile.gpu import open_gpu
from missile.gpu.interface import Copy, DeviceBuffer, Gpu, HostBuffer
from missile.pcie.engine import CopyEngine, EngineOptions
from missile.pcie.extents import Extents
from missile.pcie.swap import HostModel, Segment, Swapper, SwapRun, WeightSlice, segments
from missile.pcie.ticket import CopyState
from missile.pcie.weights import MIB, Share

OPTIONS = EngineOptions(h2d_rate=54e9, d2h_rate=54e9)


# --- arithmetic


@given(
    st.integers(1, 60),
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from(["run", "stop", "drop"]), st.integers(1, 30)), max_size=60
    ),
)
def test_extents_never_overlap_and_never_displace_what_is_in_use(capacity: int, actions) -> None:
    extents = Extents(capacity, alignment=4)
    sizes: dict[str, int] = {}
    users: dict[str, int] = {}
    for name, action, size in actions:
        size = sizes.setdefault(name, size)
        before = extents.resident()
        if action == "run":
            if name not in extents:
                try:
                    placed = extents.place(name, size)
                except OutOfMemoryError:
                    assert any(users.get(other) for other in before)
                    assert extents.resident() == before
                    continue
                except MisuseError:
                    assert size > capacity
                    continue
                assert set(placed.evicted) <= set(before)
                assert not any(users.get(other) for other in placed.evicted)
            extents.acquire(name)
            users[name] = users.get(name, 0) + 1
        elif action == "stop" and users.get(name):
            extents.release(name)
            users[name] -= 1
        elif action == "drop" and not users.get(name):
            extents.drop(name)
        end = 0
        for other in extents.resident():
            assert extents.offset(other) >= end
            assert extents.offset(other) % 4 == 0
            end = extents.offset(other) + sizes[other]
        assert end <= capacity
        assert all(other in extents for other, count in users.items() if count)


def test_the_longest_unused_goes_and_a_returning_model_takes_its_old_place() -> None:
    extents = Extents(300, alignment=4)
    for name in "abc":
        extents.place(name, 100)
        extents.acquire(name)
        extents.release(name)
    where = {name: extents.offset(name) for name in "abc"}
    extents.acquire("a")
    extents.release("a")
    assert extents.place("d", 90).evicted == ("b",)
    assert extents.place("b", 100).evicted == ("c",)
    extents.drop("d")
    assert extents.place("c", 100).offset != where["c"]  # its old place is taken by b
    with pytest.raises(MisuseError, match="swap budget is 300"):
        extents.place("huge", 301)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5000)), min_size=1, max_size=40), st.integers(1, 20_000))
def test_segments_cover_every_slice_before_it_is_needed(raw: list[tuple[int, int]], at_least: int) -> None:
    slices, offset = [], 0
    for first, nbytes in raw:
        slices.append(WeightSlice(offset, nbytes, first))
        offset += -(-nbytes // 512) * 512
    parts = segments(slices, at_least=at_least)
    assert [part.first for part in parts] == sorted(part.first for part in parts)
    for piece in slices:
        covering = [p for p in parts if p.offset <= piece.offset and piece.offset + piece.nbytes <= p.offset + p.nbytes]
        assert any(part.first <= piece.first for part in covering)
    if [first for first, _ in raw] == sorted(
        first for first, _ in raw
    ):  # laid out in order of use: nothing is copied twice
        ends = [(part.offset, part.offset + part.nbytes) for part in parts]
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
        assert all(part.nbytes >= at_least for part in parts[:-1])


# --- on the simulated link


class Rig:
    """Models whose operations copy every layer's weights to an output, so that late weights show as wrong bytes."""

    def __init__(self, gpu: Gpu, budget: int) -> None:
        self.gpu = gpu
        self.engine = CopyEngine(gpu, OPTIONS)
        self.swapper = Swapper(gpu, self.engine, budget)
        self.outputs: dict[str, DeviceBuffer] = {}
        self.images: dict[str, HostBuffer] = {}
        self.plans: list[tuple[str, int]] = []

    def add(self, name: str, *, layers: int = 8, layer: int = 4 * MIB, share: Share | None = None) -> None:
        gpu = self.gpu
        image, output = gpu.allocate_host(layers * layer), gpu.allocate(layers * layer)
        image.array[:] = np.random.default_rng(len(self.images)).integers(0, 256, layers * layer, dtype=np.uint8)
        self.images[name], self.outputs[name] = image, output

        def plan(base: int) -> list[Copy]:
            self.plans.append((name, base))
            return [Copy(output.address + i * layer, base + i * layer, layer) for i in range(layers)]

        parts = segments([WeightSlice(i * layer, layer, i) for i in range(layers)], at_least=layer)
        self.engine.admit(name, share)
        self.swapper.add(HostModel(name, image, layers * layer, parts, plan), gpu.create_stream())

    def finish(self) -> None:
        while self.swapper.busy or self.engine.busy:
            due = self.engine.step()
            self.swapper.poll()
            events = [*self.engine.events(), *self.swapper.events()]
            if events or due is not None:
                self.gpu.wait(events, due)

    def check(self, name: str) -> None:
        host = self.gpu.allocate_host(self.images[name].nbytes)
        stream = self.gpu.create_stream()
        stream.copy_to_host(host, self.outputs[name].address)
        stream.synchronize()
        assert np.array_equal(host.array, self.images[name].array)
        host.free()

    def clear(self, name: str) -> None:
        zeros = self.gpu.allocate_host(self.outputs[name].nbytes)
        stream = self.gpu.create_stream()
        stream.copy_to_device(self.outputs[name].address, zeros)
        stream.synchronize()
        zeros.free()


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h100") as opened:
        yield opened


def test_a_cold_start_runs_on_the_right_weights_at_the_links_pace(gpu: Gpu) -> None:
    rig = Rig(gpu, 64 * MIB)
    rig.add("a")
    cold = rig.swapper.start("a")
    rig.finish()
    rig.check("a")
    assert cold.copied_bytes == 32 * MIB
    assert cold.slowdown(54e9) <= 1.15
    assert cold.finished_ns >= cold.weights_ns > 0
    rig.clear("a")
    warm = rig.swapper.start("a")
    rig.finish()
    rig.check("a")
    assert (warm.copied_bytes, warm.evicted) == (0, ())
    with pytest.raises(MisuseError, match="finished cold start"):
        warm.slowdown(54e9)
    assert len(rig.plans) == 1


def test_more_models_than_memory_take_turns(gpu: Gpu) -> None:
    rig = Rig(gpu, 64 * MIB)
    for name in ("a", "b", "c"):
        rig.add(name)
    runs: list[SwapRun] = []
    for name in ("a", "b", "a", "c", "b", "c", "a"):
        rig.clear(name)
        runs.append(rig.swapper.start(name))
        rig.finish()
        rig.check(name)
    assert [run.evicted for run in runs] == [(), (), (), ("b",), ("a",), (), ("b",)]
    together = [rig.swapper.start(name) for name in ("a", "b", "c", "a", "b")]  # no room for three at once
    rig.finish()
    assert all(run.error is None for run in together)
    for name in ("a", "b", "c"):
        rig.check(name)
    rig.swapper.close()


def test_a_cold_start_under_flood_gets_its_weighted_share(gpu: Gpu) -> None:
    rig = Rig(gpu, 128 * MIB)
    rig.add("cold", layers=16, share=Share(weight=2))
    host, device = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
    floods = []
    for name in ("x", "y"):
        rig.engine.admit(name)
        floods += [rig.engine.to_device(name, device, host) for _ in range(4)]
    rig.engine.step()
    run = rig.swapper.start("cold")
    rig.finish()
    rig.check("cold")
    assert run.slowdown(54e9 * 2 / 4) <= 1.5
    assert all(flood.state is CopyState.DONE for flood in floods)


def test_a_failing_weight_copy_fails_its_run_and_the_next_one_works(gpu: Gpu) -> None:
    rig = Rig(gpu, 64 * MIB)
    rig.add("a")
    rig.add("b")
    lane = next(iter(rig.engine.lanes.values()))
    stream, seen = lane._flight._streams[0], []

    class Faulty:
        def __getattr__(self, attribute: str):
            return getattr(stream, attribute)

        def copy_to_device(self, *args, **kwargs) -> None:
            seen.append(args)
            if len(seen) == 3:
                raise GpuError("cuMemcpyHtoDAsync", "CUDA_ERROR_INVALID_VALUE")
            stream.copy_to_device(*args, **kwargs)

    lane._flight._streams = (Faulty(), lane._flight._streams[1])
    broken = rig.swapper.start("a")
    rig.finish()
    assert isinstance(broken.error, GpuError)
    assert rig.swapper.resident() == ()
    fine = [rig.swapper.start("a"), rig.swapper.start("b")]
    rig.finish()
    assert [run.error for run in fine] == [None, None]
    rig.check("a")
    rig.check("b")


def test_bad_models_are_refused(gpu: Gpu) -> None:
    rig = Rig(gpu, 16 * MIB)
    image = gpu.allocate_host(MIB)
    stream = gpu.create_stream()
    with pytest.raises(MisuseError, match="swap budget is 16777216"):
        rig.add("big")
    with pytest.raises(MisuseError, match="outside its image"):
        rig.swapper.add(HostModel("x", image, MIB, (Segment(0, MIB + 1, 0),), lambda base: ()), stream)
    with pytest.raises(MisuseError, match="has no model in the swap"):
        rig.swapper.start("x")
    with pytest.raises(MisuseError, match="makes no sense"):
        Extents(0)
