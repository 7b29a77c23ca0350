"""Every CUDA source compiles for Hopper here, without a GPU, and is compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest

from missile.errors import InternalError, MisuseError, UnsupportedError
from missile.gpu.cuda import nvrtc

pytestmark = pytest.mark.skipif(nvrtc.why_unavailable() is not None, reason=str(nvrtc.why_unavailable()))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "missile" / "kernels"


@pytest.mark.parametrize("name", nvrtc.kernel_names())
def test_it_compiles_for_hopper(name: str) -> None:
    assert nvrtc.cubin(name, "sm_90").startswith(b"\x7fELF")


def test_the_second_time_comes_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = nvrtc.cubin("latency", "sm_90", {"LOADS": 8})
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]

    def refuse(*_: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(nvrtc, "compile_source", refuse)
    assert nvrtc.cubin("latency", "sm_90", {"LOADS": 8}) == image
    with pytest.raises(AssertionError, match="compiled again"):
        nvrtc.cubin("latency", "sm_90", {"LOADS": 6})


def test_an_unwritable_cache_only_costs_time(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert nvrtc.cubin("latency", "sm_90").startswith(b"\x7fELF")


def test_bad_input_is_named() -> None:
    with pytest.raises(MisuseError, match=r"known: .*latency"):
        nvrtc.cubin("latencyy", "sm_90")
    with pytest.raises(UnsupportedError, match="sm_1"):
        nvrtc.cubin("latency", "sm_1")
    with pytest.raises(InternalError, match=r"broken\.cu does not compile"):
        nvrtc.compile_source("this is not CUDA", "broken.cu", ["--gpu-architecture=sm_90"])
