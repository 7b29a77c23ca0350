"""What every verb prints with: results on stdout, progress and errors on stderr, pure JSON on stdout with `--json`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["DeviceOption", "JsonOption", "console", "print_error", "print_json", "progress_bar", "stderr_console"]

DeviceOption = Annotated[
    str, typer.Option("--device", "-d", help="auto, cuda:N, sim:NAME or sim:PATH.toml.", metavar="DEVICE")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]


def console() -> Console:
    """Where results for people go. Made anew, so that a redirected `sys.stdout` is honoured."""
    return Console(file=sys.stdout, highlight=False)


def stderr_console() -> Console:
    """Where progress, notes and errors go."""
    return Console(file=sys.stderr, highlight=False)


def progress_bar(*, transient: bool = True) -> Progress:
    """A progress display on stderr, shown only where stderr is a terminal."""
    screen = stderr_console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=transient,
        disable=not screen.is_terminal,
    )


def print_json(value: Any) -> None:
    """Print `value` on stdout as indented JSON. NaN is not JSON: callers turn it into null."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def print_error(message: str, *, kind: str, code: int, as_json: bool) -> None:
    """One sentence on stderr; with `as_json`, the same on stdout as `{"error": {...}}` for whoever parses it."""
    if as_json:
        print_json({"error": {"type": kind, "message": message, "exit_code": code}})
        return
    screen = stderr_console()
    screen.print("[bold red]missile:[/] ", end="")
    screen.print(message, markup=False, soft_wrap=True)
