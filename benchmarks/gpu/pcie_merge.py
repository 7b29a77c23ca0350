"""Parts of two results of pcie.py in one: those of the later one where both have them.

python3 benchmarks/gpu/pcie_merge.py EARLIER.json LATER.json -o TARGET.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def merged(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Neither is changed. A part that failed in `later` does not replace one that did not; `runs` lists the runs of both."""
    out = dict(earlier)
    for name, part in later.items():
        failed = isinstance(part, dict) and "error" in part
        if name == "runs":
            out[name] = [*earlier.get(name, []), *part]
        elif not failed or name not in earlier:
            out[name] = part
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("earlier", type=Path)
    parser.add_argument("later", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    found = merged(json.loads(options.earlier.read_text()), json.loads(options.later.read_text()))
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{options.output}: {', '.join(found)}")


if __name__ == "__main__":
    main()
