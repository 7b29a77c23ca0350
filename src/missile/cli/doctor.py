"""`missile doctor`: what was found on this machine, and which verbs work on what of it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from rich.table import Table
from rich.text import Text

from missile import __version__
from missile.cli.output import JsonOption, console, print_json
from missile.errors import MissileError
from missile.gpu import open_gpu
from missile.gpu.cuda import nvrtc
from missile.gpu.cuda.driver import why_unavailable
from missile.gpu.interface import GpuInfo, Level

__all__ = ["Findings", "Need", "Place", "command", "doctor", "look", "places"]


@dataclass(frozen=True, slots=True)
class Need:
    """Something that may be here: `version` when it is ("" when it has none), else `missing` says what to do."""

    name: str
    what_for: str
    version: str | None
    missing: str = ""

    @property
    def found(self) -> bool:
        return self.version is not None


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that `doctor` looked at. `gpu` is None without a usable GPU, and `no_gpu` says why."""

    machine: dict[str, str]
    gpu: GpuInfo | None
    no_gpu: str
    simulator: Need
    needs: tuple[Need, ...]

    def __getitem__(self, name: str) -> Need:
        return next(need for need in self.needs if need.name == name)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a verb can run: on the GPU, on the simulated GPU, on the host; `None` where it never does, else "" or what
    is missing."""

    verb: str
    gpu: str | None
    simulated: str | None
    host: str | None

    @property
    def works(self) -> bool:
        return "" in (self.gpu, self.simulated, self.host)


_SERVER = ("httptools", "uvloop", "orjson", "grpc")

# Per verb and place, which needs must be met; "gpu" and "simulator" stand for themselves.
_VERBS: Mapping[str, tuple[tuple[str, ...] | None, tuple[str, ...] | None, tuple[str, ...] | None]] = {
    "bench": (("gpu", "nvrtc"), ("simulator",), None),
    "probe": (("gpu", "nvrtc"), ("simulator",), None),
    "map": (None, None, ()),
    "compile": (("gpu", "torch", "triton"), None, None),
    "profile": (("gpu",), None, None),
    "pcie": (("gpu",), ("simulator",), None),
    "serve": (("gpu", *_SERVER), None, ("torch", *_SERVER)),
    "top": (None, None, ("textual",)),
}

# module -> (distribution, what Missile does with it, extra)
_PACKAGES = {
    "torch": ("torch", "compiles models", "torch"),
    "triton": ("triton", "generates their kernels", "torch"),
    "timm": ("timm", "some of the twelve models", "torch"),
    "transformers": ("transformers", "some of the twelve models", "torch"),
    "cuda.bindings": ("cuda-bindings", "drives the GPU", "cuda"),
    "pynvml": ("nvidia-ml-py", "sees other users of the GPU", "cuda"),
    "httptools": ("httptools", "serves REST", "serve"),
    "uvloop": ("uvloop", "serves REST", "serve"),
    "orjson": ("orjson", "serves REST", "serve"),
    "grpc": ("grpcio", "serves gRPC", "serve"),
    "textual": ("textual", "`missile top`", "serve"),
}
_TOOLS = {
    "ncu": ("reads hardware counters", "comes with NVIDIA Nsight Compute; for `missile probe --counters`"),
    "nvidia-cuda-mps-control": ("the `mps` policy", "comes with the NVIDIA driver"),
}


def look() -> Findings:
    """Look at this machine. Opens the first GPU, where there is one, for a moment."""
    gpu, no_gpu = _gpu()
    needs = [_package(module, *rest) for module, rest in _PACKAGES.items()]
    needs.append(_nvrtc())
    needs.extend(
        Need(tool, use, "" if (path := shutil.which(tool)) else None, path or hint)
        for tool, (use, hint) in _TOOLS.items()
    )
    machine = {
        "missile": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    return Findings(machine, gpu, no_gpu, _simulator(), tuple(needs))


def _gpu() -> tuple[GpuInfo | None, str]:
    if (reason := why_unavailable()) is not None:
        return None, reason
    try:
        with open_gpu("cuda:0") as gpu:
            return gpu.info, ""
    except MissileError as error:
        return None, str(error)


def _simulator() -> Need:
    name, what_for = "simulator", "stands in for a GPU"
    try:
        with open_gpu("sim:h100") as gpu:
            return Need(name, what_for, gpu.info.name)
    except MissileError as error:
        return Need(name, what_for, None, str(error))


def _package(module: str, distribution: str, what_for: str, extra: str) -> Need:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        found = False
    if not found:
        return Need(module, what_for, None, f"pip install 'missile[{extra}]'")
    try:
        return Need(module, what_for, metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return Need(module, what_for, "")


def _nvrtc() -> Need:
    what_for = "compiles the measuring kernels"
    if (reason := nvrtc.why_unavailable()) is not None:
        return Need("nvrtc", what_for, None, reason)
    return Need("nvrtc", what_for, ".".join(map(str, nvrtc.version())))


def places(findings: Findings) -> tuple[Place, ...]:
    """Where each verb can run, given what was found. Pure."""
    return tuple(Place(verb, *(_lacks(findings, needs) for needs in columns)) for verb, columns in _VERBS.items())


def _lacks(findings: Findings, needs: Sequence[str] | None) -> str | None:
    if needs is None:
        return None
    for name in needs:
        if name == "gpu":
            if findings.gpu is None:
                return "no GPU"
        elif not (findings.simulator if name == "simulator" else findings[name]).found:
            return f"no {name}"
    return ""


def command(json: JsonOption = False) -> int:
    """What was found here, and what works on it."""
    return doctor(json)


def doctor(as_json: bool) -> int:
    """Print what was found; 0 when `missile bench` can run somewhere, else 1."""
    findings = look()
    verbs = places(findings)
    bench = next(place for place in verbs if place.verb == "bench")
    if as_json:
        print_json(_as_json(findings, verbs, bench))
    else:
        _show(findings, verbs, bench)
    return 0 if bench.works else 1


def _as_json(findings: Findings, verbs: Sequence[Place], bench: Place) -> dict[str, Any]:
    gpu = None
    if findings.gpu is not None:
        gpu = asdict(findings.gpu) | {"level": findings.gpu.level.name.lower()}
    return {
        "machine": findings.machine,
        "gpu": gpu,
        "no_gpu": findings.no_gpu,
        "found": {
            need.name: {"found": need.found, "version": need.version or "", "hint": need.missing}
            for need in (findings.simulator, *findings.needs)
        },
        "verbs": {
            place.verb: {
                where: None if lacks is None else {"works": not lacks, "lacks": lacks}
                for where, lacks in (("gpu", place.gpu), ("simulated", place.simulated), ("host", place.host))
            }
            for place in verbs
        },
        "works": bench.works,
    }


def _show(findings: Findings, verbs: Sequence[Place], bench: Place) -> None:
    screen = console()
    machine = findings.machine
    screen.print(
        f"[bold]Missile {machine['missile']}[/] on {machine['system']}, "
        f"Python {machine['python']}, {machine['cpus']} CPUs\n"
    )
    if findings.gpu is None:
        screen.print(f"[bold]GPU[/]  none: {findings.no_gpu}\n", soft_wrap=True)
    else:
        screen.print(_gpu_table(findings.gpu))
    found = Table("", "Found", "Version", "What for", box=None, pad_edge=False, header_style="bold")
    for need in (findings.simulator, *findings.needs):
        version = Text(need.version or "") if need.found else Text(need.missing, style="dim")
        found.add_row(_mark(need.found), need.name, version, need.what_for)
    screen.print(found)
    screen.print()
    table = Table("Verb", "GPU", "Simulated GPU", "Host", box=None, pad_edge=False, header_style="bold")
    for place in verbs:
        table.add_row(place.verb, _cell(place.gpu), _cell(place.simulated), _cell(place.host))
    screen.print(table)
    screen.print()
    if bench.gpu == "":
        screen.print("[bold green]Ready.[/] `missile bench` runs on this GPU.")
    elif bench.works:
        why = "" if findings.gpu is None else f", not on the GPU ({bench.gpu})"
        screen.print(f"[bold green]Ready.[/] `missile bench` runs on the simulated GPU{why}; its results say so.")
    else:
        screen.print("[bold red]`missile bench` can't run here.[/]")


def _gpu_table(info: GpuInfo) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    major, minor = info.compute_capability
    cut = f", partitions of {info.sm_minimum} and more in steps of {info.sm_granularity}" if info.sm_granularity else ""
    table.add_row("GPU", f"{info.name} ({info.device}, compute capability {major}.{minor})")
    table.add_row("", f"{info.memory_bytes / 2**30:.1f} GiB memory, {info.l2_bytes / 2**20:.0f} MiB L2")
    table.add_row("", f"{info.sms} SMs{cut}")
    table.add_row("", f"driver {info.driver or 'of unknown version'}, {info.runtime}")
    table.add_row(
        "", f"offers: {', '.join(level.name.lower().replace('_', ' ') for level in Level if level <= info.level)}"
    )
    for note in info.notes:
        table.add_row("", Text(note, style="yellow"))
    table.add_row("", "")
    return table


def _mark(good: bool) -> Text:
    return Text("yes", style="green") if good else Text("no", style="red")


def _cell(lacks: str | None) -> Text:
    if lacks is None:
        return Text("-", style="dim")
    return _mark(True) if not lacks else Text(lacks, style="red")
