"""The twelve models: what they are, and that nothing but their name is needed to get one."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from missile.errors import MisuseError
from missile.workloads.models import MODELS, BuiltModel, build_model, default_batch, model_info, model_names

torch = pytest.importorskip("torch")

# Parameters in millions, from the libraries' documentation and the papers (without BERT's pooling layers).
PARAMETERS = {
    "mobilenet_v3_large": 5.48,
    "squeezenet1_1": 1.24,
    "shufflenet_v2": 2.28,
    "efficientnet_b0": 5.29,
    "resnet34": 21.80,
    "mobilebert": 24.58,
    "mobilevit_s": 5.58,
    "efficientformer_l1": 12.29,
    "resnet152": 60.19,
    "densenet161": 28.68,
    "bert_large": 334.1,
    "decoder_1b": 1100.0,
}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_model_has_its_size_and_takes_its_batch(name: str) -> None:
    model = build_model(name, 3, device="meta")
    assert sum(p.numel() for p in model.module.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], rel=0.01)
    assert all(x.shape[0] == 3 for x in model.inputs)
    assert len(model.inputs) == len(model.input_names)
    out = model.run()
    assert out.shape[0] == 3
    assert out.dtype == torch.float16


def test_there_are_twelve() -> None:
    assert set(model_names()) == set(PARAMETERS)
    assert [MODELS[name].kind for name in model_names()] == ["ls"] * 8 + ["be"] * 4
    assert all(
        default_batch(name) == (1 if model_info(name).kind == "ls" else MODELS[name].default_batch) for name in MODELS
    )


def test_weights_are_seeded_and_results_finite() -> None:
    first, again, other = (build_model("squeezenet1_1", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.run(), again.run())
    assert not torch.equal(first.run(), other.run())
    assert first.run().isfinite().all()


def test_global_random_state_is_untouched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model("squeezenet1_1", seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_decoder_writes_its_cache_and_reads_it() -> None:
    from missile.workloads.zoo.decoder import Decoder, DecoderGeometry

    torch.manual_seed(0)
    geometry = DecoderGeometry(layers=2, width=64, heads=4, kv_heads=2, hidden=96, vocabulary=50, context=8)
    decoder = Decoder(2, geometry).eval()
    assert len(decoder.state_buffers()) == 4
    tokens = torch.tensor([[3, 7, 1], [9, 2, 4]])
    with torch.no_grad():
        steps = [decoder(tokens[:, i], torch.full((2,), i)) for i in range(3)]
        assert all(bool((cache[:, :, 3:] == 0).all()) for cache in decoder.state_buffers().values())
        # Without the cached tokens before it, the last one means something else; with them, the same again.
        alone = Decoder(2, geometry)
        alone.load_state_dict(
            {k: v for k, v in decoder.state_dict().items() if ".keys" not in k and ".values" not in k}, strict=False
        )
        assert not torch.allclose(alone(tokens[:, 2], torch.full((2,), 2)), steps[2], atol=1e-4)
        assert torch.allclose(decoder(tokens[:, 2], torch.full((2,), 2)), steps[2], atol=1e-6)


def test_unknown_model_names_the_known() -> None:
    with pytest.raises(MisuseError, match=r"'alexnet'; known are mobilenet_v3_large, .*decoder_1b"):
        build_model("alexnet")


@pytest.mark.parametrize("batch", [0, -1, 100_000])
def test_absurd_batch_is_refused(batch: int) -> None:
    with pytest.raises(MisuseError, match=f"batch of {batch}"):
        build_model("resnet34", batch)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def test_own_model(mine: ModuleType) -> None:
    mine.make = lambda batch: (torch.nn.Linear(4, 2), torch.ones(batch, 4))  # type: ignore[attr-defined]
    model = build_model("mine:make", 5)
    assert isinstance(model, BuiltModel)
    assert model.run().shape == (5, 2)
    assert model.input_names == ("input0",)


def test_own_model_that_is_none(mine: ModuleType) -> None:
    mine.make = lambda batch: 7  # type: ignore[attr-defined]
    with pytest.raises(MisuseError, match="must return a module and a tuple"):
        build_model("mine:make")
    with pytest.raises(MisuseError, match="can't be imported"):
        build_model("mine:other")
    with pytest.raises(MisuseError, match="can't be imported"):
        build_model("nowhere_at_all:make")
