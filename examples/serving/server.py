"""Start `missile serve` for an example, on free ports, and stop it afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(config: Path) -> Iterator[dict[str, str]]:
    """The server's addresses: {"http": "127.0.0.1:PORT", "grpc": "127.0.0.1:PORT"}."""
    command = [sys.executable, "-m", "missile", "serve", str(config), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()  # printed when the tenants are ready
        if not line:
            raise SystemExit(f"the server did not start; `missile serve {config}` says why")
        ready = json.loads(line)
        try:
            yield {"http": ready["http"].removeprefix("http://"), "grpc": ready["grpc"]}
        finally:
            process.terminate()
