"""Models of one's own on a GPU: what is compiled, under which name it is kept, and by whom. Compiling itself needs a GPU."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from missile.compiler.package import ModelPackage, TensorSpec, write_package
from missile.errors import MisuseError, UnsupportedError
from missile.gpu import open_gpu
from missile.serving.config import TenantConfig, parse_config
from missile.serving.engine.compile_worker import build
from missile.serving.engine.compiling import compiled_package, package_name

torch = pytest.importorskip("torch")

INFO = open_gpu("sim:h100").info


class Net(torch.nn.Module):
    """Two inputs, two outputs, a buffer, and a tensor that is made while it runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(32, 16)
        self.register_buffer("scale", torch.arange(1.0, 17.0) / 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.linear(x) * self.scale, "twice": 2 * y + torch.zeros(16, dtype=y.dtype, device=x.device)}


class Plain(torch.nn.Module):
    """As `Net`, without a product of matrices, whose kernel is chosen among many that are compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.arange(1.0, 17.0) / 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        made = torch.ones(16, dtype=y.dtype, device=x.device)
        return {"sum": x[:, :16] * self.scale + x[:, 16:], "twice": 2 * y + made}


FACTORY = """
import torch

def make(batch, size=8):
    return torch.nn.Linear(size, 2), torch.zeros(batch, size)

def bare(batch):
    return torch.nn.Linear(3, 3)

def stubborn(batch):
    return torch.nn.Linear(8, 2), torch.zeros(1, 8)
