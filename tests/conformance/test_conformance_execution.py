"""What every GPU does about time, streams, events, graphs and SM partitions."""

from __future__ import annotations

import pytest

from missile.errors import MisuseError
from missile.gpu.interface import Gpu, Level, Priority

MILLISECOND = 1_000_000


def test_info_is_complete(gpu: Gpu) -> None:
    info = gpu.info
    assert info.name
    assert info.sms >= 1
    assert info.memory_bytes > 0
    assert info.page_bytes % 4096 == 0
    assert 1 <= info.sm_minimum <= info.sms
    assert 1 <= info.sm_granularity <= info.sms
    assert info.level >= Level.PAGES
    assert info.simulated == info.device.startswith("sim:")


def test_clock_never_goes_back_and_waits_reach_their_deadline(gpu: Gpu) -> None:
    before = gpu.now_ns()
    gpu.wait([], before + MILLISECOND)
    assert gpu.now_ns() >= before + MILLISECOND
    gpu.wait([], before)  # already past: returns at once
    assert gpu.now_ns() >= before + MILLISECOND


def test_waiting_for_nothing_is_misuse(gpu: Gpu) -> None:
    with pytest.raises(MisuseError):
        gpu.wait([])


def test_wait_returns_at_the_deadline_when_the_event_is_later(gpu: Gpu, spin) -> None:
    stream, event = gpu.create_stream(), gpu.create_event()
    stream.launch(spin(50 * MILLISECOND))
    stream.record(event)
    gpu.wait([event], gpu.now_ns() + MILLISECOND)
    assert not event.done()
    gpu.synchronize()
    assert event.done()


def test_wait_returns_when_the_first_event_is_done(gpu: Gpu, spin) -> None:
    fast, slow = gpu.create_stream(), gpu.create_stream()
    early, late = gpu.create_event(), gpu.create_event()
    slow.launch(spin(80 * MILLISECOND))
    slow.record(late)
    fast.launch(spin(1 * MILLISECOND))
    fast.record(early)
    gpu.wait([late, early])
    assert early.done()
    assert not late.done()


def test_a_stream_waits_for_a_latch_that_nobody_has_raised_yet(gpu: Gpu, spin) -> None:
    waiting, raising = gpu.create_stream(), gpu.create_stream()
    reached, before = gpu.create_event(), gpu.create_event()
    latch = gpu.create_latch()
    waiting.record(before)
    waiting.wait_latch(latch, 2)
    waiting.record(reached)
    gpu.wait([before])
    raising.raise_latch(latch, 1)
    gpu.wait([], gpu.now_ns() + MILLISECOND)
    assert not reached.done()
    raising.launch(spin(1 * MILLISECOND))
    raising.raise_latch(latch, 3)
    gpu.synchronize()
    assert reached.time_ns() - before.time_ns() >= 2 * MILLISECOND * 0.9
    waiting.wait_latch(latch, 3)  # it is so high: goes on at once
    waiting.synchronize()
    latch.close()


def test_an_event_that_was_never_recorded_is_done_and_has_no_time(gpu: Gpu) -> None:
    event = gpu.create_event()
    assert event.done()
    event.synchronize()
    with pytest.raises(MisuseError):
        event.time_ns()


def test_an_event_without_timing_has_no_time(gpu: Gpu) -> None:
    stream, event = gpu.create_stream(), gpu.create_event(timing=False)
    stream.record(event)
    event.synchronize()
    with pytest.raises(MisuseError):
        event.time_ns()


def test_an_event_not_reached_yet_has_no_time(gpu: Gpu, spin) -> None:
    stream, event = gpu.create_stream(), gpu.create_event()
    stream.launch(spin(20 * MILLISECOND))
    stream.record(event)
    with pytest.raises(MisuseError):
        event.time_ns()
    event.synchronize()
    assert event.time_ns() > 0


def test_recording_again_replaces_the_former_point(gpu: Gpu, spin) -> None:
    stream, event = gpu.create_stream(), gpu.create_event()
    stream.record(event)
    event.synchronize()
    first = event.time_ns()
    stream.launch(spin(20 * MILLISECOND))
    stream.record(event)
    assert not event.done()
    event.synchronize()
    assert event.time_ns() >= first + 10 * MILLISECOND


def test_event_times_lie_on_the_clock_and_in_stream_order(gpu: Gpu, spin) -> None:
    stream = gpu.create_stream()
    start, end = gpu.create_event(), gpu.create_event()
    before = gpu.now_ns()
    stream.record(start)
    stream.launch(spin(10 * MILLISECOND))
    stream.record(end)
    stream.synchronize()
    after = gpu.now_ns()
    slack = MILLISECOND // 10  # hardware maps its own clock onto the host's
    assert before - slack <= start.time_ns() <= end.time_ns() <= after + slack
    assert end.time_ns() - start.time_ns() == pytest.approx(10 * MILLISECOND, rel=0.5)


def test_streams_run_at_once_and_each_in_order(gpu: Gpu, spin) -> None:
    streams = [gpu.create_stream() for _ in range(3)]
    first = [gpu.create_event() for _ in streams]
    last = [gpu.create_event() for _ in streams]
    begin = gpu.now_ns()
    for stream, one, two in zip(streams, first, last, strict=True):
        for event in (one, two):
            stream.launch(spin(20 * MILLISECOND))
            stream.record(event)
    gpu.synchronize()
    assert all(one.time_ns() < two.time_ns() for one, two in zip(first, last, strict=True))
    assert gpu.now_ns() - begin < 80 * MILLISECOND  # 120 one after another


