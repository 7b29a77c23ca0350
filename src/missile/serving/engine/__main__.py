"""Entry of the engine process: `python -m missile.serving.engine MEMORY CALLS ANSWERS CONTROL` (inherited descriptors)."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from missile.errors import MissileError, UnsupportedError
from missile.serving.engine.executor import Executor
from missile.serving.engine.loop import EngineLoop
from missile.serving.link import Link

log = logging.getLogger("missile.engine")


def open_executor(link: Link, hello: dict[str, Any]) -> Executor:
    """The executor of the device that was asked for. MissileError when there is no such device or it can't be had."""
    device = hello["device"]
    if device == "auto":
        from missile.gpu.cuda.driver import why_unavailable

        reason = why_unavailable()
        device = "cpu" if reason is not None else "cuda:0"
        log.info("device auto: %s", f"{device} ({reason})" if reason is not None else device)
    if device == "cpu":
        from missile.serving.engine.cpu import CpuExecutor

        return CpuExecutor(link.arena, threads=hello["cpu_threads"])
    if device.startswith("sim:"):
        raise UnsupportedError("A simulated GPU computes nothing, so it can't serve; known are auto, cpu and cuda:N.")
    from missile.gpu.registry import open_gpu
    from missile.serving.engine.gpu import GpuExecutor

    channel_map = Path(hello["channel_map"]) if hello["channel_map"] else None
    return GpuExecutor(
        link.arena,
        open_gpu(device),
        policy=hello["policy"],
        channel_map=channel_map,
        swap_bytes=hello["swap_mib"] << 20,
    )


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front end decides when to stop
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # Each driver call lets go of the interpreter, and waits for as long as this to have it back from a thread that loads a
    # model meanwhile. (On a stand-in for a GPU, beside such a thread, LS requests took 1.5 to 1.9 ms in the median with
    # 500 us, and 0.6 to 0.8 with 50.)
    sys.setswitchinterval(50e-6)
    gc.set_threshold(100_000, 50, 50)  # a pass over the heap takes longer than a request may wait
    link = Link.attach(*(int(argument) for argument in sys.argv[1:5]))
    hello = link.control.receive()
    if hello is None:
        return 0
    try:
        executor = open_executor(link, hello)
    except MissileError as error:
        link.control.send({"op": "refused", "error": str(error)})
        return error.exit_code
    facts = executor.facts
    link.control.send({"op": "ready", "pid": os.getpid(), "facts": {n: getattr(facts, n) for n in facts.__slots__}})
    loop = EngineLoop(
        link,
        executor,
        Path(hello["folder"]),
        spin_ns=1000 * hello["spin_us"],
        patience_ns=int(1e9 * hello["watchdog_s"]),
    )
    try:
        loop.run()
    except MissileError as error:
        log.error("%s", error)
        os._exit(error.exit_code)  # a thread or a GPU that is stuck would keep an orderly exit waiting
    return 0


if __name__ == "__main__":
    sys.exit(main())
