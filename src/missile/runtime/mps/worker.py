"""One tenant in a process of its own: `python -m missile.runtime.mps.worker FD`, with its parent at the other end of FD.

It loads its model once and serves one run after another, each when the parent says so, with the same loop and records as
every other policy. It ends when the parent closes the connection, or dies.
"""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from multiprocessing.connection import Connection

from missile.errors import MissileError, OutOfMemoryError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.runtime.loading import Roster, load_tenants
from missile.runtime.mps.protocol import Armed, Done, Failed, Go, Load, Ready, Serve
from missile.runtime.run import run

__all__ = ["main"]


class _CalledOffError(Exception):
    """The parent gave up the run while this worker was waiting for its start."""


def main(descriptor: int) -> None:
    # The terminal's Ctrl-C is the parent's; its own SIGINT ends a run early (the engine listens while one lasts).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Without its parent there is nobody to tell.
    with Connection(descriptor) as parent, suppress(EOFError, BrokenPipeError):
        try:
            _work(parent, parent.recv())
        except MissileError as error:
            parent.send(Failed(type(error).__name__, str(error)))


def _work(parent: Connection[object, object], load: object) -> None:
    assert isinstance(load, Load)
    with (
        open_gpu(load.device, seed=load.seed) as gpu,
        load_tenants(gpu, [load.tenant], cache=load.cache, overlap=load.overlap) as roster,
    ):
        (loaded,) = roster.tenants
        if loaded.error:
            raise OutOfMemoryError(loaded.error, tenant=load.tenant.name)
        parent.send(Ready(gpu.info.sms))
        while True:
            serve = parent.recv()
            assert isinstance(serve, Serve)
            # A view: the roster owns the model.
            view = Roster(gpu, [replace(loaded, tenant=serve.tenant)], ExitStack())
            with suppress(_CalledOffError):
                record = run(
                    gpu,
                    view,
                    "streams",
                    seed=serve.seed,
                    duration_ns=serve.duration_ns,
                    warmup_ns=serve.warmup_ns,
                    gate=lambda: _wait_for_start(parent, gpu),
                )
                parent.send(Done(record))
                if record.fault:
                    return


def _wait_for_start(parent: Connection[object, object], gpu: Gpu) -> None:
    parent.send(Armed())
    go = parent.recv()
    assert isinstance(go, Go)
    if go.at_ns is None:
        raise _CalledOffError
    if not gpu.info.simulated:  # a simulated clock is its process's own
        gpu.wait((), go.at_ns)


if __name__ == "__main__":
    main(int(sys.argv[1]))
