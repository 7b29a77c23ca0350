"""`missile map`: slice and color of in-page addresses, from a channel map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from missile.cli.output import JsonOption, console, print_json
from missile.errors import MisuseError
from missile.probe.channel_map import REFERENCE_PAGE
from missile.probe.map_file import read_map

__all__ = ["command"]

_REFERENCE = ",".join(map(str, REFERENCE_PAGE))


def command(
    channel_map: Annotated[Path, typer.Argument(help="A channel map.", metavar="MAP.json")],
    addresses: Annotated[list[str], typer.Argument(help="In-page addresses, decimal or 0x...", metavar="ADDRESS...")],
    constants: Annotated[
        str, typer.Option(help="The page's constants: pattern,xor,permutation.", metavar="P,X,K")
    ] = _REFERENCE,
    json: JsonOption = False,
) -> None:
    """Slice and color of in-page addresses: those of the map's reference page unless another page's constants are given."""
    found = read_map(channel_map)
    where = [_number(address, "Address") for address in addresses]
    page = [_number(part, "Page constant") for part in constants.split(",")]
    slices, colors = found.slice_of(where, page), found.color_of(where, page)
    if json:
        print_json(
            [
                {"address": address, "slice": int(slice_), "color": int(color)}
                for address, slice_, color in zip(where, slices, colors, strict=True)
            ]
        )
        return
    table = Table("address", "slice", "color", box=None)
    for address, slice_, color in zip(where, slices, colors, strict=True):
        table.add_row(f"{address:#x}", str(int(slice_)), str(int(color)))
    console().print(table)


def _number(text: str, what: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise MisuseError(f"{what} {text!r} is not a number (decimal, or hexadecimal with 0x).") from None
