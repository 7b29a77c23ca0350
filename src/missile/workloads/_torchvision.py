"""torchvision's Python models, also where its compiled operators don't fit the installed torch (a CPU build)."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

from missile.errors import UnsupportedError

__all__ = ["import_torchvision"]

_libraries: list[Any] = []  # a torch.library.Library takes its definitions back when it is collected


def import_torchvision() -> ModuleType:
    """torchvision, imported. The models need none of its compiled operators, but importing it names them all.

    Where they are missing, each is declared (without an implementation) so that the import passes.
    UnsupportedError when torchvision isn't installed.
    """
    import torch

    for _ in range(64):
        try:
            import torchvision
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                f"The models need PyTorch and torchvision ({error}); install missile[torch]."
            ) from error
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor x) -> Tensor")
            _libraries.append(library)
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            found: ModuleType = torchvision
            return found
    raise UnsupportedError("torchvision is installed but can't be imported with this torch.")
