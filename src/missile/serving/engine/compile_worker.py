"""The process that compiles one tenant's model: `python -m ... FOLDER DIRECTORY DEVICE`, the tenant as JSON on its input."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from missile.errors import MissileError, MisuseError
from missile.serving.config import TenantConfig
from missile.serving.engine.models import OpenedModel, check_batch, open_model, output_signatures
from missile.serving.tensors import DATATYPES, TensorSignature
from missile.workloads.models import BuiltModel

__all__ = ["build"]

log = logging.getLogger("missile.engine")

_PR_SET_PDEATHSIG = 1


def build(tenant: TenantConfig, folder: Path, device: str) -> BuiltModel:
    """The tenant's model on `device`, as the compiler takes it, with all its outputs named.

    Its example inputs are for `batch.max`, or the batch that its file fixes. MisuseError when it can't be opened or its
    outputs can't be served.
    """
    import torch

    opened = open_model(tenant, folder, batch=tenant.batch.max, device=device)
    check_batch(tenant, opened)
    batch = opened.fixed_batch or tenant.batch.max
    inputs = _examples(torch, tenant, opened, batch, device)
    for parameter in opened.module.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        outputs = output_signatures(tenant, opened.module(*inputs), batch)
    names = tuple(signature.name for signature in opened.inputs)
    return BuiltModel(tenant.model, batch, opened.module, inputs, names, output_names=tuple(o.name for o in outputs))


def _examples(torch: Any, tenant: TenantConfig, opened: OpenedModel, batch: int, device: str) -> tuple[Any, ...]:
    """Those that came with the model where they fit its inputs; else noise, and zeros where an index may be meant."""
    shapes = [(batch, *t.shape) if tenant.batched else t.shape for t in opened.inputs]
    types = [getattr(torch, DATATYPES[t.datatype].torch) for t in opened.inputs]
    fit = [(tuple(e.shape), e.dtype) for e in opened.examples] == list(zip(shapes, types, strict=True))
    if opened.examples and not tenant.inputs and not fit:
        raise MisuseError(
            f"Tenant {tenant.name!r}: for a batch of {batch} its factory gave example inputs of {_sizes(opened.examples)}."
        )
    if fit:
        return opened.examples
    generator = torch.Generator("cpu").manual_seed(1)
    made = []
    for signature, shape, dtype in zip(opened.inputs, shapes, types, strict=True):
        values = torch.zeros(shape, dtype=dtype)
        if _is_floating(signature):
            values = torch.randn(shape, generator=generator).to(dtype)
        made.append(values.to(device))
    return tuple(made)


def _is_floating(signature: TensorSignature) -> bool:
    return DATATYPES[signature.datatype].floating


def _sizes(tensors: Sequence[Any]) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors)


def main() -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # nobody wants the package when the engine is gone
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print
    folder, directory, device = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    tenant = TenantConfig.model_validate_json(sys.stdin.read())
    found: dict[str, str] = {}
    try:
        from missile.compiler.build import compile_built

        compile_built(
            lambda: build(tenant, folder, device),
            directory,
            device=device,
            progress=lambda text: log.info("tenant %s: %s", tenant.name, text),
        )
    except MissileError as error:
        found = {"error": str(error), "kind": type(error).__name__}
    except Exception as error:  # whatever a user's factory or model raises
        log.exception("compiling %s failed", tenant.model)
        text = (str(error).splitlines() or [""])[0]
        found = {"error": f"Tenant {tenant.name!r}: {type(error).__name__}: {text}", "kind": "MissileError"}
    with answer:
        answer.write(json.dumps(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
