"""The worker processes of the `mps` policy as their parent sees them: started, told, heard, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from missile.runtime.mps.protocol import Failed

__all__ = ["Worker", "hear"]

_STOP_S = 5.0
_AFTER_INTERRUPT_S = 15.0


class Worker:
    """A process that runs `mps_worker` for `tenant`, from construction to `end`. environment: added to this one's.

    log: gets what it prints. sms: how many SMs it sees, 0 until it has said so.
    """

    def __init__(self, tenant: str, environment: Mapping[str, str], log: Path) -> None:
        self.tenant = tenant
        self.sms = 0
        self._log = log
        ours, theirs = socket.socketpair()
        with theirs, log.open("wb") as printed:
            self.connection: Connection[Any, Any] = Connection(ours.detach())
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "missile.runtime.mps.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is for the parent, which passes it on
            )

    def send(self, message: object) -> None:
        """Never raises: whoever listens for the answer will hear that the worker is gone."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def receive(self) -> object:
        """Its next message; `Failed` when it has ended."""
        try:
            message: object = self.connection.recv()
        except (EOFError, OSError):
            return Failed("", f"Tenant {self.tenant!r}'s process ended {self._how()}.")
        return message

    def _how(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_S)
        status = self.process.returncode
        if status is not None and status < 0:
            return f"by signal {signal.Signals(-status).name}"
        said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"with status {status}" + (f": {said[-1].strip()}" if said else "")

    def interrupt(self) -> None:
        """End its run early; it answers with what it has."""
        self.process.send_signal(signal.SIGINT)

    def hang_up(self) -> None:
        """Close the connection: an idle worker then ends by itself."""
        self.connection.close()

    def end(self) -> None:
        """End the process, by force when it doesn't end by itself. Idempotent."""
        self.hang_up()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def hear(workers: Iterable[Worker], limit_s: float, doing: str, *, pass_on: bool = False) -> dict[str, object]:
    """One answer from each worker, by tenant; `Failed` from those that ended, or said nothing for `limit_s`, and are killed.

    doing: what they are asked for, for that sentence. pass_on: Ctrl-C interrupts the workers instead of this call, once.
    """
    waiting = {worker.connection: worker for worker in workers}
    answers: dict[str, object] = {}
    end = time.monotonic() + limit_s
    while waiting:
        try:
            ready = wait(list(waiting), max(end - time.monotonic(), 0.0))
        except KeyboardInterrupt:
            if not pass_on:
                raise
            pass_on, end = False, time.monotonic() + _AFTER_INTERRUPT_S
            for worker in waiting.values():
                worker.interrupt()
            continue
        if not ready:
            for worker in waiting.values():
                worker.process.kill()
                text = f"Tenant {worker.tenant!r}'s process was killed: it was not done with {doing} in {limit_s:g} s."
                answers[worker.tenant] = Failed("", text)
            break
        for connection in ready:
            worker = waiting.pop(connection)  # type: ignore[call-overload]
            answers[worker.tenant] = worker.receive()
    return answers
