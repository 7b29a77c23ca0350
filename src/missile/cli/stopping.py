"""Ending a long run in order when a signal asks for it (`timeout`, a job scheduler, `kill`)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["stopping_on_sigterm"]


@contextmanager
def stopping_on_sigterm() -> Iterator[Callable[[], None]]:
    """Inside, SIGTERM ends the run that lasts as Ctrl-C does, and makes what this yields, called between runs, raise
    KeyboardInterrupt. Nowhere else: models are loaded and taken down whole. Only on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked = False
    outside = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if signal.getsignal(signal.SIGINT) is not outside:  # a run has put its own in place, which ends it in order
            signal.raise_signal(signal.SIGINT)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield check
    finally:
        signal.signal(signal.SIGTERM, before)
