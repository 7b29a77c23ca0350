"""The twelve DNNs, and how a user's own model comes in. Weights are seeded and random; contents don't change timing.

torch and the model libraries are imported when a model is built, never before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from missile.errors import MisuseError, UnsupportedError

if TYPE_CHECKING:
    import torch

__all__ = [
    "MODELS",
    "BuiltModel",
    "ModelInfo",
    "all_tensors",
    "build_model",
    "default_batch",
    "first_tensor",
    "model_info",
    "model_names",
]

IMAGE = 224  # pixels, both sides
SEQUENCE = 128  # tokens of an encoder's request


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model ready to run: `module(*inputs)` on `inputs[0].device`, evaluation mode, no gradients.

    inputs: example inputs, named by `input_names`; the batch is dimension 0 of each. output_names: of all its outputs, in
    their order; empty: its first tensor is its one output.
    state: the module's tensors whose contents survive from request to request (a decoder's cache), by name.
    """

    name: str
    batch: int
    module: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    input_names: tuple[str, ...]
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    output_names: tuple[str, ...] = ()

    def run(self) -> torch.Tensor:
        """The first output for the example inputs."""
        return self.run_all()[0]

    def run_all(self) -> tuple[torch.Tensor, ...]:
        """The outputs for the example inputs."""
        import torch

        with torch.no_grad():
            return self.outputs_of(self.module(*self.inputs))

    def outputs_of(self, result: object) -> tuple[torch.Tensor, ...]:
        """The outputs in what the module returned."""
        return all_tensors(result) if self.output_names else (first_tensor(result),)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One of the twelve. `kind`: its usual class. `default_batch`: requests in a batch. `origin`: the library."""

    name: str
    kind: Literal["ls", "be"]
    default_batch: int
    origin: Literal["torchvision", "timm", "transformers", "missile"]
    title: str
    inputs: Literal["image", "tokens", "decode"]
    create: Callable[[int], torch.nn.Module]  # of the batch size


def _torchvision(name: str) -> Callable[[int], torch.nn.Module]:
    def create(batch: int) -> torch.nn.Module:
        from missile.workloads._torchvision import import_torchvision

        module: torch.nn.Module = getattr(import_torchvision().models, name)(weights=None)
        return module

    return create


def _timm(name: str) -> Callable[[int], torch.nn.Module]:
    def create(batch: int) -> torch.nn.Module:
        from missile.workloads._torchvision import import_torchvision

        import_torchvision()
        import timm

        module: torch.nn.Module = timm.create_model(name, pretrained=False)
        return module

    return create


def _mobilebert(batch: int) -> torch.nn.Module:
    from missile.workloads._torchvision import import_torchvision

    import_torchvision()  # transformers imports it too
    from transformers import MobileBertConfig, MobileBertModel

    module: torch.nn.Module = MobileBertModel(MobileBertConfig(attn_implementation="sdpa"), add_pooling_layer=False)
    return module


def _bert_large(batch: int) -> torch.nn.Module:
    from missile.workloads._torchvision import import_torchvision

    import_torchvision()  # transformers imports it too
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        attn_implementation="sdpa",
    )
    module: torch.nn.Module = BertModel(config, add_pooling_layer=False)
    return module


def _decoder(batch: int) -> torch.nn.Module:
    from missile.workloads.zoo.decoder import Decoder

    return Decoder(batch)


MODELS: dict[str, ModelInfo] = {
    info.name: info
    for info in (
        ModelInfo(
            "mobilenet_v3_large",
            "ls",
            1,
            "torchvision",
            "MobileNetV3-Large",
            "image",
            _torchvision("mobilenet_v3_large"),
        ),
        ModelInfo("squeezenet1_1", "ls", 1, "torchvision", "SqueezeNet 1.1", "image", _torchvision("squeezenet1_1")),
        ModelInfo("shufflenet_v2", "ls", 1, "torchvision", "ShuffleNetV2", "image", _torchvision("shufflenet_v2_x1_0")),
        ModelInfo(
            "efficientnet_b0", "ls", 1, "torchvision", "EfficientNet-B0", "image", _torchvision("efficientnet_b0")
        ),
        ModelInfo("resnet34", "ls", 1, "torchvision", "ResNet-34", "image", _torchvision("resnet34")),
        ModelInfo("mobilebert", "ls", 1, "transformers", "MobileBERT", "tokens", _mobilebert),
        ModelInfo("mobilevit_s", "ls", 1, "timm", "MobileViT-S", "image", _timm("mobilevit_s")),
        ModelInfo("efficientformer_l1", "ls", 1, "timm", "EfficientFormer-L1", "image", _timm("efficientformer_l1")),
        ModelInfo("resnet152", "be", 32, "torchvision", "ResNet-152", "image", _torchvision("resnet152")),
        ModelInfo("densenet161", "be", 32, "torchvision", "DenseNet-161", "image", _torchvision("densenet161")),
        ModelInfo("bert_large", "be", 32, "transformers", "BERT-large", "tokens", _bert_large),
        ModelInfo("decoder_1b", "be", 8, "missile", "decoder, 1.1 B, decode phase", "decode", _decoder),
    )
}


def model_names() -> tuple[str, ...]:
    """The twelve, LS models first."""
    return tuple(MODELS)


def model_info(name: str) -> ModelInfo:
    """The entry of one of the twelve. MisuseError naming all of them when there is none of that name."""
    try:
        return MODELS[name]
    except KeyError:
        known = ", ".join(MODELS)
        raise MisuseError(f"Unknown model {name!r}; known are {known}, and your own as MODULE:FACTORY.") from None


def default_batch(name: str) -> int:
    """The batch size used where none is given: the registry's, or 1 for a user's own model."""
    return 1 if ":" in name else model_info(name).default_batch


def build_model(name: str, batch: int | None = None, *, device: str = "cpu", seed: int = 0) -> BuiltModel:
    """Build a model with seeded random weights, in fp16 on a GPU and on `meta`, and fp32 on the CPU, ready to run.

    name: one of the twelve, or `MODULE:FACTORY` of a user's own, where `FACTORY(batch)` returns the module and a tuple
    of example inputs (batch in dimension 0), or a `BuiltModel`.
    device: a torch device; `meta` gives shapes only.
    MisuseError for an unknown name, an unimportable factory or an absurd batch; UnsupportedError without PyTorch.
    """
    batch = default_batch(name) if batch is None else batch
    if not 1 <= batch <= 4096:
        raise MisuseError(f"A batch of {batch} makes no sense; it must be between 1 and 4096.")
    info = None if ":" in name else model_info(name)
    try:
        import torch
    except ModuleNotFoundError:
        raise UnsupportedError("Building a model needs PyTorch; install missile[torch].") from None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if info is None:
            return _user_model(name, batch, device)
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
        with torch.device("meta" if device == "meta" else "cpu"):
            module = info.create(batch).eval()
            inputs, names = _example_inputs(info, batch, module)
        module.to(device)
        if info.inputs == "image":
            module.to(memory_format=torch.channels_last)
            if device != "meta":
                _settle_batch_norms(module)
        module.to(dtype).requires_grad_(False)
        inputs = tuple(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs)
    state = module.state_buffers() if info.inputs == "decode" else {}
    return BuiltModel(name, batch, module, inputs, names, state)


def first_tensor(output: object) -> torch.Tensor:
    """The first tensor of a model's output (a tensor, a tuple, or one of transformers' output objects)."""
    import torch

    while not isinstance(output, torch.Tensor):
        output = output[0]  # type: ignore[index]
    return output


def all_tensors(output: object) -> tuple[torch.Tensor, ...]:
    """All tensors of a model's output, in order: of a tensor, or a sequence or mapping of them; None is left out."""
    import torch

    if isinstance(output, torch.Tensor):
        return (output,)
    values = output.values() if isinstance(output, Mapping) else output
    return tuple(tensor for value in values if value is not None for tensor in all_tensors(value))  # type: ignore[attr-defined]


