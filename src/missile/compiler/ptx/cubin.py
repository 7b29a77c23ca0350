"""Constants in a cubin, replaced in place: how a kernel is bound to a tenant's colors without compiling it again."""

from __future__ import annotations

import struct

from missile.errors import MisuseError

__all__ = ["bind_symbol", "find_symbol"]

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMTAB, _NOBITS = 2, 8


def bind_symbol(cubin: bytes, symbol: str, contents: bytes) -> bytes:
    """`cubin` with the variable `symbol` initialised to `contents`. MisuseError when it has none or of another size."""
    start, size = find_symbol(cubin, symbol)
    if size != len(contents):
        raise MisuseError(f"The kernel's {symbol} has {size} bytes; {len(contents)} were given: it has another shape.")
    return cubin[:start] + contents + cubin[start + size :]


def find_symbol(cubin: bytes, symbol: str) -> tuple[int, int]:
    """Where in the file the initial contents of variable `symbol` lie, and how many bytes they have."""
    try:
        return _find(cubin, symbol.encode())
    except (struct.error, IndexError, ValueError):
        raise MisuseError("The kernel's code is no whole cubin.") from None


def _find(cubin: bytes, symbol: bytes) -> tuple[int, int]:
    header = _HEADER.unpack_from(cubin)
    if header[0][:5] != b"\x7fELF\x02":
        raise ValueError
    at, entry, count = header[6], header[11], header[12]
    sections = [_SECTION.unpack_from(cubin, at + index * entry) for index in range(count)]
    for kind, offset, size, link in ((s[1], s[4], s[5], s[6]) for s in sections):
        if kind != _SYMTAB:
            continue
        names = sections[link][4]
        for where in range(offset, offset + size, _SYMBOL.size):
            name, _, _, section, value, nbytes = _SYMBOL.unpack_from(cubin, where)
            begin = names + name
            if cubin[begin : cubin.index(b"\0", begin)] == symbol:
                home = sections[section]
                if home[1] == _NOBITS:
                    raise MisuseError(f"The kernel's {symbol.decode()} has no contents in the file.")
                return home[4] + value, nbytes
    raise MisuseError(f"The kernel's code has no variable {symbol.decode()}: it was not compiled for colors.")
