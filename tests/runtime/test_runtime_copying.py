"""Runs whose copies go through the link's scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.pcie.engine import CopyEngine, TenantCopies
from missile.pcie.streamed import StreamedCopies
from missile.pcie.ticket import Direction
from missile.pcie.weights import MIB
from missile.runtime import run as run_module
from missile.runtime.copying import ScheduledCopies, link_options, share_of
from missile.runtime.loading import load_tenants
from missile.runtime.run import run

SECOND = 1_000_000_000


class _Watched(ScheduledCopies):
    """Leaves its engine's accounts behind."""

    accounts: tuple[TenantCopies, ...] = ()

    def close(self) -> None:
        type(self).accounts = self._engine.statistics() or type(self).accounts
        super().close()


def test_long_copies_go_by_weight_and_class_and_short_ones_stay_in_their_streams(
    monkeypatch: pytest.MonkeyPatch, tenant: Any
) -> None:
    """ResNet-152's batch of 32 images is 9.6 MB; nobody's output is long."""
    monkeypatch.setattr(run_module, "ScheduledCopies", _Watched)
    tenants = [tenant("ls", "LS", "resnet34", rate=200), tenant("be", "BE", "resnet152")]
    with open_gpu("sim:h200") as gpu, load_tenants(gpu, tenants) as roster:
        record = run(gpu, roster, "missile", seed=0, duration_ns=SECOND // 5)
        assert not record.fault
        by_tenant = {(row.tenant, row.direction): row.totals for row in _Watched.accounts}
        for loaded in roster.tenants:
            name = loaded.tenant.name
            one = loaded.inputs[0].nbytes
            finished = next(t for t in record.tenants if t.name == name)
            copied = by_tenant[name, Direction.H2D]
            assert copied.bytes == copied.copies * one  # whole inputs, and at least one for each request
            assert copied.copies > len(finished.arrival) > 0
            assert by_tenant[name, Direction.D2H].copies == 0
        plain = run(gpu, roster, "missile:copies=off", seed=0, duration_ns=SECOND // 5)
        assert len(plain.tenants[0].arrival) == len(record.tenants[0].arrival)


def test_nothing_is_set_up_where_nobody_copies_much_at_once(gpu: Gpu, tenant: Any) -> None:
    with load_tenants(gpu, [tenant("ls", "LS", "resnet34", rate=1), tenant("be")]) as roster:
        assert ScheduledCopies.where_needed(gpu, roster.ready) is None


def test_an_ls_input_does_not_wait_for_a_long_one(gpu: Gpu, tenant: Any) -> None:
    """The same two copies on streams of their own, where the link is first come first served, and scheduled."""
    long, short = gpu.allocate_host(256 * MIB), gpu.allocate_host(MIB)
    there, here = gpu.allocate(long.nbytes), gpu.allocate(short.nbytes)
    took = {}
    for scheduled in ((), tuple(Direction)):
        with CopyEngine(gpu, link_options(gpu)) as engine:
            copies = StreamedCopies(gpu, engine, scheduled)
            copies.admit("ls", share_of(tenant("ls", "LS", rate=1)))
            copies.admit("be", share_of(tenant("be")))
            bulk, urgent, done = gpu.create_stream(), gpu.create_stream(), gpu.create_event()
            copies.to_device("be", bulk, there.address, long)
            begin = gpu.now_ns()
            copies.to_device("ls", urgent, here.address, short)
            urgent.record(done)
            while not done.done():
                copies.wait([done], begin + SECOND)
            took[scheduled] = gpu.now_ns() - begin
            while not bulk.idle():
                copies.wait([], gpu.now_ns() + 100_000)
            copies.close()
    assert took[()] > 4_000_000
    assert took[tuple(Direction)] < 200_000


def test_a_failed_copy_ends_the_run_with_its_tenant_s_name(fail_copy: Any, tenant: Any) -> None:
    tenants = [tenant("ls", "LS", "resnet34", rate=200), tenant("be", "BE", "resnet152")]
    with open_gpu("sim:h200") as gpu, load_tenants(gpu, tenants) as roster:
        link_options(gpu)
        fail_copy(gpu, 60)
        record = run(gpu, roster, "missile", seed=0, duration_ns=SECOND // 2)
        assert "cuMemcpyHtoDAsync" in record.fault
        assert not run(gpu, roster, "missile", seed=0, duration_ns=SECOND // 10).fault  # the GPU still works
