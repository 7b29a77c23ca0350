"""Whether requests that are preempted again and again give the bytes of undisturbed ones."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from preempt_models import Loaded

from missile.compiler.bind import BoundModel
from missile.compiler.package import BufferKind
from missile.gpu.cuda.gpu import CudaGpu
from missile.gpu.interface import Launch

__all__ = ["bits", "spin"]


def bits(gpu: CudaGpu, name: str, variant: str, *, preemptions: int, most_s: float) -> dict[str, Any]:
    """Preempt requests of model `name` at random instants, `preemptions` times or for `most_s` seconds."""
    loaded = Loaded(gpu, name, variant)
    rng = np.random.default_rng(2)
    control = loaded.control
    state = [b for b in loaded.package.buffers if b.kind is BufferKind.STATE]
    reader = _Reader(gpu, loaded)
    loaded.run()
    if len(np.unique(reader.output())) < 64:
        loaded.reweigh()
    references = []
    for model in (loaded.plain, loaded.plain, loaded.model):
        control.begin(loaded.stream)
        loaded.stream.launch_graph(model.graph)
        references.append(reader.output(model))
    reference = references[0]
    done = took_hold = requests = wrong = 0
    rounds: Counter[int] = Counter()
    steps: Counter[int] = Counter()
    begin = time.perf_counter()
    while done < preemptions and time.perf_counter() - begin < most_s:
        reader.scramble()
        loaded.launch(0)
        count = 0
        while True:
            spin(rng.uniform(0, 0.6) * loaded.solo_ns)
            if loaded.stream.idle():
                break
            control.raise_flag()
            done += 1
            spin(rng.uniform(0, 100_000))  # the flag may well be lowered before all have left
            control.lower_flag()
            loaded.stream.synchronize()
            gpu.synchronize()
            if (left := control.left()) is not None:
                steps[left.step] += 1
                took_hold += 1
                count += 1
            if not loaded.resume():
                break
        loaded.stream.synchronize()
        requests += 1
        rounds[count] += 1
        wrong += not np.array_equal(reader.output(), reference)
    out = {
        "undisturbed runs agree": [bool(np.array_equal(reference, other)) for other in references],
        "requests": requests,
        "preemptions": done,
        "took hold": took_hold,
        "different steps": len(steps),
        "wrong outputs": wrong,
        "output bytes": int(reference.nbytes),
        "distinct output bytes": len(np.unique(reference)),
        "state buffers": len(state),
        "preemptions of a request": dict(sorted(rounds.items())),
        "marks left": reader.marks(),
        "kernels by placement": loaded.placements(),
        "seconds": {"code": round(loaded.build_s, 1), "requests": round(time.perf_counter() - begin, 1)},
    }
    loaded.close()
    return out


def spin(duration_ns: float) -> None:
    end = time.perf_counter_ns() + duration_ns
    while time.perf_counter_ns() < end:
        pass


class _Reader:
    """Outputs as bytes, and outputs and marks looked at between requests."""

    def __init__(self, gpu: CudaGpu, loaded: Loaded) -> None:
        self._model, self._stream = loaded.model, loaded.stream
        self._host = gpu.allocate_host(loaded.model.output_bytes)
        first, last = loaded.model.operations[0], loaded.model.operations[-1]
        assert isinstance(first, Launch)
        assert isinstance(last, Launch)
        self._marks = int.from_bytes(first.params[-2], "little")
        self._blocks = int.from_bytes(last.params[-2], "little") + int(np.prod(last.grid)) - self._marks
        self._gpu = gpu

    def output(self, model: BoundModel | None = None) -> npt.NDArray[np.uint8]:
        self._stream.copy_to_host(self._host, (model or self._model).output_address)
        self._stream.synchronize()
        return np.array(self._host.array)

    def scramble(self) -> None:
        """So that an output that is not written is not taken for a right one."""
        self._gpu._cu(
            "cuMemsetD8Async", self._model.output_address, 0xA5, self._model.output_bytes, self._stream.handle
        )

    def marks(self) -> int:
        """Marks that are set: none, once all requests have ended."""
        host = self._gpu.allocate_host(self._blocks)
        self._stream.copy_to_host(host, self._marks)
        self._stream.synchronize()
        count = int(np.count_nonzero(host.array))
        host.free()
        return count
