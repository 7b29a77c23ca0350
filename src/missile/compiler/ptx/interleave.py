"""A kernel that brings images from planes (channels first) into pixels (channels last)."""

from __future__ import annotations

__all__ = ["INTERLEAVE", "MOST_CHANNELS", "THREADS", "interleave_grid", "interleave_ptx"]

INTERLEAVE = "missile_interleave"
THREADS = 256
MOST_CHANNELS = 8
"""A thread holds all values of one pixel in registers."""

_REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}  # by bytes of a value; the narrowest register has 16 bits


def interleave_ptx(channels: int, pixels: int, nbytes: int, target: str = "sm_90") -> str:
    """PTX of `missile_interleave`, of (planes u64, pixels u64), two device addresses in plain memory.

    Every image has `channels` planes of `pixels` values of `nbytes` (1, 2, 4 or 8) at the first address, and as many pixels
    of `channels` values at the second. All images together have less than 2 GiB. Grid: `interleave_grid`.
    """
    kind = f"b{8 * nbytes}"
    values = [f"%value{channel}" for channel in range(channels)]
    body = [
        ".reg .b64 %planes, %pixels;",
        ".reg .b32 %thread, %block, %image, %pixel, %first, %place;",
        f".reg .{_REGISTERS[nbytes]} {', '.join(values)};",
        ".reg .pred %inside;",
        f"ld.param.u64 %planes, [{INTERLEAVE}_planes];",
        f"ld.param.u64 %pixels, [{INTERLEAVE}_pixels];",
        "mov.u32 %thread, %tid.x;",
        "mov.u32 %block, %ctaid.x;",
        "mov.u32 %image, %ctaid.y;",
        f"mad.lo.u32 %pixel, %block, {THREADS}, %thread;",
        f"setp.lt.u32 %inside, %pixel, {pixels};",
        "@!%inside bra finished;",
        f"mad.lo.u32 %first, %image, {channels * pixels}, %pixel;",
        f"mad.lo.u32 %place, %image, {pixels}, %pixel;",
        f"mad.wide.u32 %planes, %first, {nbytes}, %planes;",
        f"mad.wide.u32 %pixels, %place, {channels * nbytes}, %pixels;",
        *(f"ld.global.{kind} {v}, [%planes+{c * pixels * nbytes}];" for c, v in enumerate(values)),
        *(f"st.global.{kind} [%pixels+{c * nbytes}], {v};" for c, v in enumerate(values)),
        "finished:",
        "ret;",
    ]
    head = f".version 8.0\n.target {target}\n.address_size 64\n"
    parameters = f".param .u64 {INTERLEAVE}_planes, .param .u64 {INTERLEAVE}_pixels"
    return head + f".visible .entry {INTERLEAVE}({parameters})\n{{\n\t" + "\n\t".join(body) + "\n}\n"


def interleave_grid(images: int, pixels: int) -> tuple[int, int, int]:
    """Blocks of `THREADS` threads, one for each pixel."""
    return -(-pixels // THREADS), images, 1
