"""The engine's loop as C: what `make compiled` makes behaves as the sources do, and is no older than they are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import missile
from missile.bench.environment import is_compiled

ROOT = Path(missile.__file__).parents[2]


def hot_modules() -> list[str]:
    text = subprocess.run(
        ["make", "--no-print-directory", "-pn", "compiled"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"^HOT := (.*)$", text, re.MULTILINE)
    assert found is not None
    return found[1].split()


def test_no_compiled_module_is_older_than_its_source():
    stale = [
        str(built.relative_to(ROOT))
        for built in (ROOT / "src").rglob("*.so")
        if (source := built.with_name(built.name.partition(".")[0] + ".py")).is_file()
        and built.stat().st_mtime < source.stat().st_mtime
    ]
    assert not stale, f"run `make compiled` again, or `make clean`: {', '.join(stale)}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None or is_compiled(), reason="no C compiler, or compiled already")
def test_the_compiled_loop_behaves_as_the_sources_do(tmp_path):
    for name in ("src", "tests", "pyproject.toml"):
        source, target = ROOT / name, tmp_path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    subprocess.run([sys.executable, "-m", "mypyc", *hot_modules()], cwd=tmp_path / "src", check=True, env=environment)
    tests = [f"tests/runtime/test_runtime_{name}.py" for name in ("missile", "run", "policies", "orion", "copying")]
    checks = "from missile.bench.environment import is_compiled; assert is_compiled()"
    subprocess.run([sys.executable, "-c", checks], cwd=tmp_path, check=True, env=environment)
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path,
        check=True,
        env=environment,
    )
