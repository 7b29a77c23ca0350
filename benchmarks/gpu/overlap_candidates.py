"""A model on the GPU with the code of every place for each kernel, so that any choice of places is a graph away."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from overlap_measure import Bits

from missile.compiler.bind import BoundModel
from missile.compiler.mover import Mover
from missile.compiler.overlap_search import Choice, uniform
from missile.compiler.package import BufferKind, KernelStep, ModelPackage
from missile.compiler.planning import place_buffers
from missile.compiler.ptx.overlap import Dependents
from missile.compiler.ptx.transfer import GATHER, SCATTER
from missile.compiler.steps import load_images
from missile.gpu.interface import Fill, Gpu, Graph, Kernel, Launch, Stream

_GRAPHS = 3  # that are kept while a search goes on: the choice so far, and changes to it


class Candidates:
    """base: the model without overlapping launches, plain or colored. code: cubins by place and kernel; empty on a simulated
    GPU, where all places are the same. movers: code of the kernels that move data, which overlaps. All of it is `undo`'s."""

    def __init__(
        self,
        gpu: Gpu,
        base: BoundModel,
        code: Mapping[Dependents, Mapping[str, bytes]],
        undo: ExitStack,
        movers: bytes = b"",
        memory: Any = None,
    ) -> None:
        self.gpu, self.base, self._memory = gpu, base, memory
        self.package: ModelPackage = base.package
        self._kernels: dict[Dependents, dict[str, Kernel]] = {
            place: _load(self.package, cubins, gpu, base.tenant, undo) for place, cubins in code.items()
        }
        self._movers: dict[str, Kernel] = {}
        self._mover: Mover | None = None
        if movers:
            module = gpu.load_module(movers, name=f"{base.tenant}/movers")
            undo.callback(module.close)
            self._movers = {name: module.kernel(name) for name in (SCATTER, GATHER)}
            self._mover = Mover(module, memory)
        launches = Counter(step.kernel for step in self.package.steps if isinstance(step, KernelStep))
        self.kernels = [name for name, _ in launches.most_common()]  # those first whose launches are most
        self._graphs: dict[tuple[Dependents, ...], Graph] = {}
        self._kept: dict[str, Graph] = {}
        undo.callback(self.close)

    def operations(self, choice: Choice) -> list[Any]:
        found = []
        steps = iter(self.package.steps)
        for operation in self.base.operations:
            if isinstance(operation, Launch) and operation.kernel.name in (SCATTER, GATHER):
                kernel = self._movers.get(operation.kernel.name)
                found.append(operation if kernel is None else replace(operation, kernel=kernel, overlaps=True))
                continue
            step = next(steps)
            if isinstance(step, KernelStep) and isinstance(operation, Launch):
                place = choice[step.kernel]
                kernel = self._kernels[place].get(step.kernel) if self._kernels else operation.kernel
                if kernel is not None:
                    operation = replace(operation, kernel=kernel, overlaps=True)
            found.append(operation)
        return found

    def graph(self, choice: Choice) -> Graph:
        """Of one choice; given back when others were asked for since."""
        key = tuple(choice[kernel] for kernel in self.kernels)
        if key in self._graphs:
            self._graphs[key] = self._graphs.pop(key)
        else:
            self._graphs[key] = self.gpu.create_graph(self.operations(choice))
            while len(self._graphs) > _GRAPHS:
                self._graphs.pop(next(iter(self._graphs))).close()
        return self._graphs[key]

    def keep(self, name: str, choice: Choice | None) -> Graph:
        """A graph that stays; None: of the model as it is."""
        if name not in self._kept:
            operations = self.base.operations if choice is None else self.operations(choice)
            self._kept[name] = self.gpu.create_graph(operations)
        return self._kept[name]

    @property
    def kept(self) -> dict[str, Graph]:
        return dict(self._kept)

    def poison(self, stream: Stream, byte: int) -> None:
        """Fill scratch, so that what reads too early reads no result of the run before."""
        place = place_buffers(self.package).get(BufferKind.SCRATCH)
        if place is None or not place.offsets:
            return
        name, offset = next(iter(place.offsets.items()))
        address = self.base.addresses[name] - offset
        if self._mover is not None:
            stream.launch(self._mover.fill(address, place.nbytes, byte))
        elif self._memory is None:
            stream.launch(Fill(address, place.nbytes, byte))

    def output(self, graph: Graph, stream: Stream, bits: Bits, byte: int) -> bytes:
        """What one run gives."""
        self.poison(stream, byte)
        stream.launch_graph(graph)
        stream.synchronize()
        return bits.output(self.base)

    def close(self) -> None:
        for graph in (*self._graphs.values(), *self._kept.values()):
            graph.close()
        self._graphs.clear()
        self._kept.clear()


def ptx_of(package: ModelPackage, directory: Path) -> dict[str, str]:
    """The code that the table's keys are of; made-up text where a package has none (simulated)."""
    found = {}
    for image in package.kernels:
        path = directory / "kernels" / f"{image.id}.ptx"
        found[image.id] = path.read_text() if path.exists() else f"{package.name} {image.id}"
    return found


def digest_of(choice: Choice) -> str:
    """To tell choices apart in raw data."""
    return hashlib.sha256(repr(sorted(choice.items())).encode()).hexdigest()[:8]


def places_of(choice: Choice) -> dict[str, int]:
    return {str(place): sum(own is place for own in choice.values()) for place in Dependents}


def all_late(kernels: Sequence[str]) -> dict[str, Dependents]:
    return uniform(kernels, Dependents.LATE)


def _load(
    package: ModelPackage, cubins: Mapping[str, bytes], gpu: Gpu, tenant: str, undo: ExitStack
) -> dict[str, Kernel]:
    own = package.model_copy(update={"kernels": tuple(image for image in package.kernels if image.id in cubins)})
    return load_images(own, cubins, gpu, tenant, undo)
