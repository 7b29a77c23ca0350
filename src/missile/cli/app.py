"""The `missile` command: which verbs there are, and the one place where an error becomes a sentence and an exit code.

A verb lives in `missile.cli.VERB` (of two words: `VERB_WORD`) and offers a Typer function named `command`. Only the
verb that was asked for is imported, so that `missile --help` is quick and a missing extra concerns only the verbs that
need it.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from missile import __version__
from missile.cli.output import print_error
from missile.errors import InternalError, MissileError, MisuseError, UnsupportedError

__all__ = ["VERBS", "main"]

VERBS: dict[str, str] = {
    "doctor": "What was found here, and what works on it.",
    "bench": "Run LS and BE tenants under each policy; table, results.json and report.html.",
    "bench isolation": "What a neighbour costs, with shared and with disjoint colors of memory.",
    "probe": "Recover a GPU's channel map by measurement, and verify it.",
    "map": "Slice and color of in-page addresses, from a channel map.",
    "compile": "Compile a model into a package of Triton kernels.",
    "profile": "Measure a model package, kernel by kernel.",
    "pcie": "The link, and tenants' shares of it with and without the scheduler.",
    "serve": "Serve tenants behind the Open Inference Protocol.",
    "top": "Watch a running server.",
}

INTERRUPTED = 130

_SERVE = ("grpc", "google", "httptools", "httpx", "orjson", "prometheus_client", "textual", "uvloop")

# Which extra of this package brings a module that only some verbs need.
_EXTRAS = {
    **dict.fromkeys(("torch", "torchvision", "timm", "transformers", "triton", "safetensors"), "torch"),
    **dict.fromkeys(("cuda", "nvidia", "pynvml"), "cuda"),
    **dict.fromkeys(_SERVE, "serve"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 misuse, 130 interrupted) and never raises."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if " ".join(arguments[:2]) in VERBS:
        arguments[:2] = [" ".join(arguments[:2])]
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return _report("Interrupted.", "Interrupted", INTERRUPTED, arguments)
    except BrokenPipeError:
        # The reader of our output went away (`missile ... | head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as raised:
        error = _as_missile_error(raised, arguments)
        if os.environ.get("MISSILE_DEBUG"):
            traceback.print_exception(raised)
        return _report(str(error), type(error).__name__, error.exit_code, arguments)


def _dispatch(arguments: list[str]) -> int:
    wanted = next((argument for argument in arguments if not argument.startswith("-")), "")
    command = typer.main.get_command(_build(wanted))
    code = command.main(arguments, prog_name="missile", standalone_mode=False)
    if code == INTERRUPTED:  # some versions of Typer turn Ctrl-C into an exit code of their own accord
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _build(wanted: str) -> typer.Typer:
    """The command tree, with only the verb `wanted` imported; the others are known by name and help text alone."""
    app = typer.Typer(
        name="missile",
        help="Software isolation of one NVIDIA GPU between latency-sensitive (LS) and best-effort (BE) inference.",
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=False,
        rich_markup_mode="rich",
    )
    app.callback()(_global_options)
    for verb, text in VERBS.items():
        app.command(name=verb, short_help=text)(_load(verb) if verb == wanted else _not_loaded)
    return app


def _version(on: bool) -> None:
    if on:
        typer.echo(f"missile {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version and exit.", callback=_version)
    ] = False,
) -> None: ...


def _not_loaded() -> None: ...


def _load(verb: str) -> Callable[..., Any]:
    name = f"missile.cli.{verb.replace(' ', '_')}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise UnsupportedError(f"`missile {verb}` is planned but not part of Missile {__version__}.") from error
        raise
    command: Callable[..., Any] = module.command
    return command


def _as_missile_error(raised: Exception, arguments: Sequence[str]) -> MissileError:
    """`raised` as one of ours: usage errors of the parser, missing extras, and bugs get their sentence here."""
    if isinstance(raised, MissileError):
        return raised
    # Typer brings its own click, an old one or none at all: what its usage errors share is this method.
    usage = getattr(raised, "format_message", None)
    if usage is not None:
        return MisuseError(_sentence(usage()))
    if isinstance(raised, ModuleNotFoundError):
        package = (raised.name or "").partition(".")[0]
        if package in _EXTRAS:
            verb = " ".join(["missile", *arguments[:1]])
            return UnsupportedError(f"`{verb}` needs {package}: pip install 'missile[{_EXTRAS[package]}]'.")
    frame = traceback.extract_tb(raised.__traceback__)[-1]
    where = f"{os.path.basename(os.path.dirname(frame.filename))}/{os.path.basename(frame.filename)}:{frame.lineno}"
    return InternalError(
        f"Missile met a bug: {type(raised).__name__}: {_sentence(str(raised))} ({where}; MISSILE_DEBUG=1 shows more)"
    )


def _sentence(text: str) -> str:
    line = " ".join(text.split())
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _report(message: str, kind: str, code: int, arguments: Sequence[str]) -> int:
    print_error(message, kind=kind, code=code, as_json="--json" in arguments)
    return code
