"""What the serving benchmarks set up alike: a server in a process of its own, shared memory, and where results go."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Address", "Setup", "machine", "parser", "server_state", "server_table", "shared_memory", "write_results"]

Address = tuple[str, int]


def server_table(*, device: str = "cpu", **more: object) -> str:
    """The `[server]` table of a configuration: free loopback ports, one thread for PyTorch. more: further keys."""
    values = {"http_port": 0, "grpc_port": -1, "device": device, "cpu_threads": 1, **more}
    return "\n".join(["[server]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""])


class Setup:
    """Where servers are started: configurations, models and logs go to `folder`. cores: their processors, as taskset takes
    them; empty for all."""

    def __init__(self, folder: Path, cores: str = "") -> None:
        self.folder = folder
        self._prefix = ["taskset", "-c", cores] if cores else []

    def log(self, name: str = "serve") -> str:
        """What the server of that name has logged."""
        return (self.folder / f"{name}.log").read_text()

    @contextmanager
    def served(self, config: str, *, name: str = "serve", models: Mapping[str, str] | None = None) -> Iterator[Address]:
        """`missile serve` on the text `config`, ready, as (host, port). models: modules of factories, by name."""
        for module, source in (models or {}).items():
            (self.folder / f"{module}.py").write_text(source)
        path = self.folder / f"{name}.toml"
        path.write_text(config)
        command = [*self._prefix, sys.executable, "-m", "missile", "serve", str(path), "--json"]
        with (self.folder / f"{name}.log").open("wb") as errors:
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            try:
                line = server.stdout.readline() if server.stdout is not None else ""
                if not line:
                    raise SystemExit(f"missile serve ended: {self.log(name)[-2000:]}")
                host, _, port = json.loads(line)["http"].removeprefix("http://").rpartition(":")
                yield host, int(port)
            finally:
                server.terminate()
                try:
                    server.wait(60)
                except subprocess.TimeoutExpired:
                    server.kill()


def server_state(address: Address) -> dict[str, Any]:
    """What the server says of itself and its tenants."""
    with urllib.request.urlopen("http://{}:{}/missile/state".format(*address), timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@contextmanager
def shared_memory(name: str, contents: bytes, address: Address) -> Iterator[mmap.mmap]:
    """A system shared memory region with `contents`, registered with the server under its own name."""
    path = Path("/dev/shm") / name
    path.write_bytes(contents)
    try:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), len(contents)) as mapping:
            body = json.dumps({"key": name, "byte_size": len(contents)}).encode()
            head = f"POST /v2/systemsharedmemory/region/{name}/register HTTP/1.1\r\nHost: localhost\r\n"
            with socket.create_connection(address) as connection:
                connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                answer = connection.recv(1 << 16)
            if b" 200 " not in answer.splitlines()[0]:
                raise SystemExit(answer.decode())
            yield mapping
    finally:
        path.unlink(missing_ok=True)


def machine() -> dict[str, object]:
    """What the numbers stand on: the processor, and versions of what answers requests."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg(),
        **{name: metadata.version(name) for name in ("torch", "uvloop", "httptools", "orjson", "numpy")},
    }


def parser(about: str | None, *, seconds: float, of: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have. about: the module's docstring. of: what takes `seconds`."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("-o", "--output", type=Path, help="folder for results.json")
    found.add_argument("--seconds", type=float, default=seconds, help=f"of {of}")
    found.add_argument("--server-cores", default="", help="the server's processors, as taskset takes them (0,1)")
    found.add_argument(
        "--note", default="", help="kept with the results: what else ran on the machine, stand-in weights"
    )
    return found


def write_results(folder: Path | None, result: Mapping[str, object]) -> None:
    """`results.json` in `folder`, which is made; nothing where there is none."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
