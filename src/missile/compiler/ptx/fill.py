"""The kernel that fills a range of colored memory with a byte, where a plan of plain memory has the driver do so."""

from __future__ import annotations

from missile.coloring.shape import Shape
from missile.compiler.ptx.transfer import CHUNK_BYTES, THREADS
from missile.compiler.ptx.translate import Emitter, parameter, prologue

__all__ = ["FILL", "fill_entry"]

FILL = "missile_fill"


def fill_entry(shape: Shape) -> str:
    """PTX of the entry point `missile_fill` (logical address u64, bytes u64, byte u32, the tenant's constants by value), for
    a module that has what `transfer_ptx` declares. Any address and any number of bytes.

    A thread fills an aligned chunk of 16 bytes, or what of it lies in the range: launch `blocks_for(bytes + 15)` blocks.
    """
    emitter = Emitter(shape)
    code, physical = emitter.translate("%chunk", guard="")
    body = [
        *emitter.declarations(),
        ".reg .b64 %low, %high, %chunk, %at, %begin, %end;",
        ".reg .b32 %thread, %block, %value;",
        ".reg .b16 %byte;",
        ".reg .pred %whole, %more, %done;",
        *prologue(shape),
        f"ld.param.u64 %low, [{FILL}_logical];",
        f"ld.param.u64 %high, [{FILL}_size];",
        f"ld.param.u32 %value, [{FILL}_value];",
        "add.u64 %high, %low, %high;",
        "mov.u32 %thread, %tid.x;",
        "mov.u32 %block, %ctaid.x;",
        f"mad.lo.u32 %thread, %block, {THREADS}, %thread;",
        f"and.b64 %chunk, %low, -{CHUNK_BYTES};",
        f"mad.wide.u32 %chunk, %thread, {CHUNK_BYTES}, %chunk;",
        "setp.ge.u64 %done, %chunk, %high;",
        "@%done bra finished;",
        *code,
        "max.u64 %begin, %low, %chunk;",
        f"add.u64 %end, %chunk, {CHUNK_BYTES};",
        "min.u64 %end, %high, %end;",
        "and.b32 %value, %value, 255;",
        "cvt.u16.u32 %byte, %value;",
        "sub.u64 %at, %end, %begin;",
        f"setp.eq.u64 %whole, %at, {CHUNK_BYTES};",
        "@!%whole bra bytes;",
        "mul.lo.u32 %value, %value, 0x01010101;",
        f"st.global.v4.b32 [{physical}], {{%value, %value, %value, %value}};",
        "bra finished;",
        "bytes:",
        "sub.u64 %at, %begin, %chunk;",
        f"add.u64 %at, {physical}, %at;",
        "st.global.b8 [%at], %byte;",
        "add.u64 %begin, %begin, 1;",
        "setp.lt.u64 %more, %begin, %end;",
        "@%more bra bytes;",
        "finished:",
        "ret;",
    ]
    parameters = [f".param .u64 {FILL}_logical", f".param .u64 {FILL}_size", f".param .u32 {FILL}_value", parameter()]
    return f".visible .entry {FILL}({', '.join(parameters)})\n{{\n\t" + "\n\t".join(body) + "\n}\n"
