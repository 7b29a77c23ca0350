"""Compiling the hot loop, once per version of its source, and its functions as Python sees them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_double, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

__all__ = ["CALLS", "Calls", "Chunks", "Library", "Options", "Report", "ShareC", "Vitals", "compile_shared", "library"]

_SOURCES: Final = ("lane.c", "source.c", "lane.h", "fair.h")
_FLAGS: Final = ("-std=c11", "-O2", "-shared", "-fPIC", "-pthread")
_PATIENCE_S: Final = 60

Library = Any  # functions by name, without static types

CALLS: Final = ("set_context", "to_device", "to_host", "record", "query", "write", "context")


class Calls(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in CALLS)


class Chunks(ctypes.Structure):
    _fields_ = (("solo", c_int64), ("shared", c_int64), ("short", c_int64))


class Options(ctypes.Structure):
    _fields_ = (
        ("calls", Calls),
        ("chunk", Chunks),
        ("streams", c_void_p * 2),
        ("chunk_events", POINTER(c_void_p)),
        ("ns_per_byte", c_double),
        ("copy_ns", c_double),
        ("start_ns", c_double),
        ("bypass", c_int64),
        ("ahead", c_int64),
        ("depth", c_int32),
        ("to_host", c_int32),
        ("floor_chunks", c_int32),
    )


class ShareC(ctypes.Structure):
    _fields_ = (
        ("units", c_int64),
        ("credit", c_int64),
        ("limit", c_int64),
        ("burst", c_int64),
        ("minimum", c_int64),
        ("latency_sensitive", c_int32),
    )


class Report(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("kind", "id", "nbytes", "issued_ns", "done_ns", "state", "code"))


class Vitals(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("cpu_ns", "looks", "late_ns", "dry_ns"))


_SIGNATURES: Final = {
    "lane_open": (c_void_p, POINTER(Options)),
    "lane_close": (None, c_void_p),
    "lane_admit": (c_int, c_void_p, POINTER(ShareC)),
    "lane_remove": (None, c_void_p, c_int),
    "lane_submit": (
        c_uint64,
        *(c_void_p, c_int, c_void_p, c_uint64, c_int64, c_void_p, c_void_p, c_uint64, c_uint32, c_void_p),
    ),
    "lane_cancel": (None, c_void_p, c_int, c_uint64),
    "lane_abandon": (None, c_void_p),
    "lane_step": (c_int64, c_void_p, c_void_p, c_int64, POINTER(c_int64)),
    "lane_clock": (c_int64,),
    "lane_look": (c_int, c_void_p),
    "source_run": (c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_uint64, c_int64),
    "lane_queued": (c_int64, c_void_p, c_int),
    "lane_record": (None, c_void_p),
    "lane_recorded": (c_int64, c_void_p, c_void_p, c_int64),
    "lane_vitals": (None, c_void_p, POINTER(Vitals)),
    "fair_open": (c_void_p, POINTER(Chunks)),
    "fair_close": (None, c_void_p),
    "fair_call_admit": (c_int, c_void_p, POINTER(ShareC), c_int),
    "fair_call_remove": (None, c_void_p, c_int, c_int64),
    "fair_call_wake": (None, c_void_p, c_int, c_int64),
    "fair_call_sleep": (None, c_void_p, c_int, c_int64),
    "fair_call_next": (c_int64, c_void_p, c_int64),
    "fair_call_pick": (None, c_void_p, c_int64, c_int64, POINTER(c_int64)),
    "fair_call_lag": (c_int64, c_void_p, c_int),
}


# Called without the interpreter's lock. The others take microseconds: another thread that took the lock meanwhile would
# keep it for up to `sys.getswitchinterval()`, with an urgent copy waiting.
_LONG: Final = ("lane_close", "source_run")


@functools.cache
def library() -> tuple[Library | None, str]:
    """The compiled hot loop, or None and why there is none, in a few words."""
    folder = resources.files("missile.pcie.native")
    sources = {name: folder.joinpath(name).read_bytes() for name in _SOURCES}
    digest = hashlib.sha256(b"\0".join([*sources.values(), " ".join(_FLAGS).encode()])).hexdigest()[:16]
    try:
        path = _cache() / f"lane-{digest}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            compile_shared(sources, path)
        brief, long = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
    except OSError as error:
        return None, str(error)
    functions = {}
    for name, (result, *arguments) in _SIGNATURES.items():
        function = functions[name] = getattr(long if name in _LONG else brief, name)
        function.restype, function.argtypes = result, arguments
    return SimpleNamespace(**functions), ""


def compile_shared(sources: dict[str, bytes], target: Path) -> None:
    """Compile `sources` (by file name; those in .c are compiled) into `target`, whole or not at all.

    OSError says in a few words why not: no compiler, or what it said first.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang)")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for name, content in sources.items():
            (Path(scratch) / name).write_bytes(content)
        made = Path(scratch) / target.name
        units = [str(Path(scratch) / name) for name in sources if name.endswith(".c")]
        command = [*compiler.split(), *_FLAGS, "-o", str(made), *units]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
        except subprocess.TimeoutExpired:
            raise OSError(f"{compiler} did not come to an end") from None
        if done.returncode:
            raise OSError(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        made.replace(target)


def _cache() -> Path:
    if chosen := os.environ.get("MISSILE_CACHE"):
        return Path(chosen) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "missile" / "native"
