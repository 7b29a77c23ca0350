"""A request of either protocol, checked against the model's signature: what fits becomes an `Inference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from missile.serving.access import Principal
from missile.serving.gateway import Inference
from missile.serving.refusal import Reason, Refusal
from missile.serving.regions import Regions, RegionSlice
from missile.serving.tenant import Tenant
from missile.serving.tensors import DATATYPES, Datatype, ModelSignature, TensorSignature, bf16_to_float, float_to_bf16

__all__ = ["GivenInput", "InferRequest", "WantedOutput", "bind", "from_numbers", "timeout_ns", "to_numbers"]

MAX_ID = 256
MAX_TIMEOUT_US = 3_600_000_000


@dataclass(frozen=True, slots=True)
class GivenInput:
    """An input as it came. Exactly one of `raw` (its bytes), `numbers` (of JSON or typed contents) and `region`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: Any = None
    numbers: Any = None
    region: tuple[str, int, int] | None = None  # name, offset, bytes


@dataclass(frozen=True, slots=True)
class WantedOutput:
    name: str
    binary: bool | None = None  # None: as the request says
    region: tuple[str, int, int] | None = None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request of either protocol. outputs empty: all of them. parameters: the request's own."""

    inputs: Sequence[GivenInput]
    outputs: Sequence[WantedOutput] = ()
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


def invalid(message: str) -> Refusal:
    return Refusal(Reason.INVALID, message)


def bind(
    request: InferRequest, tenant: Tenant, regions: Regions, principal: Principal, arrival_ns: int, started_ns: int = 0
) -> tuple[Inference, list[tuple[int, WantedOutput, RegionSlice | None]]]:
    """The inference and which outputs to return, in order. Refusals are one sentence and name the tensor."""
    deployment = tenant.ready()
    signature = deployment.signature
    if len(request.id) > MAX_ID:
        raise invalid(f"The request's id is longer than {MAX_ID} characters.")
    if len(request.inputs) != len(signature.inputs):
        names = ", ".join(repr(t.name) for t in signature.inputs)
        raise invalid(
            f"Model {tenant.name!r} takes {len(signature.inputs)} input(s) ({names}), not {len(request.inputs)}."
        )
    given = {one.name: one for one in request.inputs}
    batch = -1
    sources = []
    for index, tensor in enumerate(signature.inputs):
        one = given.get(tensor.name)
        if one is None:
            names = ", ".join(repr(t.name) for t in signature.inputs)
            raise invalid(f"Input {tensor.name!r} is missing; model {tenant.name!r} takes {names}.")
        items = _check_shape(one, tensor, signature)
        if batch not in (-1, items):
            raise invalid(f"Input {tensor.name!r} has a batch of {items}, the inputs before it of {batch}.")
        batch = items
        nbytes = deployment.layout(items if signature.max_batch else 1).input_sizes[index]
        sources.append(_source(one, tensor, nbytes, regions, principal))
    inference = Inference(
        tenant,
        deployment,
        batch if signature.max_batch else 1,
        sources,
        arrival_ns,
        started_ns or arrival_ns,
        timeout_ns(request.parameters, tenant),
        _integer(request.parameters, "priority", 0, 0, 2**31 - 1),
    )
    return inference, _bind_outputs(request, tenant, signature, inference.batch, regions, principal)


def _check_shape(one: GivenInput, tensor: TensorSignature, signature: ModelSignature) -> int:
    """The items of the batch (1 without a batch axis)."""
    if one.datatype != tensor.datatype:
        raise invalid(f"Input {tensor.name!r} must be {tensor.datatype}, not {one.datatype!r:.40}.")
    shape = one.shape
    if not signature.max_batch:
        if shape != tensor.shape:
            raise invalid(f"Input {tensor.name!r} must have shape {list(tensor.shape)}, not {list(shape)!s:.200}.")
        return 1
    if len(shape) != len(tensor.shape) + 1 or shape[1:] != tensor.shape:
        raise invalid(f"Input {tensor.name!r} must have shape {[-1, *tensor.shape]}, not {list(shape)!s:.200}.")
    if not 1 <= shape[0] <= signature.max_batch:
        raise invalid(
            f"Input {tensor.name!r} has a batch of {shape[0]}; this model takes 1 to {signature.max_batch} in a request."
        )
    return shape[0]


