"""The front-end process: everything put together, started, reloaded and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from missile.errors import MissileError, MisuseError, UnsupportedError
from missile.serving.access import Access
from missile.serving.config import ServerConfig, ServingConfig, read_config
from missile.serving.gateway import Gateway
from missile.serving.metrics import Metrics
from missile.serving.protocol.http1 import HttpServer
from missile.serving.protocol.http_api import HttpApi
from missile.serving.refusal import Reason, Refusal
from missile.serving.regions import Regions
from missile.serving.registry import Registry
from missile.serving.services import Services
from missile.serving.supervisor import EngineLost, Supervisor

__all__ = ["Endpoints", "Server"]

log = logging.getLogger("missile.server")

_QUICK_DEATH_S = 10.0  # an engine that lives shorter than this is started again with growing delay
_LONGEST_DELAY_S = 10.0


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the server can be reached. grpc "" when it is turned off."""

    http: str
    grpc: str


class Server:
    """One server. `start`, then `run` until a signal or `request_stop`, or `stop` directly.

    path: the configuration's file, for reloads; relative paths in it start from its folder.
    """

    def __init__(self, config: ServingConfig, path: Path) -> None:
        self._path = path
        self._folder = path.resolve().parent
        self._config = config
        server = config.server
        self._gateway = Gateway(1000 * server.spin_us)
        self._supervisor = Supervisor(
            self._folder,
            {
                "device": server.device,
                "policy": server.policy_text,
                "channel_map": str(self._folder / server.channel_map) if server.channel_map else "",
                "cpu_threads": server.cpu_threads,
                "swap_mib": server.swap_mib,
                "spin_us": server.spin_us,
                "watchdog_s": server.watchdog_seconds,
            },
            arena_bytes=server.limits.arena_mib << 20,
            watchdog_s=server.watchdog_seconds,
            on_answer=self._gateway.take_answer,
            on_lost=self._engine_lost,
            on_stuck=self._engine_stuck,
        )
        self._registry = Registry(self._supervisor, drain_s=server.drain_seconds)
        self.services = Services(
            config=server,
            access=Access.of(server, self._folder),
            registry=self._registry,
            gateway=self._gateway,
            regions=Regions(enabled=server.shared_memory_on),
            supervisor=self._supervisor,
            reload=self.reload,
            started_at=time.monotonic(),
        )
        self._metrics = Metrics(self.services)
        self._http: HttpServer | None = None
        self._grpc: Any = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._restarts = 0
        self._stop = asyncio.Event()
        self._reloading = asyncio.Lock()

    async def start(self) -> Endpoints:
        """Listen, start the engine and load the tenants. A tenant that can't be loaded is said so; the others serve.

        MisuseError when a port, a certificate or the device can't be had.
        """
        server = self._config.server
        try:
            await self._supervisor.start()
        except EngineLost:
            raise MissileError("The engine process ended while it was being started; its log says why.") from None
        if self._supervisor.link is not None:
            self._gateway.attach(self._supervisor.link)
        log.info("device: %s (isolation: %s)", self._supervisor.facts["name"], self._supervisor.facts["isolation"])
        api = HttpApi(self.services, self._metrics)
        self._http = HttpServer(api.handle, server.limits, lambda r: self._metrics.count_refusal(r.reason.label))
        try:
            http_port = await self._http.start(server.host, server.http_port, _tls(server, self._folder))
            grpc_port = await self._start_grpc(server)
        except OSError as error:
            await self._supervisor.stop()
            raise MisuseError(
                f"{server.host}:{server.http_port} can't be listened on: {error.strerror or error}."
            ) from error
        except MissileError:
            await self._supervisor.stop()
            raise
        self._spawn(self._tick())
        host = f"[{server.host}]" if ":" in server.host else server.host
        scheme = "https" if server.tls_certificate else "http"
        await self._registry.apply(self._config.tenants)
        gc.collect()
        gc.freeze()  # what lives as long as the server is not to be looked through while requests wait
        return Endpoints(f"{scheme}://{host}:{http_port}", f"{host}:{grpc_port}" if grpc_port else "")

    async def _start_grpc(self, server: ServerConfig) -> int:
        """The port, or 0 when gRPC is turned off."""
        if server.grpc_port < 0:
            return 0
        try:
            from missile.serving.protocol.grpc_api import GrpcApi, start_grpc
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                f"gRPC needs the package {error.name!r}; install missile[serve], or set server.grpc_port = -1."
            ) from error
        api = GrpcApi(self.services, self._metrics)
        self._grpc, port = await start_grpc(api, server, self._folder)
        return port

    async def run(self, *, on_signal: Callable[[str], None] | None = None) -> None:
        """Serve until SIGINT or SIGTERM (or `request_stop`); SIGHUP reloads. Then drain and stop."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if on_signal is not None:
                on_signal("stopping: running requests are finished first")
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._reload_quietly()))
        await self._stop.wait()
        await self.stop()

    def request_stop(self) -> None:
        self._stop.set()

    async def stop(self) -> None:
        """Refuse new requests, let running ones end for at most `drain_seconds`, stop the engine, hang up."""
        self.services.draining = True
        give_up = time.monotonic() + self._config.server.drain_seconds
        while self._gateway.pending and time.monotonic() < give_up:
            await asyncio.sleep(0.01)
        if self._grpc is not None:
            await self._grpc.stop(1.0)
        if self._http is not None:
            await self._http.stop(1.0)
        for task in self._tasks:
            task.cancel()
        await self._supervisor.stop()
        self._gateway.close()
        self.services.regions.close()

    # --- reload

    async def reload(self) -> dict[str, list[str]]:
        """Read the configuration again and make the tenants those that it names. Nothing changes when it is not valid.

        The server's own section takes effect at the next start; that it changed is logged.
        """
        async with self._reloading:
            try:
                config = read_config(self._path)
            except MisuseError as error:
                raise Refusal(Reason.INVALID, f"The configuration was not reloaded: {error}") from error
            if config.server != self._config.server:
                log.warning("the [server] section changed; that takes effect when the server is started again")
            done = await self._registry.apply(config.tenants)
            self._config = config.model_copy(update={"server": self._config.server})
            log.info("reloaded: %s", ", ".join(f"{k} {' '.join(v)}" for k, v in done.items() if v) or "nothing changed")
            return done

    async def _reload_quietly(self) -> None:
        try:
            await self.reload()
        except MissileError as error:
            log.error("%s", error)

    # --- the engine's life

    def _engine_lost(self) -> None:
        self._gateway.lose()
        self._registry.lose()
        if not self.services.draining and not self._stop.is_set():
            self._spawn(self._restart())

    def _engine_stuck(self, slot: int, seconds: float) -> None:
        for tenant in self._registry.tenants.values():
            if tenant.deployment is not None and tenant.deployment.slot == slot:
                log.error("a batch of tenant %s has been running for %.0f s; the engine ends", tenant.name, seconds)

    async def _restart(self) -> None:
        lived = time.monotonic() - self._supervisor.started_at
        self._restarts = 0 if lived > _QUICK_DEATH_S else self._restarts + 1
        if self._restarts:
            await asyncio.sleep(min(_LONGEST_DELAY_S, 0.25 * 2 ** (self._restarts - 1)))
        log.warning("the engine is started again (start number %d)", self._supervisor.starts + 1)
        try:
            await self._supervisor.start()
        except EngineLost:
            return  # `_engine_lost` was called again
        except MissileError as error:
            log.error("the engine can't be started again: %s", error)
            return
        if self._supervisor.link is not None:
            self._gateway.attach(self._supervisor.link)
        await self._registry.reload_all()

    async def _tick(self) -> None:
        """Close the tenants' seconds, and look after the engine."""
        second = int(time.time())
        while True:
            while (left := second + 1 - time.time()) > 0:  # timers may ring a little early
                await asyncio.sleep(left)
            for tenant in self._registry.tenants.values():
                tenant.measures.tick(second)
            self._supervisor.check()
            second = max(second + 1, int(time.time()) - 5)  # after a suspension, don't make up for all of it

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            if (error := task.exception()) is not None:
                log.error("a background task failed", exc_info=error)


def _tls(server: ServerConfig, folder: Path) -> ssl.SSLContext | None:
    if server.tls_certificate is None or server.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(folder / server.tls_certificate, folder / server.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise MisuseError(f"server.tls_certificate and tls_key can't be used: {error}.") from error
    return context
