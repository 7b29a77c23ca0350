"""A model package whose weights stay in pinned host memory and are brought in when a request comes (residency "host")."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Final

from missile.compiler.bind import used_bytes
from missile.compiler.contents import load_contents
from missile.compiler.package import BufferKind, ModelPackage
from missile.compiler.planning import place_buffers
from missile.errors import MisuseError
from missile.gpu.interface import Gpu, HostBuffer, Stream
from missile.runtime.host_weights import HostWeights, Part, joined

__all__ = ["host_weights", "load_image", "weight_bytes"]

_PARTS: Final = 8
"""In how many parts a model's weights are copied, about: execution overlaps copying, each part costs the host some us."""

_LEAST_PART: Final = 8 << 20
"""Bytes of a part, at least."""


def weight_bytes(package: ModelPackage) -> int:
    """What the package's weights take of a swap budget."""
    places = place_buffers(package)
    return used_bytes(package, places, BufferKind.WEIGHT)


def host_weights(package: ModelPackage, image: HostBuffer, address: int) -> HostWeights:
    """The package's weights, which wait in `image` (of `load_image`) for their place at `address`, in parts to be copied."""
    place, nbytes = place_buffers(package)[BufferKind.WEIGHT], weight_bytes(package)
    weights = (buffer for buffer in package.buffers if buffer.kind is BufferKind.WEIGHT and buffer.nbytes)
    parts = (Part(place.offsets[buffer.id], buffer.nbytes, buffer.first) for buffer in weights)
    return HostWeights(image, address, nbytes, joined(parts, at_least=max(_LEAST_PART, nbytes // _PARTS)))


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


class _Image:
    """Contents of weights in host memory, where a `Sink` otherwise has device memory."""

    def __init__(self, image: HostBuffer) -> None:
        self._image = image

    def put(self, stream: Stream, kind: BufferKind, offset: int, staging: HostBuffer, nbytes: int) -> None:
        self._image.array[offset : offset + nbytes] = staging.array[:nbytes]

    def zero(self, stream: Stream, kind: BufferKind, nbytes: int) -> None:
        self._image.array[:nbytes] = 0
