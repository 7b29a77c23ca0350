"""Our gRPC messages against the client's: the same numbers, names and types, in a pool of their own."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pool
from tritonclient.grpc import model_config_pb2, service_pb2

from missile.serving.protocol.grpc_schema import _MESSAGES, METHODS, message


def _theirs(path: str) -> Any:
    outer, *nested = path.split(".")
    for file in (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR):
        if outer in file.message_types_by_name:
            found = file.message_types_by_name[outer]
            for name in nested:
                found = found.nested_types_by_name[name]
            return found
    raise AssertionError(path)


@pytest.mark.parametrize("path", sorted(_MESSAGES))
def test_fields_are_the_clients(path: str) -> None:
    theirs = _theirs(path).fields_by_number
    for field in message(path).DESCRIPTOR.fields:
        other = theirs[field.number]
        assert (field.name, field.type, field.is_repeated) == (other.name, other.type, other.is_repeated)


def test_messages_round_trip_between_both() -> None:
    ours = message("ModelInferRequest")(model_name="m", id="1")
    ours.parameters["priority"].uint64_param = 3
    ours.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    ours.raw_input_contents.append(b"12345678")
    theirs = service_pb2.ModelInferRequest.FromString(ours.SerializeToString())
    assert theirs.parameters["priority"].uint64_param == 3
    assert list(theirs.inputs[0].shape) == [1, 2]
    assert message("ModelInferRequest").FromString(theirs.SerializeToString()) == ours


def test_the_default_pool_is_left_alone() -> None:
    assert (
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
        is service_pb2.ModelInferRequest.DESCRIPTOR
    )


def test_every_method_is_the_clients() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for name, (request, response, _) in METHODS.items():
        assert (theirs[name].input_type.name, theirs[name].output_type.name) == (request, response)
