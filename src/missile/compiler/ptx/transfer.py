"""Kernels that move data between plain memory and a tenant's colored memory: only one side of them is translated."""

from __future__ import annotations

from missile.coloring.shape import Shape
from missile.compiler.ptx.translate import Emitter, module_declarations, parameter, prologue

__all__ = ["CHUNK_BYTES", "GATHER", "SCATTER", "THREADS", "blocks_for", "transfer_ptx"]

SCATTER, GATHER = "missile_scatter", "missile_gather"
THREADS = 256
CHUNK_BYTES = 16  # what a thread moves


def blocks_for(nbytes: int) -> int:
    """Blocks of `THREADS` threads to launch for a transfer of `nbytes`."""
    return max(1, -(-nbytes // (THREADS * CHUNK_BYTES)))


def transfer_ptx(shape: Shape, target: str = "sm_90") -> str:
    """PTX with two kernels, both of (plain address u64, logical address u64, bytes u64, the tenant's constants by value).
    The addresses are multiples of 16.

    `missile_scatter` copies from plain to colored memory, `missile_gather` the other way.
    """
    head = [".version 8.0", f".target {target}", ".address_size 64", *module_declarations(shape)]
    return "\n".join([*head, _kernel(shape, SCATTER, scatter=True), _kernel(shape, GATHER, scatter=False), ""])


def _kernel(shape: Shape, name: str, *, scatter: bool) -> str:
    emitter = Emitter(shape)
    code, physical = emitter.translate("%logical", guard="")
    source, target = ("%plain", physical) if scatter else (physical, "%plain")
    body = [
        *emitter.declarations(),
        ".reg .b64 %plain, %logical, %size, %at, %left;",
        ".reg .b32 %thread, %block, %a, %b, %c, %d;",
        ".reg .b16 %byte;",
        ".reg .pred %whole, %done;",
        *prologue(shape),
        f"ld.param.u64 %plain, [{name}_plain];",
        f"ld.param.u64 %logical, [{name}_logical];",
        f"ld.param.u64 %size, [{name}_size];",
        "mov.u32 %thread, %tid.x;",
        "mov.u32 %block, %ctaid.x;",
        f"mad.lo.u32 %thread, %block, {THREADS}, %thread;",
        f"mul.wide.u32 %at, %thread, {CHUNK_BYTES};",
        "setp.ge.u64 %done, %at, %size;",
        "@%done bra finished;",
        "add.u64 %plain, %plain, %at;",
        "add.u64 %logical, %logical, %at;",
        "sub.u64 %left, %size, %at;",
        *code,
        f"setp.ge.u64 %whole, %left, {CHUNK_BYTES};",
        "@!%whole bra bytes;",
        f"ld.global.v4.b32 {{%a, %b, %c, %d}}, [{source}];",
        f"st.global.v4.b32 [{target}], {{%a, %b, %c, %d}};",
        "bra finished;",
        "bytes:",
        f"ld.global.b8 %byte, [{source}];",
        f"st.global.b8 [{target}], %byte;",
        f"add.u64 {source}, {source}, 1;",
        f"add.u64 {target}, {target}, 1;",
        "sub.u64 %left, %left, 1;",
        "setp.gt.u64 %whole, %left, 0;",
        "@%whole bra bytes;",
        "finished:",
        "ret;",
    ]
    parameters = [*(f".param .u64 {name}_{what}" for what in ("plain", "logical", "size")), parameter()]
    return f".visible .entry {name}({', '.join(parameters)})\n{{\n\t" + "\n\t".join(body) + "\n}"
