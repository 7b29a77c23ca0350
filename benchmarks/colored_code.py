"""What color translation adds to a kernel's code, as the assembler sees it: instructions, registers, spills. Needs no GPU.

    PYTHONPATH=src python3 benchmarks/colored_code.py [-o OUT.json]

Counts are of the machine code that ptxas writes for sm_90a. They say what is added, not what it costs: that takes a GPU
(`benchmarks/gpu/colored.py`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from missile.coloring.shape import Form, Shape, TableSpace
from missile.compiler.ptx.assemble import find_ptxas
from missile.compiler.ptx.rewrite import Placement, rewrite
from missile.probe.layout import PageLayout

sys.path.append(str(Path(__file__).parent / "gpu"))

FRAME = PageLayout(2 << 20, tuple(range(12)))
GRANULE = PageLayout(2 << 20, (*range(8), 9))
PIECE = PageLayout(2 << 20, tuple(range(8)))
SHAPES = {
    "pair 256": Shape(Form.PAIR, PIECE),
    "pair 256, wide": Shape(Form.PAIR, PIECE, wide=True),
    "step 512": Shape(Form.STEP, PIECE, alike=True),
    "in-page shared 4K": Shape(Form.IN_PAGE, FRAME),
    "in-page shared 512": Shape(Form.IN_PAGE, GRANULE),
    "in-page global 512": Shape(Form.IN_PAGE, GRANULE, space=TableSpace.GLOBAL),
    "in-page shared 4K, page constants": Shape(Form.IN_PAGE, FRAME, page_xors=True),
    "arithmetic 4K": Shape(Form.ARITHMETIC, FRAME, masks=3),
    "shadow 512": Shape(Form.SHADOW, GRANULE),
    "shadow 256": Shape(Form.SHADOW, PIECE),
}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!\s|NOP|BRA `)", re.MULTILINE)


def code_of(ptx: str) -> dict[str, int]:
    """Instructions, registers of a thread, and spilled bytes of a thread."""
    ptxas = find_ptxas()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        source.write_text(ptx)
        said = subprocess.run(
            [ptxas, "-arch=sm_90a", "-v", source, "-o", target], capture_output=True, text=True, check=True
        ).stderr
        text = subprocess.run(
            [ptxas.with_name("nvdisasm"), "-c", target], capture_output=True, text=True, check=True
        ).stdout
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores", said)
    return {
        "instructions": len(_INSTRUCTION.findall(text)),
        "registers": int(registers[1]) if registers else 0,
        "spill_bytes": int(spills[1]) if spills else 0,
    }


def main() -> None:
    from colored_kernels import KERNELS, compile_kernel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, kernel in KERNELS.items():
        ptx = compile_kernel(kernel).asm["ptx"]
        plain = code_of(ptx)
        rows.append({"kernel": name, "form": "plain", **plain})
        for form, shape in SHAPES.items():
            new = rewrite(ptx, shape, name=name, placement=Placement.EARLY)
            code = code_of(new.ptx)
            added = (code["instructions"] - plain["instructions"]) / new.translations
            rows.append(
                {
                    "kernel": name,
                    "form": form,
                    **code,
                    "accesses": sum(new.accesses.values()),
                    "translations": new.translations,
                    "added_per_translation": round(added, 1),
                }
            )
            print(
                f"{name:18s} {form:34s} {plain['instructions']:5d} > {code['instructions']:5d} instructions, "
                f"{added:5.1f} a translation, {plain['registers']:3d} > {code['registers']:3d} registers, "
                f"{code['spill_bytes']} bytes spilled"
            )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"what": "static code of sm_90a by ptxas of Triton 3.6.0; not run", "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
