"""The protocol's gRPC messages, built in a descriptor pool of their own.

Clients register the same package (`inference`) in protobuf's default pool; two registrations of one name in one pool
are an error, so a program that imports a client and this server keeps both apart. The field numbers are the protocol's.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["METHODS", "SERVICE", "message"]

PACKAGE = "inference"
SERVICE = "inference.GRPCInferenceService"

# Message: fields as "number name type". A leading * repeats; map<V> has string keys; = puts it in the oneof.
_MESSAGES: dict[str, tuple[str, ...]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("1 live bool",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("1 ready bool",),
    "ModelReadyRequest": ("1 name string", "2 version string"),
    "ModelReadyResponse": ("1 ready bool",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("1 name string", "2 version string", "3 extensions *string"),
    "ModelMetadataRequest": ("1 name string", "2 version string"),
    "ModelMetadataResponse": (
        "1 name string",
        "2 versions *string",
        "3 platform string",
        "4 inputs *ModelMetadataResponse.TensorMetadata",
        "5 outputs *ModelMetadataResponse.TensorMetadata",
    ),
    "ModelMetadataResponse.TensorMetadata": ("1 name string", "2 datatype string", "3 shape *int64"),
    "InferParameter": (
        "1 bool_param =bool",
        "2 int64_param =int64",
        "3 string_param =string",
        "4 double_param =double",
        "5 uint64_param =uint64",
    ),
    "InferTensorContents": (
        "1 bool_contents *bool",
        "2 int_contents *int32",
        "3 int64_contents *int64",
        "4 uint_contents *uint32",
        "5 uint64_contents *uint64",
        "6 fp32_contents *float",
        "7 fp64_contents *double",
        "8 bytes_contents *bytes",
    ),
    "ModelInferRequest": (
        "1 model_name string",
        "2 model_version string",
        "3 id string",
        "4 parameters map<InferParameter>",
        "5 inputs *ModelInferRequest.InferInputTensor",
        "6 outputs *ModelInferRequest.InferRequestedOutputTensor",
        "7 raw_input_contents *bytes",
    ),
    "ModelInferRequest.InferInputTensor": (
        "1 name string",
        "2 datatype string",
        "3 shape *int64",
        "4 parameters map<InferParameter>",
        "5 contents InferTensorContents",
    ),
    "ModelInferRequest.InferRequestedOutputTensor": ("1 name string", "2 parameters map<InferParameter>"),
    "ModelInferResponse": (
        "1 model_name string",
        "2 model_version string",
        "3 id string",
        "4 parameters map<InferParameter>",
        "5 outputs *ModelInferResponse.InferOutputTensor",
        "6 raw_output_contents *bytes",
    ),
    "ModelInferResponse.InferOutputTensor": (
        "1 name string",
        "2 datatype string",
        "3 shape *int64",
        "4 parameters map<InferParameter>",
        "5 contents InferTensorContents",
    ),
    "ModelStreamInferResponse": ("1 error_message string", "2 infer_response ModelInferResponse"),
    "ModelConfigRequest": ("1 name string", "2 version string"),
    "ModelConfigResponse": ("1 config ModelConfig",),
    "ModelConfig": (
        "1 name string",
        "2 platform string",
        "3 version_policy ModelVersionPolicy",
        "4 max_batch_size int32",
        "5 input *ModelInput",
        "6 output *ModelOutput",
        "7 instance_group *ModelInstanceGroup",
        "11 dynamic_batching ModelDynamicBatching",
        "14 parameters map<ModelParameter>",
        "17 backend string",
    ),
    "ModelVersionPolicy": ("3 specific ModelVersionPolicy.Specific",),
    "ModelVersionPolicy.Specific": ("1 versions *int64",),
    "ModelInput": ("1 name string", "2 data_type DataType", "4 dims *int64"),
    "ModelOutput": ("1 name string", "2 data_type DataType", "3 dims *int64"),
    "ModelInstanceGroup": ("1 name string", "2 count int32", "4 kind ModelInstanceGroup.Kind"),
    "ModelDynamicBatching": ("1 preferred_batch_size *int32", "2 max_queue_delay_microseconds uint64"),
    "ModelParameter": ("1 string_value string",),
    "ModelStatisticsRequest": ("1 name string", "2 version string"),
    "StatisticDuration": ("1 count uint64", "2 ns uint64"),
    "InferStatistics": (
        "1 success StatisticDuration",
        "2 fail StatisticDuration",
        "3 queue StatisticDuration",
        "4 compute_input StatisticDuration",
        "5 compute_infer StatisticDuration",
        "6 compute_output StatisticDuration",
        "7 cache_hit StatisticDuration",
        "8 cache_miss StatisticDuration",
    ),
    "InferBatchStatistics": (
        "1 batch_size uint64",
        "2 compute_input StatisticDuration",
        "3 compute_infer StatisticDuration",
        "4 compute_output StatisticDuration",
    ),
    "ModelStatistics": (
        "1 name string",
        "2 version string",
        "3 last_inference uint64",
        "4 inference_count uint64",
        "5 execution_count uint64",
        "6 inference_stats InferStatistics",
        "7 batch_stats *InferBatchStatistics",
    ),
    "ModelStatisticsResponse": ("1 model_stats *ModelStatistics",),
    "ModelRepositoryParameter": (
        "1 bool_param =bool",
        "2 int64_param =int64",
        "3 string_param =string",
        "4 bytes_param =bytes",
    ),
    "RepositoryIndexRequest": ("1 repository_name string", "2 ready bool"),
    "RepositoryIndexResponse": ("1 models *RepositoryIndexResponse.ModelIndex",),
    "RepositoryIndexResponse.ModelIndex": ("1 name string", "2 version string", "3 state string", "4 reason string"),
    "RepositoryModelLoadRequest": (
        "1 repository_name string",
        "2 model_name string",
        "3 parameters map<ModelRepositoryParameter>",
    ),
    "RepositoryModelLoadResponse": (),
    "RepositoryModelUnloadRequest": (
        "1 repository_name string",
        "2 model_name string",
        "3 parameters map<ModelRepositoryParameter>",
    ),
    "RepositoryModelUnloadResponse": (),
    "SystemSharedMemoryStatusRequest": ("1 name string",),
    "SystemSharedMemoryStatusResponse": ("1 regions map<SystemSharedMemoryStatusResponse.RegionStatus>",),
    "SystemSharedMemoryStatusResponse.RegionStatus": (
        "1 name string",
        "2 key string",
        "3 offset uint64",
        "4 byte_size uint64",
    ),
    "SystemSharedMemoryRegisterRequest": ("1 name string", "2 key string", "3 offset uint64", "4 byte_size uint64"),
    "SystemSharedMemoryRegisterResponse": (),
    "SystemSharedMemoryUnregisterRequest": ("1 name string",),
    "SystemSharedMemoryUnregisterResponse": (),
    "CudaSharedMemoryStatusRequest": ("1 name string",),
    "CudaSharedMemoryStatusResponse": (),
}

_ENUMS: dict[str, tuple[str, ...]] = {
    "DataType": (
        "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8",
        "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16",
    ),
    "ModelInstanceGroup.Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
}  # fmt: skip

# Method: (request, response, both sides stream).
METHODS: dict[str, tuple[str, str, bool]] = {
    **{
        name: (f"{name}Request", f"{name}Response", False)
        for name in (
            "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelConfig",
            "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
            "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
            "CudaSharedMemoryStatus",
        )
    },
    "ModelStreamInfer": ("ModelInferRequest", "ModelStreamInferResponse", True),
}  # fmt: skip

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
    "float": _Field.TYPE_FLOAT,
    "double": _Field.TYPE_DOUBLE,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_ENUM if kind in _ENUMS else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"


def _add_map(owner: Any, path: str, name: str, value: str) -> str:
    """The nested entry message that a map field is; its path."""
    entry = owner.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
    entry.options.map_entry = True
    for number, (key, kind) in enumerate((("key", "string"), ("value", value)), start=1):
        field = entry.field.add(name=key, number=number, label=_Field.LABEL_OPTIONAL)
        _set_type(field, kind)
    return f"{path}.{entry.name}"


def _describe() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="missile/serving/open_inference.proto", package=PACKAGE, syntax="proto3"
    )
    made: dict[str, Any] = {}
    for path in _MESSAGES:
        outer, _, name = path.rpartition(".")
        made[path] = made[outer].nested_type.add(name=name) if outer else file.message_type.add(name=name)
    for path, values in _ENUMS.items():
        outer, _, name = path.rpartition(".")
        enum = made[outer].enum_type.add(name=name) if outer else file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for path, fields in _MESSAGES.items():
        owner = made[path]
        for line in fields:
            place, name, kind = line.split()
            field = owner.field.add(name=name, number=int(place), label=_Field.LABEL_OPTIONAL)
            if kind.startswith("map<"):
                field.label = _Field.LABEL_REPEATED
                field.type = _Field.TYPE_MESSAGE
                field.type_name = f".{PACKAGE}.{_add_map(owner, path, name, kind[4:-1])}"
                continue
            if kind.startswith("*"):
                field.label = _Field.LABEL_REPEATED
            elif kind.startswith("="):
                if not owner.oneof_decl:
                    owner.oneof_decl.add(name="parameter_choice")
                field.oneof_index = 0
            _set_type(field, kind.lstrip("*="))
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_describe())
_classes: dict[str, Any] = {}


def message(name: str) -> Any:
    """The message class of that name, without the package ("ModelInferRequest")."""
    found = _classes.get(name)
    if found is None:
        descriptor = _pool.FindMessageTypeByName(f"{PACKAGE}.{name}")
        found = _classes[name] = message_factory.GetMessageClass(descriptor)
    return found
