"""From what the operator named to a PyTorch module with a signature: a zoo name, a `.pt2` file or `module:factory`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from missile.errors import MissileError, MisuseError, UnsupportedError
from missile.serving.config import TenantConfig
from missile.serving.tensors import DATATYPES, ModelSignature, TensorSignature
from missile.workloads.models import BuiltModel, build_model, model_info

__all__ = ["OpenedModel", "check_batch", "flatten", "model_signature", "open_model", "output_signatures"]

_BY_TORCH = {d.torch: d for d in DATATYPES.values()}


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A callable module and its inputs (outputs are found by running it). fixed_batch: 0 when it may vary.

    examples: inputs that came with it, on its device; empty where none did.
    """

    module: Any
    inputs: tuple[TensorSignature, ...]
    fixed_batch: int = 0
    examples: tuple[Any, ...] = ()


def open_model(tenant: TenantConfig, folder: Path, *, batch: int = 1, device: str = "cpu") -> OpenedModel:
    """Open `tenant.model` on `device`. MisuseError says what is wrong with the name, the file or the factory.

    batch: of the examples, and what a factory is asked for; a model without a batch axis takes none.
    """
    try:
        import torch
    except ImportError:
        raise UnsupportedError("Serving a model needs PyTorch; install missile[torch].") from None
    name = tenant.model
    with torch.random.fork_rng(devices=[]):
        if name.endswith(".pt2"):
            opened = _open_exported(torch, tenant, folder, device)
        elif ":" in name:
            opened = _open_factory(torch, tenant, folder, batch, device)
        else:
            opened = _open_zoo(tenant, batch, device)
    if tenant.weights is not None:
        _load_weights(opened.module, folder / tenant.weights)
    return opened


def _configured_inputs(tenant: TenantConfig) -> tuple[TensorSignature, ...]:
    return tuple(TensorSignature(t.name, t.datatype, tuple(t.shape)) for t in tenant.inputs)


def _inputs_from_examples(
    tenant: TenantConfig, examples: Sequence[Any], names: Sequence[str]
) -> tuple[TensorSignature, ...]:
    """Signatures as the example tensors have them; their first axis is the batch where the model is batched."""
    found = []
    for index, example in enumerate(examples):
        datatype = _BY_TORCH.get(str(getattr(example, "dtype", "")).removeprefix("torch."))
        if datatype is None:
            raise MisuseError(f"Tenant {tenant.name!r}: input {index} of its model is not a tensor that can be served.")
        if tenant.batched and not len(example.shape):
            raise MisuseError(f"Tenant {tenant.name!r}: input {index} has no batch axis; set batched = false.")
        shape = tuple(int(size) for size in example.shape[1 if tenant.batched else 0 :])  # a batch may be symbolic
        name = names[index] if index < len(names) else f"input{index}"
        found.append(TensorSignature(name, datatype.name, shape))
    return tuple(found)


def _open_exported(torch: Any, tenant: TenantConfig, folder: Path, device: str) -> OpenedModel:
    path = folder / tenant.model
    if not path.is_file():
        raise MisuseError(f"Tenant {tenant.name!r}: there is no file {tenant.model}.")
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # torch names no common base for what a broken archive raises
        raise MisuseError(f"Tenant {tenant.name!r}: {tenant.model} is not a torch.export archive ({error}).") from error
    names = list(program.graph_signature.user_inputs)
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    examples: list[Any] = [placeholders.get(name) for name in names]
    given = program.call_spec.in_spec
    by_name = given.child(1) if hasattr(given, "child") else given.children_specs[1]
    if by_name.num_leaves or not all(hasattr(e, "shape") for e in examples):
        raise UnsupportedError(
            f"Tenant {tenant.name!r}: {tenant.model} takes keyword arguments, or values that are no tensors; export it with "
            "tensors by position."
        )
    fixed = 0
    for example in examples:
        if tenant.batched and example.shape:
            if isinstance(example.shape[0], int):
                fixed = example.shape[0]
            moving = example.shape[1:]
        else:
            moving = example.shape
        if any(not isinstance(size, int) for size in moving):
            raise UnsupportedError(
                f"Tenant {tenant.name!r}: {tenant.model} has an axis of variable size other than the batch; "
                "export it with fixed sizes."
            )
    inputs = _configured_inputs(tenant) or _inputs_from_examples(tenant, examples, names)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return OpenedModel(program.module(), inputs, fixed_batch=fixed)


