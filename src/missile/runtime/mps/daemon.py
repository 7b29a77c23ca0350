"""A private MPS control daemon: its own pipe and log folder, gone when its owner closes it or dies.

NVIDIA's Multi-Process Service lets kernels of several processes run at the same time. Clients find the daemon through
`CUDA_MPS_PIPE_DIRECTORY`, so that one in a folder of its own disturbs nobody else's.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
from pathlib import Path
from typing import IO

from missile.errors import MissileError, UnsupportedError

__all__ = ["MpsDaemon"]

_CONTROL = "nvidia-cuda-mps-control"
_START_S = 20.0
_STOP_S = 20.0

# The shell outlives this process if that is killed: its standard input then ends, and so does the daemon.
_GUARD = f"""
{_CONTROL} -d || exit 1
echo started
read -r _
echo quit | timeout 10 {_CONTROL}
"""


class MpsDaemon:
    """Runs from construction to `close`. folder: for its pipes and logs; short (socket paths), and the caller's to delete.

    UnsupportedError where the driver's MPS tools are missing, MissileError with the daemon's own words when it won't start.
    """

    def __init__(self, folder: Path) -> None:
        if shutil.which(_CONTROL) is None:
            raise UnsupportedError(
                f"Policy 'mps' needs {_CONTROL}, which comes with the NVIDIA driver and is not installed here."
            )
        self._pipe, log = folder / "pipe", folder / "log"
        for directory in (self._pipe, log):
            directory.mkdir(mode=0o700)
        self.environment = {"CUDA_MPS_PIPE_DIRECTORY": str(self._pipe), "CUDA_MPS_LOG_DIRECTORY": str(log)}
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment},
            start_new_session=True,  # Ctrl-C is for the owner alone: it has clients to end first
        )
        said = self._listen()
        if said.splitlines()[-1:] != ["started"]:
            self.close()
            raise MissileError(f"The MPS daemon did not start: {' '.join(said.split()) or 'it gave no reason'}.")

    def _listen(self) -> str:
        """What the guard says up to "started", its end or a time limit."""
        output = self._guard.stdout
        assert output is not None
        said: list[str] = []
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while selector.select(_START_S) and (line := output.readline()):
                said.append(line)
                if line.strip() == "started":
                    break
        return "".join(said)

    def close(self) -> None:
        """Stop the daemon and its server. Idempotent. Clients should have ended: what they still run is cut off."""
        guard = self._guard
        _hang_up(guard.stdin)
        try:
            guard.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
        _hang_up(guard.stdout)
        self._make_sure()

    def _make_sure(self) -> None:
        """A daemon that did not heed "quit" is told by signal."""
        try:
            pid = int((self._pipe / f"{_CONTROL}.pid").read_text())
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except (OSError, ValueError):
            return
        if _CONTROL.startswith(name):  # comm holds the first 15 characters
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _hang_up(stream: IO[str] | None) -> None:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.close()
