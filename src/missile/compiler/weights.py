"""Reading and writing weight buffers as a safetensors file of bytes (format: 8-byte header length, JSON header, data).

Written here because the format is small and running a package must need neither torch nor another dependency.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError

__all__ = ["WEIGHTS_FILE", "read_weights", "write_weights"]

WEIGHTS_FILE = "weights.safetensors"

Bytes = npt.NDArray[np.uint8]


def write_weights(weights: Mapping[str, Bytes], path: Path) -> None:
    """Write each buffer's bytes, whole or not at all."""
    header: dict[str, object] = {}
    end = 0
    for name, data in weights.items():
        header[name] = {"dtype": "U8", "shape": [data.nbytes], "data_offsets": [end, end + data.nbytes]}
        end += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in weights.values():
            file.write(np.ascontiguousarray(data).data)
    part.replace(path)


def read_weights(path: Path) -> dict[str, Bytes]:
    """Each buffer's bytes, read-only and mapped from the file: read when touched. MisuseError for a broken file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        spans = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
        if any(not 0 <= low <= high <= size - 8 - length for low, high in spans.values()):
            raise ValueError("it is truncated")
    except FileNotFoundError:
        raise MisuseError(f"{path.parent} has no {path.name}; compile the model again.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise MisuseError(f"{path} can't be read: {error}.") from error
    if size == 8 + length:
        return {name: np.empty(0, np.uint8) for name in spans}
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    return {name: data[low:high] for name, (low, high) in spans.items()}