def _open_factory(torch: Any, tenant: TenantConfig, folder: Path, batch: int, device: str) -> OpenedModel:
    module_name, _, attribute = tenant.model.partition(":")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise MisuseError(f"Tenant {tenant.name!r}: {module_name!r} can't be imported: {error}.") from error
    except AttributeError:
        raise MisuseError(f"Tenant {tenant.name!r}: module {module_name!r} has no {attribute!r}.") from None
    made = factory(batch if tenant.batched else 0, **tenant.options)
    if isinstance(made, BuiltModel):
        made = (made.module, made.inputs)
    module, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, ())
    if not isinstance(module, torch.nn.Module):
        raise MisuseError(
            f"Tenant {tenant.name!r}: {tenant.model} must return a torch.nn.Module, or one and its example inputs, "
            f"not {type(made).__name__}."
        )
    module.eval().to(device)
    inputs = _configured_inputs(tenant)
    examples = (examples,) if isinstance(examples, torch.Tensor) else tuple(examples)
    if not inputs and not examples:
        raise MisuseError(
            f"Tenant {tenant.name!r}: {tenant.model} returned no example inputs, so the configuration must name its "
            "inputs ([[tenant.input]])."
        )
    found = inputs or _inputs_from_examples(tenant, examples, ())
    return OpenedModel(module, found, examples=tuple(example.to(device) for example in examples))


def _open_zoo(tenant: TenantConfig, batch: int, device: str) -> OpenedModel:
    if tenant.inputs or tenant.options:
        raise MisuseError(f"Tenant {tenant.name!r}: a zoo model takes neither inputs nor options.")
    info = model_info(tenant.model)
    if info.inputs == "decode":
        raise UnsupportedError(
            f"Tenant {tenant.name!r}: {tenant.model} keeps a cache from request to request, which serving does not offer."
        )
    built = build_model(tenant.model, batch, device=device)
    found = _inputs_from_examples(tenant, built.inputs, built.input_names)
    return OpenedModel(built.module, found, examples=built.inputs)


def _load_weights(module: Any, path: Path) -> None:
    if path.suffix != ".safetensors":
        raise MisuseError(f"weights = {path.name!r}: only .safetensors files are loaded (others can hold code).")
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(str(path)))
    except (OSError, RuntimeError, MissileError) as error:
        raise MisuseError(f"{path.name} does not fit the model: {str(error).splitlines()[0]}") from error


def check_batch(tenant: TenantConfig, opened: OpenedModel) -> None:
    """MisuseError when the tenant's batch rule asks for another batch than the one that the model is fixed to."""
    if opened.fixed_batch and tenant.batch.max not in (1, opened.fixed_batch):
        raise MisuseError(
            f"Tenant {tenant.name!r}: batch.max = {tenant.batch.max}, but its model was exported for a batch of "
            f"exactly {opened.fixed_batch}."
        )


def flatten(result: Any) -> list[tuple[str, Any]]:
    """A module's result as named tensors: a tensor, a sequence of them or a mapping; None entries are left out."""
    if isinstance(result, Mapping):
        return [(str(key), value) for key, value in result.items() if value is not None]
    if isinstance(result, (tuple, list)):
        kept = [value for value in result if value is not None]
        return [(f"output{index}", value) for index, value in enumerate(kept)]
    return [("output0", result)]


def output_signatures(tenant: TenantConfig, result: Any, batch: int) -> tuple[TensorSignature, ...]:
    """The outputs' signatures, from what a run on `batch` items gave. MisuseError when they can't be served."""
    named = flatten(result)
    names = list(tenant.outputs)
    if names and len(names) != len(named):
        raise MisuseError(f"Tenant {tenant.name!r}: {len(names)} outputs are named but its model gives {len(named)}.")
    found = []
    for index, (name, value) in enumerate(named):
        datatype = _BY_TORCH.get(str(getattr(value, "dtype", "")).removeprefix("torch."))
        if datatype is None:
            raise MisuseError(
                f"Tenant {tenant.name!r}: output {name!r} of its model is not a tensor that can be served."
            )
        shape = tuple(int(size) for size in value.shape)
        if tenant.batched:
            if not shape or shape[0] != batch:
                raise MisuseError(
                    f"Tenant {tenant.name!r}: output {name!r} has shape {list(shape)} for a batch of {batch}; "
                    "set batched = false if the model has no batch axis."
                )
            shape = shape[1:]
        found.append(TensorSignature(names[index] if names else name, datatype.name, shape))
    return tuple(found)


def model_signature(tenant: TenantConfig, opened: OpenedModel, outputs: tuple[TensorSignature, ...]) -> ModelSignature:
    """The whole signature; the most items of one request are the batch rule's, or what the export fixed."""
    if not tenant.batched:
        return ModelSignature(opened.inputs, outputs, 0)
    return ModelSignature(opened.inputs, outputs, opened.fixed_batch or tenant.batch.max)
