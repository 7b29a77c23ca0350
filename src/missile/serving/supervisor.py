"""The engine process as the front end sees it: started, watched, asked to load, and started anew when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from missile.errors import MissileError, MisuseError
from missile.serving.config import TenantConfig
from missile.serving.link import Link
from missile.serving.tensors import ModelSignature

__all__ = ["EngineLost", "LoadReply", "Supervisor"]

log = logging.getLogger("missile.supervisor")

_STARTUP_S = 60.0  # what an engine may take to say its first word: it imports PyTorch or opens a GPU


class EngineLost(MissileError):
    """The engine process ended while it was asked for something."""


@dataclass(frozen=True, slots=True)
class LoadReply:
    slot: int
    signature: ModelSignature
    memory_bytes: int
    notes: tuple[str, ...]


class Supervisor:
    """Owns the engine process and the link to it. Everything runs on the event loop that called `start`.

    on_answer: called for each answer. on_lost: the engine is gone, with all it held; the link is still mapped.
    on_stuck: with the slot and the seconds of a batch that never ended; the engine goes after that.
    """

    def __init__(
        self,
        folder: Path,
        hello: dict[str, Any],
        *,
        arena_bytes: int,
        watchdog_s: float,
        on_answer: Callable[[tuple[int, ...]], None],
        on_lost: Callable[[], None],
        on_stuck: Callable[[int, float], None],
    ) -> None:
        self._hello = {**hello, "folder": str(folder)}
        self._arena_bytes = arena_bytes
        self._watchdog_s = watchdog_s
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._on_stuck = on_stuck
        self._slots = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._heard = 0.0
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._stopping = False
        self.link: Link | None = None
        self.facts: dict[str, Any] = {}
        self.tenant_facts: dict[int, dict[str, Any]] = {}
        self.starts = 0
        self.started_at = 0.0

    @property
    def running(self) -> bool:
        return self.link is not None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """Start the process and wait until it can load. MissileError when it refuses (no device) or dies at once."""
        loop = asyncio.get_running_loop()
        link, theirs = Link.create(self._arena_bytes)
        descriptors = (link.memory_fd, link.call_bell.descriptor, link.answer_bell.descriptor, theirs.fileno())
        arguments = [sys.executable, "-P", "-m", "missile.serving.engine", *map(str, descriptors)]
        with theirs:
            self._process = subprocess.Popen(arguments, pass_fds=descriptors, stdin=subprocess.DEVNULL)
        self.link = link
        self.starts += 1
        self.started_at = self._heard = time.monotonic()
        self._stopping = False
        self._pidfd = os.pidfd_open(self._process.pid)
        self._ready = loop.create_future()
        loop.add_reader(self._pidfd, self._ended)
        link.answer_bell.arm()
        loop.add_reader(link.answer_bell.descriptor, self._take_answers)
        loop.add_reader(link.control.fileno(), self._take_control)
        link.control.send(self._hello)
        reply = await self._ready
        if reply["op"] == "refused":
            raise MisuseError(reply["error"])
        self.facts = reply["facts"]

    # --- what the engine is asked for

    async def load(self, tenant: TenantConfig) -> LoadReply:
        """Load a tenant's model into a new slot. MisuseError says why it can't be; EngineLost when the engine dies."""
        if self.link is None:
            raise EngineLost("The engine is not running.")
        slot = next(self._slots)
        reply = await self._ask(slot, {"op": "load", "slot": slot, "tenant": tenant.model_dump(by_alias=True)})
        if reply["op"] == "failed":
            raise MisuseError(reply["error"])
        return LoadReply(
            slot, ModelSignature.from_json(reply["signature"]), reply["memory_bytes"], tuple(reply["notes"])
        )

    async def unload(self, slot: int) -> None:
        """Unload a slot; returns when its memory has been given back, or when the engine is gone."""
        with contextlib.suppress(EngineLost):
            await self._ask(slot, {"op": "unload", "slot": slot})

    def tune(self, slot: int, tenant: TenantConfig) -> None:
        if self.link is not None:
            self.link.control.send({"op": "tune", "slot": slot, "tenant": tenant.model_dump(by_alias=True)})

    async def _ask(self, slot: int, message: dict[str, Any]) -> dict[str, Any]:
        if self.link is None or not self.link.control.send(message):
            raise EngineLost("The engine is not running.")
        future = self._waiting[slot] = asyncio.get_running_loop().create_future()
        reply: dict[str, Any] = await future
        return reply

    # --- what the engine says

    def _take_answers(self) -> None:
        link = self.link
        if link is None:
            return
        link.answer_bell.quiet()
        self._heard = time.monotonic()
        pop = link.answers.pop
        for armed in (False, True):
            while (fields := pop()) is not None:
                self._on_answer(fields)
            if not armed:
                link.answer_bell.arm()

    def _take_control(self) -> None:
        link = self.link
        while link is not None and link.control.pending():
            message = link.control.receive()
            if message is None:  # its end is closed: `_ended` follows
                asyncio.get_running_loop().remove_reader(link.control.fileno())
                return
            self._heard = time.monotonic()
            operation = message["op"]
            if operation == "facts":
                self.tenant_facts = {int(slot): facts for slot, facts in message["tenants"].items()}
            elif operation == "stuck":
                self._on_stuck(message["slot"], message["seconds"])
            elif operation in ("ready", "refused"):
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(message)
            elif (future := self._waiting.pop(message["slot"], None)) is not None and not future.done():
                future.set_result(message)

    def check(self) -> None:
        """To be called about once a second: an engine that has said nothing for too long is killed (and so restarted)."""
        starting = self._ready is not None and not self._ready.done()
        patience = max(self._watchdog_s, _STARTUP_S) if starting else self._watchdog_s
        if self.running and not self._stopping and time.monotonic() - self._heard > patience:
            log.error("the engine has been silent for %.0f s; it is killed and started anew", patience)
            self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _ended(self) -> None:
        """The process is gone: take what it had answered, then tell whoever waits."""
        link, process = self.link, self._process
        if link is None or process is None:
            return
        loop = asyncio.get_running_loop()
        self._take_answers()
        self._take_control()
        code = process.wait()
        if not self._stopping:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            log.error("the engine process ended with %s", how)
        for descriptor in (self._pidfd, link.answer_bell.descriptor, link.control.fileno()):
            loop.remove_reader(descriptor)
        os.close(self._pidfd)
        self.link = None
        self.tenant_facts = {}
        lost = EngineLost("The engine stopped.")
        waiting = [*self._waiting.values(), *([self._ready] if self._ready is not None else [])]
        self._waiting = {}
        for future in waiting:
            if not future.done():
                future.set_exception(lost)
        self._on_lost()
        link.close()

    async def stop(self, patience_s: float = 5.0) -> None:
        """Ask the engine to end, and kill it when it does not within `patience_s`."""
        self._stopping = True
        process = self._process
        if process is None or self.link is None:
            return
        self.link.control.send({"op": "stop"})
        give_up = time.monotonic() + patience_s
        while self.link is not None:
            if time.monotonic() > give_up:
                process.kill()
            await asyncio.sleep(0.01)
