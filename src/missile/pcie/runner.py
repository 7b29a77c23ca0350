"""Owners of a copy engine that sleep between its steps: a loop's pause, and a thread of its own."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final

from missile.errors import MissileError
from missile.gpu.interface import Event, Gpu
from missile.pcie.engine import CopyEngine, Stop

__all__ = ["CopyThread", "Sleeper"]

_PR_SET_TIMERSLACK: Final = 29  # linux/prctl.h
# In virtual machines a step that follows a short sleep was seen to cost 40 us of CPU, sleep included, one in a hot loop 5:
# sleeping between short chunks would save no CPU and cost the link its work.
_SPIN_BELOW_NS: Final = 60_000


class Sleeper:
    """Waits for a time without burning a core; `wake` ends the wait early, from any thread.

    Made on the thread that waits: Linux may be up to 50 us late with a thread's sleeps unless the thread says otherwise.
    On a simulated GPU, whose clock only moves when somebody waits for it, it waits through the GPU.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._simulated = gpu.info.simulated
        self._signal = threading.Lock()
        self._signal.acquire()
        if not self._simulated and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)

    def wait(self, events: Sequence[Event], deadline_ns: int | None) -> None:
        """Return at `deadline_ns` (None: never), when woken, or earlier when a simulated GPU reached one of `events`."""
        if deadline_ns is None:
            self._signal.acquire()
        elif self._simulated:
            self._gpu.wait(events, deadline_ns)
        elif (left := deadline_ns - self._gpu.now_ns()) > _SPIN_BELOW_NS:
            self._signal.acquire(timeout=left * 1e-9)

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake already
            self._signal.release()


class CopyThread:
    """Drives an engine from a thread of its own; idle, it is blocked and uses no CPU.

    For processes whose other threads leave the interpreter alone: one that computes in Python delays every step by up to
    `sys.getswitchinterval()`. An engine loop that owns the GPU anyway calls `CopyEngine.step` itself instead.
    """

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine
        self._sleeper: Sleeper | None = None
        self._stop: Stop | None = None
        self._calls: list[Callable[[], None]] = []
        self.error: MissileError | None = None
        self.cpu_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="missile-pcie", daemon=True)
        started = threading.Event()
        self._started = started
        self._thread.start()
        started.wait()

    def __enter__(self) -> CopyThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(Stop.DRAIN if kind is None else Stop.CANCEL)

    def call(self, action: Callable[[], None]) -> None:
        """Run `action` on the engine's thread, soon: for what belongs to its owner (`admit`, `remove`)."""
        self._calls.append(action)
        self._wake()

    def stop(self, how: Stop = Stop.DRAIN) -> None:
        """Drain or cancel what is queued, and end the thread. Idempotent. The engine is not closed."""
        self._stop = self._stop or how
        self._wake()
        self._thread.join()

    def _wake(self) -> None:
        if self._sleeper is not None:
            self._sleeper.wake()

    def _run(self) -> None:
        engine = self._engine
        sleeper = self._sleeper = Sleeper(engine.gpu)
        engine.wake = sleeper.wake
        self._started.set()
        begin = time.thread_time()
        try:
            while True:
                while self._calls:
                    self._calls.pop(0)()
                if self._stop is not None:
                    engine.stop(self._stop)
                    if not engine.busy:
                        return
                again = engine.step()
                self.cpu_seconds = time.thread_time() - begin
                if again is not None or not (self._calls or self._stop):
                    sleeper.wait(engine.events(), again)
        except MissileError as error:  # the GPU is lost: every ticket has failed with it
            self.error = error
        finally:
            engine.wake = _nothing


def _nothing() -> None: ...
