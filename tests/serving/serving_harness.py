"""A server in a thread of the test process, with its engine process, on free loopback ports."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from missile.serving.config import parse_config
from missile.serving.server import Endpoints, Server

HERE = Path(__file__).parent

SERVER = """
[server]
http_port = 0
grpc_port = 0
device = "cpu"
cpu_threads = 1
drain_seconds = 5
"""


@dataclass
class Running:
    """A served configuration. `call` runs a coroutine on the server's loop."""

    server: Server
    endpoints: Endpoints
    path: Path
    loop: asyncio.AbstractEventLoop

    @property
    def http(self) -> str:
        return self.endpoints.http.removeprefix("http://")

    @property
    def grpc(self) -> str:
        return self.endpoints.grpc

    def call(self, make: Callable[[], Awaitable[Any]], timeout: float = 60.0) -> Any:
        async def run() -> Any:
            return await make()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(timeout)


class Launcher:
    """Starts servers and stops them at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[tuple[Running, threading.Thread]] = []

    def __call__(self, tenants: str, server: str = SERVER, name: str = "serve.toml") -> Running:
        path = self._folder / name
        path.write_text(server + tenants)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
        started: Future[Running] = Future()

        async def serve() -> None:
            try:
                one = Server(parse_config(path.read_text()), path)
                endpoints = await one.start()
            except BaseException as error:
                started.set_exception(error)
                return
            started.set_result(Running(one, endpoints, path, asyncio.get_running_loop()))
            await one._stop.wait()
            await one.stop()

        thread = threading.Thread(target=lambda: uvloop.run(serve()), daemon=True)
        thread.start()
        running = started.result(120)
        self._running.append((running, thread))
        return running

    def stop(self) -> None:
        for running, thread in self._running:
            running.loop.call_soon_threadsafe(running.server.request_stop)
            thread.join(30)
            assert not thread.is_alive()
