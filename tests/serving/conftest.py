"""Servers for the tests; nothing here is collected where the serving extra, a client or PyTorch is missing."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("torch", "uvloop", "httptools", "orjson", "grpc", "prometheus_client", "tritonclient", "geventhttpclient")
if any(find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = [
        f"test_serving_{part}*.py"
        for part in ("config", "errors", "ex", "faults", "schema", "security", "t", "units", "view")
    ]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server for all tests that leave it as it was."""
    from serving_harness import Launcher

    launcher = Launcher(tmp_path_factory.mktemp("served"))
    yield launcher(
        """
[[tenant]]
name = "mixer"
model = "serving_models:mixer"
class = "LS"
slo_ms = 50
batch = {max = 4}

[[tenant]]
name = "convnet"
model = "serving_models:convnet"
class = "BE"
batch = {max = 8, delay_ms = 20}

[[tenant]]
name = "big"
model = "serving_models:identity"
class = "LS"
slo_ms = 50
options = {size = 153600}

[[tenant]]
name = "huge"
model = "serving_models:identity"
class = "BE"
options = {size = 600000}

[[tenant]]
name = "embedding"
model = "serving_models:embedding"
class = "BE"

[[tenant]]
name = "finite"
model = "serving_models:identity"
class = "LS"
slo_ms = 50
finite_inputs = true
options = {size = 4}
batch = {max = 4096}

[[tenant]]
name = "trouble"
model = "serving_models:trouble"
class = "BE"
batch = {max = 8, delay_ms = 30}
"""
    )
    launcher.stop()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Any]:
    """Start servers of one's own."""
    from serving_harness import Launcher

    launcher = Launcher(tmp_path)
    yield launcher
    launcher.stop()
