"""Make compiled packages that lie in one folder (as `compile_models.py` leaves them) Missile's package cache.

    PYTHONPATH=src python3 benchmarks/gpu/link_packages.py OUT/packages CACHE [--device cuda:0]
    export MISSILE_CACHE=CACHE

CACHE gets a link for each model that is there, at its default batch, for this machine's GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from missile.compiler.library import package_directory
from missile.gpu import open_gpu
from missile.workloads.models import MODELS, default_batch

__all__ = ["link_packages"]


def link_packages(packages: Path, cache: Path, gpu_name: str) -> list[str]:
    """Returns the models that are there, by name. A link that is there is left."""
    linked = []
    for model in MODELS:
        source = next(
            (
                found
                for suffix in ("bdefault", f"b{default_batch(model)}")
                if (found := packages / f"{model}-{suffix}").is_dir()
            ),
            None,
        )
        if source is None or not (source / "package.json").is_file():
            continue
        target = package_directory(model, default_batch(model), gpu_name, cache)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source.resolve(), target_is_directory=True)
        linked.append(model)
    return linked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    with open_gpu(options.device) as gpu:
        name = gpu.info.name
    print(f"{name}: {', '.join(link_packages(options.packages, options.cache, name)) or 'no package'}")


if __name__ == "__main__":
    main()
