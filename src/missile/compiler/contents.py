"""What a package's buffers hold at first: weights from its file, state from there or zeros, brought in piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from missile.compiler.package import Buffer, BufferKind, ModelPackage
from missile.compiler.planning import Placement
from missile.compiler.weights import WEIGHTS_FILE, Bytes, read_weights
from missile.errors import MisuseError
from missile.gpu.interface import Gpu, HostBuffer, Stream

__all__ = ["STAGING_BYTES", "Sink", "load_contents"]

STAGING_BYTES = 32 << 20
_STAGES = 2  # one is filled while the other is on its way


class Sink(Protocol):
    """Where contents go. Both enqueue work on `stream` and return."""

    def put(self, stream: Stream, kind: BufferKind, offset: int, staging: HostBuffer, nbytes: int) -> None:
        """Bring `staging`'s first bytes to `offset` of the memory of `kind`; at most `STAGING_BYTES`."""

    def zero(self, stream: Stream, kind: BufferKind, nbytes: int) -> None:
        """Fill all buffers of `kind`, `nbytes` together, with zeros."""


def load_contents(
    package: ModelPackage, directory: Path, gpu: Gpu, tenant: str, places: Mapping[BufferKind, Placement], sink: Sink
) -> None:
    """Bring the initial contents of all buffers of the kinds in `places` to `sink`, through pinned memory. Blocks until
    they are there.

    MisuseError where the package's file lacks a weight, or has another size of it.
    """
    weights = read_weights(directory / WEIGHTS_FILE)
    with ExitStack() as undo:
        stream = gpu.create_stream()
        undo.callback(stream.close)
        stages = []
        for _ in range(_STAGES):
            stages.append((gpu.allocate_host(STAGING_BYTES, tenant=tenant), gpu.create_event(timing=False)))
            undo.callback(stages[-1][0].free)
            undo.callback(stages[-1][1].close)
        turn = 0
        for kind, place in places.items():
            members = [b for b in package.buffers if b.kind is kind]
            _check(members, weights, directory)
            if not any(b.id in weights for b in members):
                if members:
                    sink.zero(stream, kind, place.nbytes)
                continue
            for start in range(0, place.nbytes, STAGING_BYTES):
                staging, sent = stages[turn]
                turn = (turn + 1) % _STAGES
                nbytes = min(STAGING_BYTES, place.nbytes - start)
                sent.synchronize()
                _fill(staging.array[:nbytes], start, members, place, weights)
                sink.put(stream, kind, start, staging, nbytes)
                stream.record(sent)
        stream.synchronize()


def _check(members: Sequence[Buffer], weights: Mapping[str, Bytes], directory: Path) -> None:
    for buffer in members:
        data = weights.get(buffer.id)
        if data is None and buffer.kind is BufferKind.WEIGHT:
            raise MisuseError(f"{directory / WEIGHTS_FILE} lacks weight buffer {buffer.id!r}.")
        if data is not None and data.nbytes != buffer.nbytes:
            raise MisuseError(
                f"{directory / WEIGHTS_FILE} has {data.nbytes} bytes for buffer {buffer.id!r}, not {buffer.nbytes}."
            )


def _fill(out: Bytes, start: int, members: Sequence[Buffer], place: Placement, weights: Mapping[str, Bytes]) -> None:
    """The bytes from `start` of the memory that `members` lie in; zeros where they have no contents."""
    out[:] = 0
    for buffer in members:
        data, at = weights.get(buffer.id), place.offsets[buffer.id] - start
        if data is None or at >= out.nbytes or at + data.nbytes <= 0:
            continue
        low, high = max(0, -at), min(data.nbytes, out.nbytes - at)
        out[at + low : at + high] = data[low:high]