def _source(one: GivenInput, tensor: TensorSignature, nbytes: int, regions: Regions, principal: Principal) -> Any:
    if one.region is not None:
        name, offset, size = one.region
        if size != nbytes:
            raise invalid(f"Input {tensor.name!r} needs {nbytes} bytes; {size} of shared memory were given.")
        return regions.slice(principal, name, offset, size)
    if one.raw is not None:
        if len(one.raw) != nbytes:
            raise invalid(f"Input {tensor.name!r} needs {nbytes} bytes for its shape; {len(one.raw)} were given.")
        return one.raw
    if one.numbers is not None:
        return from_numbers(one.numbers, DATATYPES[tensor.datatype], nbytes, tensor.name)
    raise invalid(f"Input {tensor.name!r} has no data.")


def _bind_outputs(
    request: InferRequest, tenant: Tenant, signature: ModelSignature, batch: int, regions: Regions, principal: Principal
) -> list[tuple[int, WantedOutput, RegionSlice | None]]:
    if not request.outputs:
        return [(index, WantedOutput(tensor.name), None) for index, tensor in enumerate(signature.outputs)]
    by_name = {tensor.name: index for index, tensor in enumerate(signature.outputs)}
    bound = []
    for wanted in request.outputs:
        index = by_name.pop(wanted.name, None)
        if index is None:
            names = ", ".join(repr(t.name) for t in signature.outputs)
            raise invalid(
                f"Output {wanted.name!r:.80} is unknown or asked for twice; model {tenant.name!r} gives {names}."
            )
        place = None
        if wanted.region is not None:
            name, offset, size = wanted.region
            needed = signature.outputs[index].item_nbytes * batch
            if size < needed:
                raise invalid(f"Output {wanted.name!r} needs {needed} bytes; {size} of shared memory were given.")
            place = regions.slice(principal, name, offset, needed)
        bound.append((index, wanted, place))
    return bound


def _integer(parameters: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = parameters.get(name, default)
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise invalid(f"Parameter {name!r} must be a whole number from {low} to {high}.")
    return value


def timeout_ns(parameters: Mapping[str, Any], tenant: Tenant) -> int:
    """The request's `timeout` (microseconds; 0 or absent: the tenant's own), ns; 0 for none."""
    asked = _integer(parameters, "timeout", 0, 0, MAX_TIMEOUT_US) * 1000
    own = int((tenant.config.timeout_ms or 0.0) * 1e6)
    return min(asked, own) if asked and own else asked or own


def from_numbers(numbers: Any, datatype: Datatype, nbytes: int, name: str) -> memoryview:
    """Bytes of numbers that JSON or typed contents gave (nested or flat), nothing rounded away or wrapped.

    Integers and booleans must be exact; floats are rounded to the nearest of their type and must stay finite.
    """
    try:
        array = np.asarray(numbers)
    except (ValueError, OverflowError):
        raise invalid(f"The data of input {name!r} are ragged or nested too deep.") from None
    if array.size * datatype.nbytes != nbytes:
        raise invalid(
            f"Input {name!r} needs {nbytes // datatype.nbytes} values for its shape; {array.size} were given."
        )
    if array.size == 0:
        return memoryview(b"")
    kind = array.dtype.kind
    if datatype.name == "BOOL":
        if kind != "b" and not (kind in "iu" and array.min() >= 0 and array.max() <= 1):
            raise invalid(f"The data of input {name!r} must be booleans.")
        result: npt.NDArray[Any] = array.astype(np.bool_)
    elif datatype.floating:
        if kind not in "iuf":
            raise invalid(f"The data of input {name!r} must be numbers.")
        with np.errstate(over="ignore"):
            wide = array.astype(np.float32 if datatype.name == "BF16" else datatype.numpy)
        if not np.isfinite(wide).all():
            raise invalid(f"The data of input {name!r} hold values beyond {datatype.name}.")
        result = float_to_bf16(wide) if datatype.name == "BF16" else wide
    else:
        info = np.iinfo(datatype.numpy)
        if kind == "f" and datatype.name == "UINT64":  # what NumPy makes of values on both sides of 2^63
            exact = np.asarray(numbers, dtype=object)
            if all(type(value) is int for value in exact.flat):
                array, kind = exact, "u"
        if kind not in "iu" or int(array.min()) < info.min or int(array.max()) > info.max:
            raise invalid(f"The data of input {name!r} must be whole numbers from {info.min} to {info.max}.")
        result = array.astype(datatype.numpy)
    return memoryview(np.ascontiguousarray(result).reshape(-1).view(np.uint8).data)


def to_numbers(raw: memoryview, datatype: Datatype) -> list[Any]:
    """The values as JSON can carry them, flat, in order. Floats that are not finite become None there."""
    values: npt.NDArray[Any] = np.frombuffer(raw, datatype.numpy)
    if datatype.name == "BF16":
        values = bf16_to_float(values)
    numbers: list[Any] = values.tolist()
    return numbers
