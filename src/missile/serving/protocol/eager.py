"""A coroutine that starts at once, not in the event loop's next turn: half of a small request's wait was that turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

__all__ = ["Eager"]

log = logging.getLogger("missile.http")


class Eager:
    """Runs `work` up to its first wait before the constructor returns, and on from there as a task would.

    `work` may await futures and whatever consists of them. It is not a task: `asyncio.timeout` and others that ask for the
    current task don't work in it. What it raises is logged.
    """

    __slots__ = ("_cancelled", "_waiting", "_work", "done")

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self._work = work
        self._waiting: asyncio.Future[Any] | None = None
        self._cancelled = False
        self.done = False
        self._step(None)

    def cancel(self) -> None:
        """Raise CancelledError where it waits, in a later turn of the loop. Nothing happens when it is over."""
        if not self.done:
            self._cancelled = True
            if self._waiting is not None:
                self._waiting.cancel()

    def _step(self, waited: asyncio.Future[Any] | None) -> None:
        self._waiting = None
        try:
            if self._cancelled:
                self._cancelled = False
                future = self._work.throw(asyncio.CancelledError())
            else:
                future = self._work.send(None)
        except StopIteration:
            self.done = True
            return
        except asyncio.CancelledError:
            self.done = True
            return
        except BaseException as error:
            self.done = True
            log.error("a connection failed unexpectedly", exc_info=error)
            return
        if future is None:  # a bare yield: `asyncio.sleep(0)`
            asyncio.get_running_loop().call_soon(self._step, None)
            return
        future._asyncio_future_blocking = False
        self._waiting = future
        future.add_done_callback(self._step)
        if self._cancelled:
            future.cancel()
