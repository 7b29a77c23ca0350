"""A model package whose weights stay in pinned host memory and are brought in when a request comes (residency "host")."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from missile.compiler.bind import BoundModel, bind, used_bytes
from missile.compiler.contents import load_contents
from missile.compiler.package import BufferKind, ModelPackage
from missile.compiler.planning import place_buffers
from missile.errors import MisuseError
from missile.gpu.interface import Gpu, HostBuffer, Stream
from missile.pcie.swap import HostModel, Segment, Swapper, WeightSlice, segments
from missile.pcie.weights import MIB
from missile.runtime.residency import LEAST_PART, PARTS, HostWeights

__all__ = ["HostedModel", "host_model", "host_weights", "load_image", "weight_bytes", "weight_parts"]


@dataclass(frozen=True, slots=True)
class HostedModel:
    """A tenant's model in a `Swapper`. Owns its host image and all of the model but the weights' place on the device.

    model: what was bound; its `graph` and `operations` use the weights' place as it was then: run it by `Swapper.start`.
    """

    tenant: str
    model: BoundModel
    hosted: HostModel
    _resources: ExitStack

    def close(self) -> None:
        """Give everything back. Idempotent. The caller has made sure that it does not run, nor will."""
        self._resources.close()


def weight_bytes(package: ModelPackage) -> int:
    """What the package's weights take of a swap budget."""
    places = place_buffers(package)
    return used_bytes(package, places, BufferKind.WEIGHT)


def host_model(
    package: ModelPackage, directory: Path | None, gpu: Gpu, swapper: Swapper, stream: Stream, *, tenant: str
) -> HostedModel:
    """Bind `package` and register it with `swapper`, to run on `stream`. Its weights are read into pinned memory.

    directory: as for `bind`. MisuseError for a package without weights or larger than the swapper's budget, and as `bind`;
    OutOfMemoryError. After an error nothing is held.
    """
    with ExitStack() as undo:
        image = load_image(package, directory, gpu, tenant=tenant)
        undo.callback(image.free)
        model = bind(package, directory, gpu, tenant=tenant, weights_at=swapper.address)
        undo.callback(model.close)
        hosted = HostModel(tenant, image, weight_bytes(package), weight_parts(package), model.operations_at)
        swapper.add(hosted, stream)
        return HostedModel(tenant, model, hosted, undo.pop_all())


def host_weights(package: ModelPackage, image: HostBuffer, address: int) -> HostWeights:
    """The package's weights, which wait in `image` (of `load_image`) for their place at `address`, in parts to be copied."""
    nbytes = weight_bytes(package)
    return HostWeights(image, address, nbytes, weight_parts(package, at_least=max(LEAST_PART, nbytes // PARTS)))


def load_image(package: ModelPackage, directory: Path | None, gpu: Gpu, *, tenant: str) -> HostBuffer:
    """The package's weights in pinned memory, as they lie in their place on the device. The caller frees it.

    directory: None, or a simulated GPU: nothing is read. MisuseError for a package without weights; OutOfMemoryError.
    """
    if not weight_bytes(package):
        raise MisuseError(f"Model {package.name!r} of tenant {tenant!r} has no weights to keep on the host.")
    place = place_buffers(package)[BufferKind.WEIGHT]
    with ExitStack() as undo:
        image = gpu.allocate_host(place.nbytes, tenant=tenant)
        undo.callback(image.free)
        if directory is not None and not gpu.info.simulated:
            load_contents(package, directory, gpu, tenant, {BufferKind.WEIGHT: place}, _Image(image))
        undo.pop_all()
        return image


def weight_parts(package: ModelPackage, *, at_least: int = 8 * MIB) -> tuple[Segment, ...]:
    """The package's weights in order of first use, in parts of `at_least` bytes; see `segments`."""
    place = place_buffers(package)[BufferKind.WEIGHT]
    slices = [
        WeightSlice(place.offsets[buffer.id], buffer.nbytes, buffer.first)
        for buffer in package.buffers
        if buffer.kind is BufferKind.WEIGHT and buffer.nbytes
    ]
    return segments(slices, at_least=at_least)


class _Image:
    """Contents of weights in host memory, where a `Sink` otherwise has device memory."""

    def __init__(self, image: HostBuffer) -> None:
        self._image = image

    def put(self, stream: Stream, kind: BufferKind, offset: int, staging: HostBuffer, nbytes: int) -> None:
        self._image.array[offset : offset + nbytes] = staging.array[:nbytes]

    def zero(self, stream: Stream, kind: BufferKind, nbytes: int) -> None:
        self._image.array[:nbytes] = 0
