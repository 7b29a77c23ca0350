"""The kernel that fills colored memory: every byte of the range, once, and no other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_cases import SHAPES, translation

from missile.coloring.shape import LOGICAL_BASE
from missile.compiler.ptx.access import AccessKind
from missile.compiler.ptx.fill import FILL, fill_entry
from missile.compiler.ptx.interpret import Thread, run_thread
from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.transfer import THREADS, blocks_for, transfer_ptx

BASE, TABLE = 0x7F12_0000_0000, 0x7E00_0000_0000


@pytest.mark.parametrize("form", SHAPES)
@settings(max_examples=6, deadline=None)
@given(start=st.integers(0, 5000), size=st.integers(1, 300))
def test_a_range_is_filled_and_nothing_else(form: str, start: int, size: int) -> None:
    shape = SHAPES[form]
    bound = translation(shape, np.random.default_rng(2))
    module = parse(transfer_ptx(shape) + fill_entry(shape))
    (function,) = [f for f in module.functions if f.name == FILL]
    parameters = [
        (LOGICAL_BASE + start).to_bytes(8, "little"),
        size.to_bytes(8, "little"),
        (0xAB).to_bytes(4, "little"),
        bound.constants(BASE, table=TABLE),
    ]
    filled: list[int] = []
    # As many threads as do anything, and one more; the grid holds them all.
    count = (start % 16 + size + 15) // 16 + 1
    assert count - 1 <= blocks_for(size + 15) * THREADS
    for index in range(count):
        block, lane = divmod(index, THREADS)
        thread = Thread(
            parameters, (lane, 0, 0), (block, 0, 0), (THREADS, 1, 1), table=bound.table().tobytes(), table_address=TABLE
        )
        touched = [t.address for t in run_thread(module, function, thread) if t.kind is AccessKind.STORE]
        first = LOGICAL_BASE + start // 16 * 16 + 16 * index - LOGICAL_BASE
        whole = first >= start and first + 16 <= start + size
        filled += [touched[0] + i for i in range(16)] if whole else touched
        assert len(touched) == (1 if whole else len(range(max(first, start), min(first + 16, start + size))))
    assert filled == (BASE + bound.physical(np.arange(start, start + size))).tolist()
