"""On a GPU: a small model compiled, and its package run from disk, with torch and without, against eager."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no GPU", allow_module_level=True)

from missile.compiler.bind import bind  # noqa: E402
from missile.compiler.build import compile_model  # noqa: E402
from missile.compiler.package import BufferKind, ModelPackage, read_package  # noqa: E402
from missile.errors import MisuseError, UnsupportedError  # noqa: E402
from missile.gpu import open_gpu  # noqa: E402
from missile.gpu.interface import Gpu  # noqa: E402
from missile.workloads.models import build_model  # noqa: E402


class _Small(torch.nn.Module):  # type: ignore[misc]
    """One of each: convolution, batch norm, depthwise convolution with a stride, attention, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.norm = torch.nn.BatchNorm2d(32)
        self.depthwise = torch.nn.Conv2d(32, 32, 5, 2, 2, groups=32)
        self.qkv = torch.nn.Linear(32, 96)
        self.head = torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.hardswish(self.depthwise(torch.relu(self.norm(self.stem(x)))))
        x = x.flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


def small(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    image = torch.randn(batch, 3, 32, 32).half().to(memory_format=torch.channels_last)
    return _Small().half().to(memory_format=torch.channels_last), image


def unsupported(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    class Solve(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x)

    return Solve(), torch.eye(4).expand(batch, 4, 4).contiguous()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("package") / "small"
    compile_model(f"{__name__}:small", target, batch=2)
    return target


def _run(gpu: Gpu, package: ModelPackage, directory: Path, data: np.ndarray) -> np.ndarray:
    model = bind(package, directory, gpu, tenant="test")
    stream = gpu.create_stream()
    source, target = gpu.allocate_host(model.input_bytes), gpu.allocate_host(model.output_bytes)
    source.array[:] = data.view(np.uint8).reshape(-1)
    stream.copy_to_device(model.input_address, source)
    stream.launch_graph(model.graph)
    stream.copy_to_host(target, model.output_address)
    stream.synchronize()
    out = target.array.copy().view(np.float16)
    model.close()
    return out


def test_package_runs_from_disk_like_eager(directory: Path) -> None:
    package = read_package(directory)
    assert package.relative_error is not None
    assert package.relative_error < 1e-2
    model = build_model(f"{__name__}:small", 2, device="cuda")
    expected = model.run().float().cpu().numpy().reshape(-1)
    data = model.inputs[0].permute(0, 2, 3, 1).contiguous().cpu().numpy()
    with open_gpu("cuda:0") as gpu:
        ours = _run(gpu, package, directory, data).astype(np.float32)
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-2


def test_package_runs_without_torch(directory: Path) -> None:
    script = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
import numpy as np
from missile.compiler.bind import bind
from missile.compiler.package import read_package
from missile.gpu import open_gpu
directory = Path({str(directory)!r})
with open_gpu("cuda:0") as gpu:
    model = bind(read_package(directory), directory, gpu, tenant="t")
    stream = gpu.create_stream()
    for operation in model.operations:
        stream.launch(operation)
    target = gpu.allocate_host(model.output_bytes)
    stream.copy_to_host(target, model.output_address)
    stream.synchronize()
    assert np.isfinite(target.array.view(np.float16)).all()
    print("ran", len(model.operations))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("ran"), done.stderr


def test_profile_adds_up_and_scratch_is_shared(directory: Path) -> None:
    package = read_package(directory)
    works = package.works()
    assert package.solo_ns is not None
    assert sum(work.solo_ns for work in works) == pytest.approx(package.solo_ns, rel=0.01)
    assert any(buffer.kind is BufferKind.SCRATCH for buffer in package.buffers)


def test_package_of_another_architecture_is_refused(directory: Path) -> None:
    package = read_package(directory).model_copy(update={"arch": "sm_75", "gpu": "Tesla T4"})
    with open_gpu("cuda:0") as gpu, pytest.raises(MisuseError, match="Tesla T4"):
        bind(package, directory, gpu, tenant="test")


def test_operator_without_triton_kernel_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"linalg|inv"):
        compile_model(f"{__name__}:unsupported", tmp_path / "package", batch=1)
    assert not (tmp_path / "package").exists()