"""


def _save(path: Path, dtype: Any, net: type[torch.nn.Module] = Net) -> None:
    """A program with a batch of any size up to 8."""
    example = (torch.zeros(2, 32, dtype=dtype), torch.zeros(2, 16, dtype=dtype))
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(net().eval().to(dtype), example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, path)


def _tenant(lines: str, batch: int = 4) -> TenantConfig:
    (tenant,) = parse_config(
        f'[[tenant]]\nname = "own"\nclass = "BE"\nbatch = {{max = {batch}}}\n{textwrap.dedent(lines)}\n'
    ).tenants
    return tenant


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_factories.py").write_text(FACTORY)
    example = (torch.zeros(2, 32), torch.zeros(2, 16))
    _save(tmp_path / "net.pt2", torch.float32)
    torch.export.save(torch.export.export(Net().eval(), example), tmp_path / "fixed.pt2")
    torch.export.save(torch.export.export(Net().eval(), example[:1], {"y": example[1]}), tmp_path / "named.pt2")
    return tmp_path


@pytest.mark.parametrize("net", [Net, Plain])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_exported_program_is_what_the_compiler_takes(folder: Path, backend: str, net: type[torch.nn.Module]) -> None:
    """The whole graph, for one batch, as `compile_triton_only` asks for it."""
    _save(folder / "net.pt2", torch.float32, net)
    built = build(_tenant('model = "net.pt2"'), folder, "cpu")
    assert (built.batch, built.input_names, built.output_names) == (4, ("x", "y"), ("sum", "twice"))
    torch._dynamo.reset()
    compiled = torch.compile(built.module, fullgraph=True, dynamic=False, backend=backend)
    with torch.no_grad():
        ours = built.outputs_of(compiled(*built.inputs))
        theirs = net().eval()(*built.inputs).values()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_fixed_batch_is_kept(folder: Path) -> None:
    assert build(_tenant('model = "fixed.pt2"', batch=1), folder, "cpu").batch == 2
    with pytest.raises(MisuseError, match="exported for a batch of exactly 2"):
        build(_tenant('model = "fixed.pt2"', batch=4), folder, "cpu")


def test_programs_that_take_names_are_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="tensors by position"):
        build(_tenant('model = "named.pt2"'), folder, "cpu")


def test_weights_options_and_inputs_reach_the_model(folder: Path) -> None:
    from safetensors.torch import save_file

    wanted = torch.nn.Linear(5, 2)
    save_file(wanted.state_dict(), folder / "w.safetensors")
    built = build(
        _tenant('model = "own_factories:make"\nweights = "w.safetensors"\noptions = {size = 5}'), folder, "cpu"
    )
    assert [tuple(tensor.shape) for tensor in built.inputs] == [(4, 5)]
    with torch.no_grad():
        torch.testing.assert_close(built.run(), wanted(built.inputs[0]))
    named = '[[tenant.input]]\nname = "text"\ndatatype = "FP32"\nshape = [3]'
    built = build(_tenant(f'model = "own_factories:bare"\noutputs = ["e"]\n{named}'), folder, "cpu")
    assert (built.input_names, built.output_names, tuple(built.inputs[0].shape)) == (("text",), ("e",), (4, 3))
    assert built.inputs[0].std() > 0.5  # noise: the compiled model is compared with the eager one on it
    with pytest.raises(MisuseError, match="for a batch of 4 its factory gave example inputs of"):
        build(_tenant('model = "own_factories:stubborn"'), folder, "cpu")


def _package(batch: int) -> ModelPackage:
    spec = TensorSpec(name="x", buffer="b", dtype="float32", shape=(batch, 3), strides=(3, 1))
    return ModelPackage(
        name="m", batch=batch, gpu="g", arch="sm_90", inputs=(spec,), outputs=(spec,), buffers=(), kernels=(), steps=()
    )  # fmt: skip


class _Worker:
    """Writes a package without code, and remembers for whom."""

    def __init__(self) -> None:
        self.made: list[Path] = []

    def __call__(self, tenant: TenantConfig, folder: Path, directory: Path, device: str) -> None:
        self.made.append(directory)
        directory.mkdir(parents=True)
        write_package(_package(tenant.batch.max), directory)


def test_a_package_is_made_once_and_again_when_what_it_is_made_of_changes(folder: Path, tmp_path: Path) -> None:
    worker = _Worker()

    def ask(lines: str, batch: int = 4) -> Path:
        package, directory = compiled_package(
            _tenant(lines, batch), folder, INFO, cache=tmp_path / "cache", worker=worker
        )
        assert package.batch == batch
        return directory

    first = ask('model = "net.pt2"')
    assert first == ask('model = "net.pt2"')
    assert first != ask('model = "net.pt2"', batch=8)
    (folder / "net.pt2").write_bytes((folder / "fixed.pt2").read_bytes())
    assert first != ask('model = "net.pt2"')
    assert len(worker.made) == len(set(worker.made)) == 3


def test_what_a_package_is_called(folder: Path) -> None:
    def name(lines: str) -> str:
        return package_name(_tenant(lines), folder)

    assert name('model = "resnet34"') == "resnet34"  # shared with `missile bench`
    (folder / "w.safetensors").write_bytes(b"one")
    weighted = name('model = "resnet34"\nweights = "w.safetensors"')
    (folder / "w.safetensors").write_bytes(b"two")
    factory = 'model = "own_factories:make"'
    names = {
        weighted,
        name('model = "resnet34"\nweights = "w.safetensors"'),
        name(factory),
        name(f"{factory}\noptions = {{size = 5}}"),
        name(f'{factory}\noutputs = ["a"]'),
        name('model = "own_factories:bare"'),
    }
    before = name(factory)
    (folder / "own_factories.py").write_text(FACTORY + "\n# another version\n")
    assert name(factory) != before
    assert len(names) == 6
    assert all(part.startswith(("resnet34-", "own_factories:")) for part in names)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('model = "absent.pt2"', "'own': absent.pt2 can't be read: No such file"),
        ('model = "no_such_module:make"', "'no_such_module' can't be imported"),
        ('model = "resnet34"\nweights = "absent.safetensors"', "absent.safetensors can't be read"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, lines: str, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        package_name(_tenant(lines), folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would compile")
def test_the_compiling_process_answers_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Compiling a model needs a GPU"):
        compiled_package(_tenant('model = "net.pt2"'), folder, replace(INFO, device="cuda:0"), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("package.json"))


def _infer(served: Any, signature: Any, slot: int, arrays: list[Any]) -> list[Any]:
    """One request's outputs, by a client of the engine (see `test_serving_gpu_executor`)."""
    import numpy as np

    from missile.serving.link import Outcome
    from missile.serving.tensors import DATATYPES, BlockLayout

    batch = len(arrays[0])
    layout = BlockLayout.of(signature, batch)
    for array, start in zip(arrays, layout.inputs, strict=True):
        served.link.arena[start : start + array.nbytes] = array.tobytes()
    served.call(100 * slot + batch, slot, batch, 0)
    assert served.answer()[1] == Outcome.DONE
    found = []
    for tensor, start, size in zip(signature.outputs, layout.outputs, layout.output_sizes, strict=True):
        raw = bytes(served.link.arena[start : start + size])
        found.append(np.frombuffer(raw, DATATYPES[tensor.datatype].numpy).reshape(batch, *tensor.shape))
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_a_served_pt2_equals_eager(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of two inputs and two outputs, in whole and padded batches; compiled by a process of its own."""
    import numpy as np
    from test_serving_gpu_executor import _Client

    from missile.serving.engine.gpu import GpuExecutor
    from missile.serving.tensors import ModelSignature

    monkeypatch.setenv("MISSILE_CACHE", str(tmp_path / "cache"))
    dtype = getattr(torch, kind)
    _save(tmp_path / "net.pt2", dtype, Plain)
    client = _Client(lambda arena: GpuExecutor(arena, open_gpu("cuda:0"), policy="missile"), tmp_path)
    reply = client.load(1, _tenant('model = "net.pt2"'))
    assert reply["op"] == "loaded", reply
    signature = ModelSignature.from_json(reply["signature"])
    assert [tensor.name for tensor in (*signature.inputs, *signature.outputs)] == ["x", "y", "sum", "twice"]
    rng = np.random.default_rng(0)
    for batch in (1, 3, 4):
        x, y = (rng.standard_normal((batch, width)).astype(kind) for width in (32, 16))
        ours = _infer(client, signature, 1, [x, y])
        with torch.no_grad():
            eager = Plain().eval().to(dtype)(torch.from_numpy(x), torch.from_numpy(y))
        bound = 5e-3 if kind == "float16" else 1e-4
        for one, other in zip(ours, eager.values(), strict=True):
            np.testing.assert_allclose(one.astype(np.float32), other.float().numpy(), rtol=bound, atol=bound)
    client.stop()