def test_a_stream_waits_for_another_streams_event(gpu: Gpu, spin) -> None:
    one, two = gpu.create_stream(), gpu.create_stream()
    ready, end = gpu.create_event(), gpu.create_event()
    one.launch(spin(20 * MILLISECOND))
    one.record(ready)
    two.wait(ready)
    two.record(end)
    two.synchronize()
    assert ready.done()
    assert end.time_ns() >= ready.time_ns()


def test_waiting_for_an_event_means_its_last_record_before_the_call(gpu: Gpu, spin) -> None:
    one, two = gpu.create_stream(), gpu.create_stream()
    event, end = gpu.create_event(), gpu.create_event()
    one.record(event)
    two.wait(event)
    one.launch(spin(50 * MILLISECOND))
    one.record(event)
    two.record(end)
    two.synchronize()
    assert end.done()
    assert not event.done()


def test_idle_tells_whether_work_is_left(gpu: Gpu, spin) -> None:
    stream = gpu.create_stream()
    assert stream.idle()
    stream.launch(spin(20 * MILLISECOND))
    assert not stream.idle()
    stream.synchronize()
    assert stream.idle()


def test_enqueueing_does_not_wait_for_the_work(gpu: Gpu, spin) -> None:
    stream = gpu.create_stream()
    launch = spin(10 * MILLISECOND)
    stream.launch(launch)
    stream.synchronize()
    before = gpu.now_ns()
    for _ in range(10):
        stream.launch(launch)
    assert gpu.now_ns() - before < 50 * MILLISECOND


def test_a_graph_runs_its_operations_in_order_and_again(gpu: Gpu, spin) -> None:
    stream, start, end = gpu.create_stream(), gpu.create_event(), gpu.create_event()
    graph = gpu.create_graph([spin(2 * MILLISECOND) for _ in range(5)])
    assert graph.kernels == 5
    stream.launch_graph(graph)
    stream.synchronize()
    stream.record(start)
    stream.launch_graph(graph)
    stream.launch_graph(graph)
    stream.record(end)
    stream.synchronize()
    assert end.time_ns() - start.time_ns() == pytest.approx(20 * MILLISECOND, rel=0.5)
    graph.close()
    graph.close()


def test_a_module_names_what_it_has(gpu: Gpu, spin) -> None:
    module = spin.module
    assert module.kernel("nothing").name == "nothing"
    assert module.kernel("spin").blocks_per_sm(128, 0) >= 1
    with pytest.raises(MisuseError, match="absent"):
        module.kernel("absent")


def test_priorities_are_kept(gpu: Gpu) -> None:
    assert gpu.create_stream(priority=Priority.HIGH).priority is Priority.HIGH
    assert gpu.create_stream().priority is Priority.LOW


def test_a_split_gives_what_was_asked_rounded_up_and_the_remainder(gpu: Gpu, spin) -> None:
    info = gpu.info
    if info.level < Level.PARTITIONS:
        pytest.skip("no SM partitions here")
    split = gpu.split_sms([info.sm_minimum, info.sm_minimum])
    assert [part.sms >= info.sm_minimum for part in split.parts] == [True, True]
    assert all(part.sms % info.sm_granularity == 0 for part in split.parts)
    rest = split.remainder.sms if split.remainder else 0
    assert sum(part.sms for part in split.parts) + rest <= info.sms
    stream = gpu.create_stream(partition=split.parts[1])
    assert stream.partition is split.parts[1]
    stream.launch(spin(MILLISECOND))
    stream.synchronize()
    with pytest.raises(MisuseError):
        gpu.split_sms([info.sm_minimum])
    stream.close()


def test_a_full_partition_leaves_the_other_alone(gpu: Gpu, spin) -> None:
    info = gpu.info
    if info.level < Level.PARTITIONS or info.sms < 2 * info.sm_minimum:
        pytest.skip("no two SM partitions here")
    full, free = gpu.split_sms([info.sm_minimum, info.sm_minimum]).parts
    flood, stream = gpu.create_stream(partition=full), gpu.create_stream(partition=free)
    start, end = gpu.create_event(), gpu.create_event()
    flood.launch(spin(5 * MILLISECOND, blocks=64 * 8 * full.sms))  # several rounds, however many fit on an SM
    stream.record(start)
    stream.launch(spin(5 * MILLISECOND))
    stream.record(end)
    stream.synchronize()
    assert not flood.idle()
    assert end.time_ns() - start.time_ns() == pytest.approx(5 * MILLISECOND, rel=0.5)
    gpu.synchronize()
    flood.close()
    stream.close()


def test_impossible_splits_are_misuse(gpu: Gpu) -> None:
    for counts in ([gpu.info.sms + 1], [0], [-8], []):
        with pytest.raises(MisuseError):
            gpu.split_sms(counts)


def test_closing_twice_is_harmless(gpu: Gpu) -> None:
    stream, event = gpu.create_stream(), gpu.create_event()
    event.close()
    event.close()
    stream.close()
    stream.close()
    gpu.close()
    gpu.close()
