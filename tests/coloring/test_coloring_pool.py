"""The colored pool on the simulated GPU: mappings, tables, quotas, and that nothing stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from missile.coloring.pool import ColoredPool, TenantMemory
from missile.coloring.shape import LOGICAL_BASE, WINDOW, Escape, Field, Form, Shape, TableSpace
from missile.coloring.shares import Share
from missile.coloring.translation import InPageTranslation, PairTranslation, ShadowTranslation, StepTranslation
from missile.errors import MisuseError, OutOfMemoryError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.probe.layout import PageLayout

FRAME = PageLayout(2 << 20, tuple(range(16)))  # 64 KiB: few frames, so that all can be written


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with open_gpu("sim:h200") as opened:
        yield opened


def share(tenant: str, places: range, pages: tuple[int, ...], **shape: object) -> Share:
    made = Shape(Form.IN_PAGE, FRAME, **shape)  # type: ignore[arg-type]
    return Share(tenant, (), pages, InPageTranslation(made, list(places), len(pages)))


def write(gpu: Gpu, memory: TenantMemory, value: int) -> None:
    """Fill every frame of `memory` with `value`, at its physical place, as the tenant's kernels would."""
    stream = gpu.create_stream()
    staging = gpu.allocate_host(FRAME.granule_bytes)
    staging.array[:] = value
    for start in memory.translation.locate(np.arange(memory.translation.frames)):
        stream.copy_to_device(memory.base + int(start), staging)
    stream.synchronize()
    staging.free()
    stream.close()


def read(gpu: Gpu, memory: TenantMemory) -> set[int]:
    """The different bytes in `memory`."""
    stream = gpu.create_stream()
    staging = gpu.allocate_host(FRAME.granule_bytes)
    found: set[int] = set()
    for start in memory.translation.locate(np.arange(memory.translation.frames)):
        stream.copy_to_host(staging, memory.base + int(start))
        stream.synchronize()
        found |= set(np.unique(staging.array).tolist())
    staging.free()
    stream.close()
    return found


def test_tenants_on_the_same_pages_do_not_see_each_other(gpu: Gpu) -> None:
    with ColoredPool(gpu, 3) as pool:
        a = pool.attach(share("a", range(12), (2, 0, 1)))
        b = pool.attach(share("b", range(12, 32), (0, 1, 2)))
        write(gpu, a, 0xAA)
        write(gpu, b, 0xBB)
        assert read(gpu, a) == {0xAA}
        assert read(gpu, b) == {0xBB}


def test_everything_is_given_back(gpu: Gpu) -> None:
    before = gpu.memory_free()
    with ColoredPool(gpu, 4) as pool:
        memory = pool.attach(share("a", range(32), (0, 1), space=TableSpace.GLOBAL, escape=Escape.COUNT, wide=True))
        assert memory.table_bytes > 0
        assert memory.escapes > 0
        pool.grow(2)
        assert pool.page_count == len(pool.addresses) == 6
        memory.close()
        memory.close()
        assert pool.held() == {}
        pool.attach(share("a", range(32), (5,)))
    assert gpu.memory_free() == before


def test_a_shadow_page_table_of_the_same_memory_is_made_once(gpu: Gpu) -> None:
    before = gpu.memory_free()
    with ColoredPool(gpu, 2) as pool:
        memory = pool.attach(share("a", range(4, 9), (0, 1)))
        plain = memory.table_bytes
        same = ShadowTranslation.of(memory.translation)
        assert memory.shadow() == memory.shadow()
        assert memory.table_bytes == plain + same.table().nbytes
        table = int.from_bytes(memory.shadow()[Field.TABLE : Field.TABLE + 8], "little")
        assert memory.shadow() == same.constants(memory.base, table=table)
        stream, got = gpu.create_stream(), gpu.allocate_host(same.table().nbytes)
        stream.copy_to_host(got, table)
        stream.synchronize()
        assert got.array.tobytes() == same.table().tobytes()
        stream.close()
        memory.close()
        with pytest.raises(MisuseError, match="was given back"):
            memory.shadow()
    assert gpu.memory_free() == before


def test_pairs_get_steps_for_their_larger_table(gpu: Gpu) -> None:
    taken = np.repeat(np.random.default_rng(1).integers(0, 2, (1, 8)), 2, axis=1)
    with ColoredPool(gpu, 1) as pool:
        memory = pool.attach(Share("a", (), (0,), PairTranslation(Shape(Form.PAIR, FRAME, alike=True), taken)))
        plain = memory.table_bytes
        table = int.from_bytes(memory.shadow()[Field.TABLE : Field.TABLE + 8], "little")
        assert memory.shadow() == StepTranslation.of(memory.translation).constants(memory.base, table=table)
        assert memory.table_bytes == plain + 2 * 8


