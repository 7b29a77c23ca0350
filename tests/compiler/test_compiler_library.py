"""Where packages come from, and their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missile.compiler import library
from missile.compiler.bind import bind
from missile.compiler.package import ModelPackage, write_package
from missile.compiler.weights import read_weights, write_weights
from missile.errors import MisuseError
from missile.gpu import open_gpu
from missile.gpu.interface import GpuInfo


@pytest.fixture(scope="module")
def simulated() -> GpuInfo:
    with open_gpu("sim:h100") as gpu:
        return gpu.info


def test_recorded_package_survives_the_disk(
    package: ModelPackage, simulated: GpuInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "RECORDED", tmp_path)
    path = library.write_recorded(package.model_copy(update={"name": "resnet34"}), tmp_path)
    first = path.read_bytes()
    found, directory = library.find_package("resnet34", 2, simulated)
    assert directory is None
    assert found.recorded
    assert found.works() == package.works()
    assert library.recorded_packages() == (("resnet34", 2),)
    library.write_recorded(package.model_copy(update={"name": "resnet34"}), tmp_path)
    assert path.read_bytes() == first
    with pytest.raises(MisuseError, match="recorded at batch 2, not 1"):
        library.find_package("resnet34", None, simulated)
    with pytest.raises(MisuseError, match="never recorded; recorded are resnet34"):
        library.find_package("bert_large", None, simulated)


def test_unknown_model_names_the_known(simulated: GpuInfo) -> None:
    with pytest.raises(MisuseError, match="mobilenet_v3_large"):
        library.find_package("alexnet", None, simulated)


def test_hardware_takes_the_compiled_package_from_the_cache(
    package: ModelPackage, simulated: GpuInfo, tmp_path: Path
) -> None:
    hardware = replace(simulated, simulated=False, name="NVIDIA H200", device="cuda:0")
    directory = library.package_directory("resnet34", 2, hardware.name, tmp_path)
    write_package(package, directory)
    assert library.find_package("resnet34", 2, hardware, tmp_path) == (package, directory)
    assert library.find_package(str(directory), None, hardware) == (package, directory)


def test_all_recorded_packages_run_on_the_simulator() -> None:
    with open_gpu("sim:h200") as gpu:
        for name, batch in library.recorded_packages():
            package, _ = library.find_package(name, batch, gpu.info)
            assert package.recorded
            assert package.relative_error is not None
            assert package.relative_error < 1e-2
            assert sum(work.solo_ns for work in package.works()) == pytest.approx(package.solo_ns, rel=0.02)
            model = bind(package, None, gpu, tenant=name)
            assert len(model.operations) == len(package.steps)
            model.close()


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text("abc.0", min_size=1, max_size=6), st.binary(max_size=200), max_size=5))
def test_weights_survive_the_disk(tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]) -> None:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    write_weights({name: np.frombuffer(data, np.uint8) for name, data in contents.items()}, path)
    assert {name: data.tobytes() for name, data in read_weights(path).items()} == contents


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_broken_weights_are_one_sentence(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "weights.safetensors"
    write_weights({"w": np.arange(100, dtype=np.uint8)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MisuseError, match=r"weights\.safetensors can't be read"):
        read_weights(path)


def test_weights_are_what_safetensors_reads(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "weights.safetensors"
    write_weights({"w": np.arange(7, dtype=np.uint8), "v": np.arange(3, dtype=np.uint8)}, path)
    read = safetensors.load_file(path)
    assert read["w"].tolist() == list(range(7))
    assert read["v"].tolist() == list(range(3))
