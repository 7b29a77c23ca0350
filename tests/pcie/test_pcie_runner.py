"""A copy engine on a thread of its own."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from missile.errors import GpuError, MisuseError
from missile.gpu import open_gpu
from missile.pcie.engine import CopyEngine, EngineOptions, Stop
from missile.pcie.runner import CopyThread
from missile.pcie.ticket import CopyState, CopyTicket
from missile.pcie.weights import MIB

OPTIONS = EngineOptions(h2d_rate=54e9, d2h_rate=54e9)


def test_copies_from_many_threads_arrive_and_idling_costs_nothing() -> None:
    with open_gpu("sim:h100") as gpu, CopyEngine(gpu, OPTIONS) as engine:
        names = ["a", "b", "c"]
        for name in names:
            engine.admit(name)
        hosts = {name: gpu.allocate_host(MIB) for name in names}
        devices = {name: gpu.allocate(MIB) for name in names}
        results: list[CopyTicket] = []

        def client(name: str) -> None:
            for turn in range(5):
                hosts[name].array[:] = turn
                engine.to_device(name, devices[name], hosts[name]).future().result(20)
                back = np.empty(MIB, np.uint8)
                ticket = engine.to_host(name, back, devices[name]).future().result(20)
                assert (back == turn).all()
                results.append(ticket)

        with CopyThread(engine) as runner:
            clients = [threading.Thread(target=client, args=(name,)) for name in names]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join(30)
            busy = runner.cpu_seconds
            time.sleep(0.2)
            assert runner.cpu_seconds == busy  # not one step while idle
            runner.call(lambda: engine.admit("late"))
            deadline = time.monotonic() + 10
            while True:
                try:
                    late = engine.to_device("late", devices["a"], hosts["a"])
                    break
                except MisuseError:
                    assert time.monotonic() < deadline
            assert late.future().result(20).state is CopyState.DONE
        assert len(results) == 15
        assert runner.error is None


@pytest.mark.parametrize("how", list(Stop))
def test_stopping_the_thread_settles_every_ticket(how: Stop) -> None:
    with open_gpu("sim:h100") as gpu, CopyEngine(gpu, OPTIONS) as engine:
        engine.admit("a")
        host, device = gpu.allocate_host(64 * MIB), gpu.allocate(64 * MIB)
        runner = CopyThread(engine)
        tickets = [engine.to_device("a", device, host) for _ in range(3)]
        runner.stop(how)
        runner.stop(how)
        assert all(ticket.done for ticket in tickets)
        assert how is Stop.CANCEL or all(ticket.state is CopyState.DONE for ticket in tickets)


def test_a_lost_gpu_ends_the_thread_and_its_tickets() -> None:
    with open_gpu("sim:h100") as gpu, CopyEngine(gpu, OPTIONS) as engine:
        engine.admit("a")
        host, device = gpu.allocate_host(MIB), gpu.allocate(MIB)
        lost = GpuError("cuMemcpyHtoDAsync", "CUDA_ERROR_ECC_UNCORRECTABLE", usable="nothing")

        class Broken:
            def copy_to_device(self, *args, **kwargs) -> None:
                raise lost

            def close(self) -> None: ...

        lane = next(iter(engine.lanes.values()))
        real, lane._flight._streams = lane._flight._streams, (Broken(), Broken())
        with CopyThread(engine) as runner, pytest.raises(GpuError, match="ECC"):
            engine.to_device("a", device, host).future().result(20)
        assert runner.error is lost
        for stream in real:
            stream.close()