def _example_inputs(
    info: ModelInfo, batch: int, module: torch.nn.Module
) -> tuple[tuple[torch.Tensor, ...], tuple[str, ...]]:
    import torch

    if info.inputs == "image":
        return (_random_images(batch),), ("image",)
    if info.inputs == "tokens":
        return (torch.randint(0, 30000, (batch, SEQUENCE)),), ("tokens",)
    geometry = module.geometry  # the decoder's
    tokens = torch.randint(0, geometry.vocabulary, (batch,))
    return (tokens, torch.full((batch,), geometry.context - 1)), ("tokens", "positions")


def _random_images(count: int) -> torch.Tensor:
    """Images with as much variance at coarse scales as at fine ones, as pictures have; shape (count, 3, 224, 224).

    White noise averages out over a network's receptive fields: its deep features would be constants plus rounding.
    """
    import torch
    from torch.nn.functional import interpolate

    scales = [torch.randn(count, 3, side, side) for side in (1, 4, 16, 56, IMAGE)]
    layers = [x if x.shape[-1] in (1, IMAGE) else interpolate(x, (IMAGE, IMAGE), mode="bilinear") for x in scales]
    mixed = torch.stack([x.expand(-1, -1, IMAGE, IMAGE) for x in layers]).sum(0) * len(scales) ** -0.5
    return mixed.to(memory_format=torch.channels_last)


def _settle_batch_norms(module: torch.nn.Module) -> None:
    """Give batch norms the statistics of random images, and a shift.

    With the untrained statistics (mean 0, variance 1) the activations of a deep residual network double from block to
    block and leave fp16's range. Without a shift an untrained network is chaotic, as no trained one is: each layer's
    ReLU amplifies the rounding errors of those before it (ShuffleNetV2 in fp16 against fp32: 1.3e-2, with it 2.5e-3).
    """
    import torch

    norms = [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None  # a plain average
        if norm.affine:
            norm.bias.fill_(0.5)
        norm.train()
    module(_random_images(16).to(next(module.parameters()).device))
    module.train()  # some modules keep what they computed in evaluation mode, in fp32, until they train again
    module.eval()


def _user_model(name: str, batch: int, device: str) -> BuiltModel:
    import torch

    where, _, factory_name = name.partition(":")
    try:
        factory = getattr(importlib.import_module(where), factory_name)
    except (ImportError, AttributeError) as error:
        raise MisuseError(f"Model {name!r} can't be imported: {error}.") from error
    made = factory(batch)
    if isinstance(made, BuiltModel):
        return made
    try:
        module, inputs = made
        inputs = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
        module = module.eval().to(device).requires_grad_(False)
        inputs = tuple(x.to(device) for x in inputs)
    except (TypeError, ValueError, AttributeError) as error:
        raise MisuseError(
            f"{name!r} must return a module and a tuple of example tensors (it gave {type(made).__name__})."
        ) from error
    return BuiltModel(name, batch, module, inputs, tuple(f"input{i}" for i in range(len(inputs))))
