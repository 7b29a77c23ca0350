"""`missile serve`: serve the tenants of a configuration until told to stop."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from missile.cli.output import JsonOption, stderr_console
from missile.errors import UnsupportedError

__all__ = ["command"]


def command(
    config: Annotated[Path, typer.Argument(help="The configuration, a TOML file (docs/serving.md).", metavar="CONFIG")],
    device: Annotated[
        str | None,
        typer.Option("--device", "-d", help="auto, cpu or cuda:N; overrides the configuration's.", metavar="DEVICE"),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the configuration.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Serve tenants behind the Open Inference Protocol (REST and gRPC), with metrics and a live view.

    SIGHUP reads the configuration again without dropping requests; SIGINT and SIGTERM finish what runs, then stop.
    """
    try:
        import uvloop

        from missile.serving.config import read_config
        from missile.serving.server import Server
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"Serving needs the package {error.name!r}; install missile[serve].") from error
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    parsed = read_config(config)
    if device is not None:
        parsed = parsed.model_copy(update={"server": parsed.server.model_copy(update={"device": device})})
    if check:
        _say(
            as_json,
            {"tenants": [t.name for t in parsed.tenants]},
            f"{config} is valid: {len(parsed.tenants)} tenant(s).",
        )
        return

    async def serve() -> None:
        server = Server(parsed, config)
        endpoints = await server.start()
        ready = {"http": endpoints.http, "grpc": endpoints.grpc, "device": server.services.supervisor.facts}
        _say(
            as_json,
            ready,
            f"serving {len(parsed.tenants)} tenant(s): {endpoints.http} (view, REST, /metrics)"
            + (f", gRPC {endpoints.grpc}" if endpoints.grpc else ""),
        )
        await server.run(on_signal=lambda text: stderr_console().print(text))

    uvloop.run(serve())


def _say(as_json: bool, value: object, text: str) -> None:
    """One line on stdout at once: whoever started the server may wait for it."""
    sys.stdout.write((json.dumps(value) if as_json else text) + "\n")
    sys.stdout.flush()
