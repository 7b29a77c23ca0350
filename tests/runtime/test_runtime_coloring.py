"""Tenants loaded into colored memory on a simulated GPU: who gets which colors, and what happens when that can't be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from missile.compiler.bind import BoundModel
from missile.errors import MisuseError, OutOfMemoryError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu, Launch
from missile.probe import ChannelMap, map_for
from missile.runtime.loading import Coloring, load_tenants
from missile.runtime.tenant import Tenant


def _tenant(name: str, model: str = "resnet34", **more: object) -> Tenant:
    return Tenant.model_validate(
        {"name": name, "class": "BE", "model": model, "arrivals": {"kind": "closed", "depth": 1}} | more
    )


@pytest.fixture(scope="module")
def channel_map(tmp_path_factory: pytest.TempPathFactory) -> ChannelMap:
    cache: Path = tmp_path_factory.mktemp("maps")
    with open_gpu("sim:h100") as opened:
        return map_for(opened, cache=cache, interference=False)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h100") as opened:
        yield opened


def test_each_tenant_works_in_its_own_colors(gpu: Gpu, channel_map: ChannelMap) -> None:
    before = gpu.memory_free()
    sets = {"a": (0, 1, 2), "b": (5, 6)}
    tenants = [_tenant("a"), _tenant("b", "squeezenet1_1"), _tenant("plain", "squeezenet1_1")]
    with load_tenants(gpu, tenants, coloring=Coloring(channel_map, sets)) as roster:
        assert [entry.colors for entry in roster.tenants] == [(0, 1, 2), (5, 6), ()]
        for entry in roster.ready:
            model = entry.model
            assert isinstance(model, BoundModel)
            works = [op.work for op in model.operations if isinstance(op, Launch)]
            for work in works[1:-1]:  # inputs and outputs lie in plain memory too
                assert work is not None
                assert set(work.bytes_by_color) == set(entry.colors)
                assert not entry.colors or sum(work.bytes_by_color.values()) == pytest.approx(1)
            stream = gpu.create_stream()
            stream.copy_to_device(model.input_address, entry.inputs[0])
            stream.launch_graph(model.graph)
            stream.copy_to_host(entry.outputs[0], model.output_address)
            stream.synchronize()
            stream.close()
    assert gpu.memory_free() == before


def test_tenants_of_one_set_share_it_in_pages_of_their_own(gpu: Gpu, channel_map: ChannelMap) -> None:
    names = ("a", "b", "c")
    with load_tenants(
        gpu,
        [_tenant(name, "squeezenet1_1") for name in names],
        coloring=Coloring(channel_map, {"a": (0, 1), "b": (1, 0), "c": (2, 3)}),
    ) as roster:
        assert [entry.colors for entry in roster.tenants] == [(0, 1), (0, 1), (2, 3)]
        assert all(entry.model is not None for entry in roster.tenants)


def test_a_tenant_above_its_limit_leaves_the_others_running(gpu: Gpu, channel_map: ChannelMap) -> None:
    tenants = [_tenant("a", memory_limit_mb=1), _tenant("b", "squeezenet1_1")]
    with load_tenants(gpu, tenants, coloring=Coloring(channel_map, {"a": (0,), "b": (1,)})) as roster:
        a, b = roster.tenants
        assert a.model is None
        assert "limit is 1 MiB" in a.error
        assert b.model is not None


def test_a_model_that_does_not_fit_says_what_is_missing(channel_map: ChannelMap) -> None:
    with open_gpu("sim:h100") as gpu:
        hog = gpu.allocate(gpu.memory_free() - (64 << 20), tenant="hog")
        free = gpu.memory_free()
        with pytest.raises(OutOfMemoryError, match="No tenant could be loaded"):
            load_tenants(gpu, [_tenant("a", "bert_large")], coloring=Coloring(channel_map, {"a": (0, 1)}))
        assert gpu.memory_free() == free
        hog.free()


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ({"a": (0, 1), "b": (1, 2)}, "Color 1 is wanted by tenants"),
        ({"a": (0,), "nobody": (1,)}, "for tenant 'nobody'; the tenants are a, b"),
        ({"a": ()}, "empty set of colors"),
        ({"a": (99,)}, "color 99"),
    ],
)
def test_colors_that_make_no_sense_load_nothing(
    gpu: Gpu, channel_map: ChannelMap, sets: dict[str, tuple[int, ...]], says: str
) -> None:
    free = gpu.memory_free()
    with pytest.raises(MisuseError, match=says):
        load_tenants(
            gpu, [_tenant("a", "squeezenet1_1"), _tenant("b", "squeezenet1_1")], coloring=Coloring(channel_map, sets)
        )
    assert gpu.memory_free() == free


def test_a_map_of_another_gpu_is_refused(channel_map: ChannelMap) -> None:
    with open_gpu("sim:h200") as other, pytest.raises(MisuseError, match="channel map is of"):
        load_tenants(other, [_tenant("a", "squeezenet1_1")], coloring=Coloring(channel_map, {"a": (0,)}))
