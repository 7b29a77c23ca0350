"""What every GPU does about memory: allocations, copies, pages and ranges."""

from __future__ import annotations

import numpy as np
import pytest

from missile.errors import MisuseError, OutOfMemoryError
from missile.gpu.interface import Copy, Fill, Gpu, Level


def _pattern(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def _upload(gpu: Gpu, address: int, data: np.ndarray) -> None:
    host, stream = gpu.allocate_host(len(data)), gpu.create_stream()
    host.array[:] = data
    stream.copy_to_device(address, host)
    stream.synchronize()
    host.free()


def _download(gpu: Gpu, address: int, nbytes: int) -> np.ndarray:
    host, stream = gpu.allocate_host(nbytes), gpu.create_stream()
    host.array[:] = 0xEE
    stream.copy_to_host(host, address)
    stream.synchronize()
    data = host.array.copy()
    host.free()
    return data


@pytest.mark.parametrize("nbytes", [1, 511, 4096, (2 << 20) + 17])
def test_what_was_copied_in_comes_out(gpu: Gpu, nbytes: int) -> None:
    buffer = gpu.allocate(nbytes)
    assert buffer.address % 512 == 0
    assert buffer.nbytes >= nbytes
    data = _pattern(nbytes)
    _upload(gpu, buffer.address, data)
    np.testing.assert_array_equal(_download(gpu, buffer.address, nbytes), data)
    buffer.free()
    buffer.free()


def test_parts_of_buffers_are_copied(gpu: Gpu) -> None:
    buffer, stream = gpu.allocate(4096), gpu.create_stream()
    source, target = gpu.allocate_host(1024), gpu.allocate_host(1024)
    source.array[:] = _pattern(1024)
    target.array[:] = 7
    stream.launch(Fill(buffer.address, 4096, 3))
    stream.copy_to_device(buffer.address + 100, source, offset=10, nbytes=50)
    stream.copy_to_host(target, buffer.address + 90, offset=5, nbytes=70)
    stream.synchronize()
    expected = np.full(1024, 7, np.uint8)
    expected[5:75] = 3
    expected[15:65] = source.array[10:60]
    np.testing.assert_array_equal(target.array, expected)


def test_fills_and_device_copies_follow_stream_order(gpu: Gpu) -> None:
    one, two, stream = gpu.allocate(8192), gpu.allocate(8192), gpu.create_stream()
    stream.launch(Fill(one.address, 8192, 1))
    stream.launch(Copy(two.address, one.address, 8192))
    stream.launch(Fill(one.address, 8192, 2))
    stream.launch(Copy(two.address + 4096, one.address, 4096))
    stream.synchronize()
    data = _download(gpu, two.address, 8192)
    assert (data[:4096] == 1).all()
    assert (data[4096:] == 2).all()


def test_graphs_fill_and_copy_too(gpu: Gpu) -> None:
    one, two, stream = gpu.allocate(4096), gpu.allocate(4096), gpu.create_stream()
    graph = gpu.create_graph([Fill(one.address, 4096, 9), Copy(two.address, one.address, 4096)])
    stream.launch_graph(graph)
    stream.synchronize()
    assert (_download(gpu, two.address, 4096) == 9).all()


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 2049), (2048, 1), (-1, 10), (100, 2000)])
def test_copies_beyond_a_host_buffer_are_misuse(gpu: Gpu, offset: int, nbytes: int) -> None:
    buffer, host, stream = gpu.allocate(8192), gpu.allocate_host(2048), gpu.create_stream()
    with pytest.raises(MisuseError):
        stream.copy_to_device(buffer.address, host, offset=offset, nbytes=nbytes)
    with pytest.raises(MisuseError):
        stream.copy_to_host(host, buffer.address, offset=offset, nbytes=nbytes)


def test_host_buffers_are_page_aligned_bytes(gpu: Gpu) -> None:
    host = gpu.allocate_host(5000)
    assert host.address % 4096 == 0
    assert host.array.shape == (host.nbytes,)
    assert host.array.dtype == np.uint8
    host.free()
    host.free()


def test_freed_memory_can_be_had_again(gpu: Gpu) -> None:
    before = gpu.memory_free()
    buffer = gpu.allocate(256 << 20)
    assert gpu.memory_free() <= before - (256 << 20)
    buffer.free()
    assert gpu.memory_free() >= before - (4 << 20)


