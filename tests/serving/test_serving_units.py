"""The pure parts: who holds which bytes, what runs next, how tensors are laid out and how numbers become bytes."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missile.errors import InternalError
from missile.serving.arena import MINIMUM_BLOCK, Arena
from missile.serving.awake import LEAST_PROCESSORS, Awake
from missile.serving.engine.queues import BatchLimits, Scheduler
from missile.serving.engine.spin import Spin
from missile.serving.link import Call, CallKind
from missile.serving.measures import Measures
from missile.serving.protocol.eager import Eager
from missile.serving.protocol.request import from_numbers, to_numbers
from missile.serving.protocol.rest import InferDecoder
from missile.serving.refusal import Refusal
from missile.serving.ring import Ring
from missile.serving.tensors import (
    DATATYPES,
    BlockLayout,
    ModelSignature,
    TensorSignature,
    bf16_to_float,
    float_to_bf16,
)

# --- arena


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40 * MINIMUM_BLOCK)), max_size=80))
def test_arena_blocks_never_overlap_and_all_comes_back(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(64 * MINIMUM_BLOCK)
    held: dict[int, int] = {}
    for take, number in steps:
        if take:
            offset = arena.allocate(number)
            if offset is None:
                assert arena.used + Arena.block_bytes(number) > arena.nbytes // 2 or held
                continue
            size = Arena.block_bytes(number)
            assert size >= max(1, number)
            assert offset + size <= arena.nbytes
            assert all(offset + size <= start or start + length <= offset for start, length in held.items())
            held[offset] = size
        elif held:
            offset = sorted(held)[number % len(held)]
            arena.free(offset)
            del held[offset]
        assert arena.used == sum(held.values())
    for offset in held:
        arena.free(offset)
    assert arena.allocate(arena.nbytes) == 0


def test_arena_refuses_to_free_what_it_has_not_given() -> None:
    arena = Arena(1 << 20)
    offset = arena.allocate(100)
    assert offset is not None
    arena.free(offset)
    with pytest.raises(InternalError, match="no block"):
        arena.free(offset)


# --- ring


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=60))
def test_ring_keeps_order_and_loses_nothing(bursts: list[int]) -> None:
    record = struct.Struct("<QQ")
    ring = Ring(memoryview(bytearray(Ring.nbytes(record, 4))), record, 4)
    sent = received = 0
    for index, burst in enumerate(bursts):
        for _ in range(burst):
            if index % 2 == 0:
                fits = len(ring) < 4
                assert ring.push(sent, sent * 7) is fits
                sent += fits
            elif (fields := ring.pop()) is not None:
                assert fields == (received, received * 7)
                received += 1
    while (fields := ring.pop()) is not None:
        assert fields[0] == received
        received += 1
    assert received == sent


# --- scheduler


def _call(number: int, slot: int, arrival: int = 0, *, batch: int = 1, priority: int = 0, deadline: int = 0) -> Call:
    return Call(CallKind.INFER, slot, number, batch, 0, priority, arrival, deadline)


LS = BatchLimits(latency_sensitive=True, slo_ns=1000)
BE = BatchLimits(latency_sensitive=False)


def test_ls_goes_by_the_end_of_its_slo() -> None:
    scheduler = Scheduler()
    scheduler.add(1, BatchLimits(latency_sensitive=True, slo_ns=5000))
    scheduler.add(2, BatchLimits(latency_sensitive=True, slo_ns=1000))
    scheduler.push(_call(1, 1, arrival=0))
    scheduler.push(_call(2, 2, arrival=3000))
    assert scheduler.ready(True, 3000) == 2
    assert scheduler.ready(False, 3000) is None


def test_be_shares_by_weight() -> None:
    scheduler = Scheduler()
    scheduler.add(1, BatchLimits(latency_sensitive=False, weight=3.0))
    scheduler.add(2, BatchLimits(latency_sensitive=False, weight=1.0))
    served = {1: 0, 2: 0}
    for number in range(400):
        for slot in (1, 2):
            scheduler.push(_call(2 * number + slot, slot))
        slot = scheduler.ready(False, 0)
        assert slot is not None
        scheduler.take(slot, 0)
        scheduler.done(slot, 100)
        served[slot] += 1
    assert served[1] / served[2] == pytest.approx(3.0, rel=0.02)


def test_a_be_tenant_that_was_away_gets_no_credit() -> None:
    scheduler = Scheduler()
    scheduler.add(1, BE)
    scheduler.add(2, BE)
    for number in range(100):
        scheduler.push(_call(number, 1))
    for _ in range(50):
        scheduler.take(1, 0)
        scheduler.done(1, 1000)
    order = []
    for number in range(20):
        scheduler.push(_call(1000 + number, 2))
    for _ in range(10):
        slot = scheduler.ready(False, 0)
        assert slot is not None
        scheduler.take(slot, 0)
        scheduler.done(slot, 1000)
        order.append(slot)
    assert order.count(1) == 5


def test_batches_wait_for_others_but_no_longer_than_their_rule() -> None:
    scheduler = Scheduler()
    scheduler.add(1, BatchLimits(latency_sensitive=False, max_items=4, delay_ns=100))
    scheduler.push(_call(1, 1, arrival=1000))
    assert scheduler.ready(False, 1099) is None
    assert scheduler.next_due_ns() == 1100
    assert scheduler.ready(False, 1100) == 1
    scheduler.push(_call(2, 1, arrival=1010, batch=3))
    assert scheduler.ready(False, 1020) == 1  # full before its time
    scheduler.push(_call(3, 1, arrival=1015))
    run, _, _ = scheduler.take(1, 1020)
    assert [call.id for call in run] == [1, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2), st.sampled_from([0, 0, 5, 50])), max_size=40), st.data()
)
def test_every_call_comes_out_once(calls: list[tuple[int, int, int]], data: st.DataObject) -> None:
    scheduler = Scheduler()
    scheduler.add(1, BatchLimits(latency_sensitive=False, max_items=6))
    for number, (batch, priority, deadline) in enumerate(calls):
        scheduler.push(_call(number, 1, batch=batch, priority=priority, deadline=deadline))
    cancelled = {n for n in range(len(calls)) if data.draw(st.booleans()) and scheduler.cancel(n)}
    out: list[int] = []
    while (slot := scheduler.ready(False, 10)) is not None:
        run, expired, dropped = scheduler.take(slot, 10)
        assert sum(call.batch for call in run) <= 6
        assert all(call.deadline_ns == 5 for call in expired)
        assert {call.id for call in dropped} <= cancelled
        assert not {call.id for call in run} & cancelled
        out += [call.id for call in (*run, *expired, *dropped)]
        if run:
            scheduler.done(slot, 1)
    assert sorted(out) == list(range(len(calls)))
    assert scheduler.waiting(1) == 0


# --- tensors

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.lists(st.tuples(st.sampled_from(sorted(DATATYPES)), SHAPES), min_size=0, max_size=4)


@given(TENSORS, TENSORS, st.integers(0, 8))
def test_layout_places_everything_apart(
    ins: list[tuple[str, tuple[int, ...]]], outs: list[tuple[str, tuple[int, ...]]], batch: int
) -> None:
    def tensors(those: list[tuple[str, tuple[int, ...]]]) -> tuple[TensorSignature, ...]:
        return tuple(TensorSignature(f"t{i}", d, s) for i, (d, s) in enumerate(those))

    signature = ModelSignature(tensors(ins), tensors(outs), batch)
    layout = BlockLayout.of(signature, max(1, batch))
    places = sorted(zip((*layout.inputs, *layout.outputs), (*layout.input_sizes, *layout.output_sizes), strict=True))
    end = 0
    for start, size in places:
        assert start >= end
        assert start % 64 == 0
        end = start + size
    assert end <= layout.nbytes
    assert layout.error + 1024 <= layout.nbytes
    assert all(start + size <= layout.error for start, size in zip(layout.inputs, layout.input_sizes, strict=True))
    assert ModelSignature.from_json(signature.as_json()) == signature


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_bf16_rounds_to_nearest(values: list[float]) -> None:
    array = np.array(values, np.float32)
    back = bf16_to_float(float_to_bf16(array))
    finite = np.isfinite(back)
    assert np.all(np.abs(back - array)[finite] <= np.maximum(np.abs(array[finite]) * 2.0**-8, 2.0**-133))
    np.testing.assert_array_equal(float_to_bf16(back[finite]), float_to_bf16(array)[finite])


@given(st.sampled_from([n for n in DATATYPES if n not in ("BOOL", "BF16", "FP16")]), st.data())
def test_numbers_survive_the_way_through_json(name: str, data: st.DataObject) -> None:
    datatype = DATATYPES[name]
    if datatype.floating:
        numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    else:
        info = np.iinfo(datatype.numpy)
        numbers = st.integers(int(info.min), int(info.max))
    values = data.draw(st.lists(numbers, max_size=12))
    raw = from_numbers(values, datatype, len(values) * datatype.nbytes, "x")
    assert to_numbers(raw, datatype) == values


@pytest.mark.parametrize(
    ("numbers", "datatype", "message"),
    [
        ([256], "UINT8", "whole numbers from 0 to 255"),
        ([-1], "UINT64", "whole numbers from 0"),
        ([1.5], "INT32", "whole numbers"),
        (["a"], "FP32", "must be numbers"),
        ([True], "INT8", "whole numbers"),
        ([2], "BOOL", "booleans"),
        ([1e39], "FP32", "beyond FP32"),
        ([70000], "FP16", "beyond FP16"),
        ([[1], [1, 2]], "FP32", "ragged"),
        ([None], "FP32", "must be numbers"),
        ([2**70], "INT64", "whole numbers"),
        ([1, 2], "FP32", "needs 1 values"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers: list[object], datatype: str, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        from_numbers(numbers, DATATYPES[datatype], DATATYPES[datatype].nbytes, "x")


# --- measures


def test_attainment_and_burn() -> None:
    measures = Measures(slo_ns=1000, objective=0.9)
    for second in range(10):
        for index in range(10):
            measures.record(2000 if index == 0 and second < 5 else 500, 1, 2, 3, 4, items=1, batch=1, first=1)
        if second == 0:
            measures.refuse("overloaded", owed=True)
            measures.refuse("invalid", owed=False)
        measures.tick(second)
    assert measures.attainment(300) == pytest.approx(95 / 101)
    assert measures.attainment(5) == 1.0
    assert measures.burn(300) == pytest.approx((6 / 101) / 0.1)
    assert measures.rate() == 10.0
    assert Measures().attainment(10) is None


# --- staying awake


@given(st.integers(1, 10**7), st.integers(1, 400))
def test_spinning_follows_the_rate_of_calls(limit: int, percent: int) -> None:
    """Calls that come evenly keep the engine awake exactly when their gap is within the limit, and only for a while."""
    spin = Spin(limit)
    gap = max(1, limit * percent // 100)
    now = 10**12
    for _ in range(200):
        now += gap
        spin.called(now)
    if gap <= 0.99 * limit:
        assert now + 2 * gap <= spin.until_ns(now) <= now + 3 * limit
    elif gap >= 1.01 * limit:
        assert spin.until_ns(now) == 0


def test_spinning_is_not_put_off_long_by_a_pause() -> None:
    spin = Spin(4_000_000)
    now = 10**12
    for _ in range(30):
        now += 1_000_000
        spin.called(now)
    now += 3600 * 10**9
    assert spin.until_ns(now) < now
    for _ in range(16):
        now += 1_000_000
        spin.called(now)
    assert spin.until_ns(now) > now
    assert Spin(0).until_ns(now) == 0


def _awake_for(processors: int, gap_s: float, calls: int, *, held_up: bool = False) -> tuple[list[bool], bool]:
    """Whether the event loop stayed awake after each of some calls, and whether it still is once none has come for long.

    held_up: its thread has no processor between two calls.
    """

    async def run() -> tuple[list[bool], bool]:
        awake = Awake(20_000_000, processors=processors)
        seen = []
        for _ in range(calls):
            awake.called(time.monotonic_ns())
            seen.append(awake.turning)
            if held_up:
                time.sleep(gap_s)
            await asyncio.sleep(0 if held_up else gap_s)
        await asyncio.sleep(0.2)
        return seen, awake.turning

    return asyncio.run(run())


def test_the_front_end_stays_awake_while_calls_come_where_there_are_processors() -> None:
    seen, after = _awake_for(LEAST_PROCESSORS, 0.001, 60)
    assert not seen[0]
    assert any(seen)
    assert not after
    assert not any(_awake_for(LEAST_PROCESSORS - 1, 0.001, 60)[0])
    assert not any(_awake_for(LEAST_PROCESSORS, 0.03, 8)[0])  # seldom


def test_a_front_end_that_has_to_wait_for_a_processor_sleeps_for_a_while() -> None:
    seen, _ = _awake_for(LEAST_PROCESSORS, 0.001, 60, held_up=True)
    assert 1 <= sum(seen) <= 2  # 60 calls take less than the time for which it then leaves off, and not twice as long


def test_who_loses_the_processor_while_spinning_sleeps_for_a_while() -> None:
    spin = Spin(4_000_000)
    now = 10**12
    for _ in range(30):
        now += 1_000_000
        spin.called(now)
    assert spin.until_ns(now) > now
    for _ in range(100):
        now += 5_000
        assert not spin.stolen(now)
    now += 2_000_000
    assert spin.stolen(now)
    spin.called(now)
    assert spin.until_ns(now) == 0
    for _ in range(300):
        now += 1_000_000
        spin.called(now)
    assert spin.until_ns(now) > now


# --- heads that were read before


def _decode(decoder: InferDecoder, head: dict[str, Any], tail: bytes = b"") -> Any:
    text = json.dumps(head).encode()
    return decoder.decode(memoryview(text + tail), str(len(text)) if tail else None)


def test_a_known_head_takes_its_new_data() -> None:
    decoder = InferDecoder(8)
    entry = {"name": "a", "datatype": "UINT8", "shape": [1, 3], "parameters": {"binary_data_size": 3}}
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 1}
    region = {"name": "b", "datatype": "UINT8", "shape": [1], "parameters": place}
    head = {"inputs": [entry, region], "id": "x", "parameters": {"priority": 3}}
    for data in (b"abc", b"def"):
        asked = _decode(decoder, head, data)
        assert [None if one.raw is None else bytes(one.raw) for one in asked.inputs] == [data, None]
        assert (asked.id, asked.parameters["priority"], asked.inputs[1].region) == ("x", 3, ("r", 0, 1))
    for wrong in (b"", b"ab", b"abcd"):
        with pytest.raises(Refusal, match="binary data"):
            _decode(decoder, head, wrong)
    assert bytes(_decode(decoder, head, b"ghi").inputs[0].raw) == b"ghi"


def test_heads_with_numbers_are_read_each_time() -> None:
    decoder = InferDecoder(8)
    for number in range(3):
        asked = _decode(decoder, {"inputs": [{"name": "a", "datatype": "INT8", "shape": [1], "data": [number]}]})
        assert asked.inputs[0].numbers == [number]
    with pytest.raises(Refusal, match="at most 8"):
        _decode(decoder, {"inputs": [{"name": "a"}] * 9})


# --- coroutines that start at once


def test_eager_starts_at_once_and_goes_on_as_a_task_would() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        steps: list[str] = []
        first, second = loop.create_future(), loop.create_future()

        async def work() -> None:
            steps.append("started")
            steps.append(await first)
            await asyncio.sleep(0)
            try:
                await second
            except asyncio.CancelledError:
                await asyncio.sleep(0.001)  # cancelled once, it may still wait
                steps.append("cancelled")
                raise

        eager = Eager(work())
        assert steps == ["started"]
        first.set_result("first")
        for _ in range(4):
            await asyncio.sleep(0)
        assert steps == ["started", "first"]
        eager.cancel()
        await asyncio.sleep(0.05)
        assert steps == ["started", "first", "cancelled"]
        assert eager.done
        eager.cancel()

    asyncio.run(main())


def test_eager_takes_a_cancellation_that_meets_a_result() -> None:
    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        seen: list[str] = []

        async def work() -> None:
            try:
                seen.append(await future)
            except asyncio.CancelledError:
                seen.append("cancelled")

        eager = Eager(work())
        future.set_result("late")
        eager.cancel()
        await asyncio.sleep(0.01)
        assert seen == ["cancelled"]
        assert eager.done

    asyncio.run(main())


def test_eager_logs_what_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def work() -> None:
            raise ValueError("broken")

        assert Eager(work()).done

    asyncio.run(main())
    assert "failed unexpectedly" in caplog.text