def test_a_share_that_can_not_be_attached_leaves_nothing(gpu: Gpu) -> None:
    with ColoredPool(gpu, 2) as pool:
        pool.attach(share("a", range(4), (0,)))
        free = gpu.memory_free()
        with pytest.raises(MisuseError, match="'a' has colored memory already"):
            pool.attach(share("a", range(4, 8), (1,)))
        with pytest.raises(MisuseError, match="does not have"):
            pool.attach(share("b", range(4, 8), (2,)))
        assert gpu.memory_free() == free
        assert list(pool.held()) == ["a"]


def test_shares_that_were_planned_apart_and_overlap_are_refused(gpu: Gpu) -> None:
    pairs = Shape(Form.PAIR, FRAME)
    halves = [Share(name, (), (1,), PairTranslation(pairs, np.full(16, taken))) for taken, name in enumerate("xy")]
    with ColoredPool(gpu, 3) as pool:
        pool.attach(replace(share("a", range(4), (0, 1)), colors=(0, 1)))
        with pytest.raises(MisuseError, match="'a' and 'b' overlap"):
            pool.attach(replace(share("b", range(4, 8), (1, 2)), colors=(1, 2)))
        with pytest.raises(MisuseError, match="'a' and 'x' overlap"):
            pool.attach(halves[0])
        pool.attach(replace(share("c", range(4, 8), (2,)), colors=(1, 2))).close()
        pool.attach(replace(share("d", range(4, 8), (1,)), colors=(2,)))
    with ColoredPool(gpu, 2) as pool:
        for half in halves:
            pool.attach(half)


def test_a_pool_larger_than_the_gpu_is_refused_whole(gpu: Gpu) -> None:
    before = gpu.memory_free()
    with pytest.raises(OutOfMemoryError):
        ColoredPool(gpu, before // (2 << 20) + 1)
    assert gpu.memory_free() == before


def test_buffers_are_logical_disjoint_and_reusable(gpu: Gpu) -> None:
    with ColoredPool(gpu, 2) as pool:
        memory = pool.attach(share("a", range(8), (0, 1)))
        sizes = [100, 70_000, 512, 1]
        buffers = [memory.allocate(n) for n in sizes]
        spans = sorted((b.address - LOGICAL_BASE, b.nbytes) for b in buffers)
        assert all(start % 512 == 0 for start, _ in spans)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
        assert pool.held() == {"a": sum(sizes)}
        for buffer in (buffers[1], buffers[0], buffers[3], buffers[2], buffers[2]):
            buffer.free()
        assert pool.held() == {"a": 0}
        whole = memory.allocate(memory.translation.logical_bytes)
        with pytest.raises(OutOfMemoryError, match="1 bytes of colored memory; 0 are left"):
            memory.allocate(1)
        whole.free()
        with pytest.raises(MisuseError, match="'b' can't have"):
            memory.allocate(1, tenant="b")


def test_a_quota_holds(gpu: Gpu) -> None:
    with ColoredPool(gpu, 2) as pool:
        memory = pool.attach(share("a", range(8), (0, 1)), quota=1000)
        memory.allocate(600)
        with pytest.raises(OutOfMemoryError, match="400 are left of 1000, 100 are missing") as caught:
            memory.allocate(500)
        assert (caught.value.requested, caught.value.available, caught.value.tenant) == (500, 400, "a")
        memory.allocate(400)


def test_a_table_lies_in_memory_where_the_constants_say(gpu: Gpu) -> None:
    with ColoredPool(gpu, 2) as pool:
        shape = Shape(Form.SHADOW, FRAME)
        units = np.random.default_rng(0).permutation(64)[:20]
        memory = pool.attach(Share("a", (), (1, 0), ShadowTranslation(shape, units, 2)))
        table = int.from_bytes(memory.constants[Field.TABLE : Field.TABLE + 8], "little")
        assert int.from_bytes(memory.constants[Field.BASE : Field.BASE + 8], "little") == memory.base
        host = gpu.allocate_host(80)
        stream = gpu.create_stream()
        stream.copy_to_host(host, table)
        stream.synchronize()
        assert host.array.view(np.uint32).tolist() == (units * FRAME.granule_bytes).tolist()
        assert memory.base % WINDOW == 0
        stream.close()