def test_running_out_names_the_tenant_and_leaves_the_rest_alone(gpu: Gpu) -> None:
    kept = gpu.allocate(4096)
    data = _pattern(4096)
    _upload(gpu, kept.address, data)
    with pytest.raises(OutOfMemoryError, match="greedy") as caught:
        gpu.allocate(gpu.info.memory_bytes + (1 << 30), tenant="greedy")
    assert caught.value.tenant == "greedy"
    assert caught.value.requested > gpu.info.memory_bytes
    np.testing.assert_array_equal(_download(gpu, kept.address, 4096), data)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_empty_allocations_are_misuse(gpu: Gpu, nbytes: int) -> None:
    with pytest.raises(MisuseError):
        gpu.allocate(nbytes)
    with pytest.raises(MisuseError):
        gpu.allocate_host(nbytes)


class TestPages:
    @pytest.fixture(autouse=True)
    def _needs_pages(self, gpu: Gpu) -> None:
        if gpu.info.level < Level.PAGES:
            pytest.skip("no page mapping here")

    def test_pages_hold_what_is_written_through_their_range(self, gpu: Gpu) -> None:
        page = gpu.info.page_bytes
        pages = [gpu.create_page() for _ in range(3)]
        region = gpu.reserve(4 * page)
        assert region.address % page == 0
        region.map(page, pages)
        data = _pattern(8192)
        _upload(gpu, region.address + 2 * page - 4096, data)  # across two pages
        np.testing.assert_array_equal(_download(gpu, region.address + 2 * page - 4096, 8192), data)
        region.free()
        region.free()
        for one in pages:
            one.release()
            one.release()

    def test_a_page_keeps_its_contents_when_it_moves(self, gpu: Gpu) -> None:
        page = gpu.info.page_bytes
        physical = gpu.create_page()
        here, there = gpu.reserve(page), gpu.reserve(2 * page)
        here.map(0, [physical])
        data = _pattern(4096, seed=2)
        _upload(gpu, here.address, data)
        here.unmap(0, page)
        there.map(page, [physical])
        np.testing.assert_array_equal(_download(gpu, there.address + page, 4096), data)
        there.free()
        here.free()
        physical.release()

    def test_one_page_in_two_ranges_is_the_same_memory(self, gpu: Gpu) -> None:
        page = gpu.info.page_bytes
        physical = gpu.create_page()
        one, two = gpu.reserve(page), gpu.reserve(page)
        one.map(0, [physical])
        two.map(0, [physical])
        data = _pattern(4096, seed=3)
        _upload(gpu, one.address, data)
        np.testing.assert_array_equal(_download(gpu, two.address, 4096), data)
        for region in (one, two):
            region.free()
        physical.release()

    def test_bad_mappings_are_misuse(self, gpu: Gpu) -> None:
        page = gpu.info.page_bytes
        pages = [gpu.create_page() for _ in range(2)]
        region = gpu.reserve(2 * page)
        region.map(0, pages[:1])
        with pytest.raises(MisuseError):
            region.map(0, pages[1:])  # occupied
        with pytest.raises(MisuseError):
            region.map(512, pages[1:])  # not a page boundary
        with pytest.raises(MisuseError):
            region.map(page, [*pages[1:], *pages[:1]])  # beyond the end
        with pytest.raises(MisuseError):
            region.unmap(page, page)  # nothing there
        region.map(page, pages[1:])
        region.free()
        for one in pages:
            one.release()

    def test_pages_count_as_memory(self, gpu: Gpu) -> None:
        before = gpu.memory_free()
        pages = [gpu.create_page() for _ in range(8)]
        assert gpu.memory_free() <= before - 8 * gpu.info.page_bytes
        for one in pages:
            one.release()
        assert gpu.memory_free() >= before - (4 << 20)


def test_latency_is_measured_for_each_sm_and_address(gpu: Gpu) -> None:
    if gpu.info.level < Level.MEMORY_LAB:
        pytest.skip("no memory lab here")
    buffer = gpu.allocate(1 << 20)
    sms = gpu.sm_ids()[:3]
    addresses = buffer.address + np.arange(0, 1 << 20, 65536, dtype=np.int64)
    cycles = gpu.measure_latency(addresses, sms)
    assert cycles.shape == (3, 16)
    assert ((cycles > 50) & (cycles < 5000)).all()
    with pytest.raises(MisuseError):
        gpu.measure_latency(addresses, [10_000])
