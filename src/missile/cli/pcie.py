"""`missile pcie`: the link, and tenants' shares and latencies with and without the scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from missile.cli.output import DeviceOption, JsonOption, console, print_json, stderr_console
from missile.errors import MisuseError
from missile.files import write_whole
from missile.gpu import open_gpu
from missile.gpu.registry import resolve
from missile.pcie.native import library
from missile.pcie.report import SCHEDULER, Plan, Report, measure

__all__ = ["command"]

# The simulator takes a few seconds for one of its own; what it shows does not change with more of them.
_SIMULATED_S, _HARDWARE_S = 0.3, 2.0


def command(
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory for pcie.json and pcie.png.", metavar="DIR")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds of each comparison, on the GPU's clock.", metavar="S")
    ] = None,
    rate: Annotated[float, typer.Option(help="Latency-sensitive copies per second, of each size.")] = 300.0,
) -> None:
    """Measure the host-device link raw, then copies of several tenants under plain streams, priority streams, a FIFO and
    the scheduler, then shares by weight."""
    if seconds is not None and not 0.05 <= seconds <= 3600:
        raise MisuseError(f"--seconds must be between 0.05 and 3600, not {seconds:g}.")
    if not 0 < rate <= 20_000:
        raise MisuseError(f"--rate must be above 0 and at most 20000 copies/s, not {rate:g}.")
    if output is not None and output.exists() and not output.is_dir():
        raise MisuseError(f"{output} is not a directory.")
    notes = stderr_console()
    name, why = resolve(device)
    if why:
        notes.print(f"Device: {name} ({why}).", markup=False)
    with open_gpu(name) as gpu:
        long = seconds if seconds is not None else _SIMULATED_S if gpu.info.simulated else _HARDWARE_S
        plan = Plan(compare_s=long, shares_s=max(long / 2, 0.22), rate=rate)
        with notes.status("PCIe") as status:
            report = measure(gpu, plan, progress=lambda text: status.update(f"PCIe: {text}"))
    values = report.as_dict()
    if output is not None:
        _write(report, values, output)
    if as_json:
        print_json(values)
    else:
        _print(report, values)
        if output is not None:
            console().print(f"Wrote {output / 'pcie.json'} and {output / 'pcie.png'}.", markup=False)


def _write(report: Report, values: dict[str, Any], directory: Path) -> None:
    from missile.pcie.plot import plot_report

    directory.mkdir(parents=True, exist_ok=True)
    plot_report(report, directory / "pcie.png")
    write_whole(directory / "pcie.json", json.dumps(values, indent=1) + "\n")


def _print(report: Report, values: dict[str, Any]) -> None:
    out = console()
    mark = ", simulated" if report.link.simulated else ""
    where = f"{report.link.gpu} ({report.link.device}{mark})"

    link = Table(title=f"Raw link of {where}, GB/s", title_justify="left")
    link.add_column("chunk", justify="right")
    for direction in report.link.chunk_rates:
        link.add_column(direction.value.upper(), justify="right")
    chunks = sorted({chunk for rates in report.link.chunk_rates.values() for chunk in rates})
    for chunk in chunks:
        link.add_row(_size(chunk), *(f"{rates[chunk] / 1e9:.1f}" for rates in report.link.chunk_rates.values()))
    link.add_row("both at once", *(f"{rate / 1e9:.1f}" for rate in report.link.both.values()), style="dim")
    out.print(link)
    chosen = values["chosen"]
    out.print(
        f"Chunks: {_size(chosen['solo_bytes'])} for one tenant, {_size(chosen['shared_bytes'])} for several, "
        f"{_size(chosen['short_bytes'])} beside latency-sensitive ones; {chosen['depth']} at the GPU. "
        f"{_driven(report)}\n"
    )

    title = f"Copies beside {report.plan.bulk_tenants} bulk tenants{mark}, us"
    table = Table(title=title, title_justify="left")
    for column in ("how", "1 MiB p50", "p99", "p99.9", "4 KiB p50", "p99", "p99.9", "link GB/s"):
        table.add_column(column, justify="left" if column == "how" else "right")
    rows = {"alone": values["alone"], **values["compared"], f"{SCHEDULER}, D2H": values["to_host"]}
    rows |= {f"{SCHEDULER}, loop in C, {name}": row for name, row in values["native_source"].items()}
    for name, row in rows.items():
        cells = []
        for tenant in ("ls 1 MiB", "ls 4 KiB"):
            latency = row["latency"][tenant]
            cells += [_us(latency[key]) for key in ("p50_us", "p99_us", "p999_us")]
        style = "bold" if name.startswith(SCHEDULER) else ""
        table.add_row(name, *cells, f"{row['bytes_per_s'] / 1e9:.1f}", style=style)
    out.print(table)

    shares = Table(title=f"Shares under the scheduler over any 100 ms{mark}", title_justify="left")
    for column in ("weights", "shares", "worst error", "Jain's index"):
        shares.add_column(column, justify="left" if column in ("weights", "shares") else "right")
    for case, row in values["shares"].items():
        got = " ".join(f"{share:.3f}" for share in row["shares"].values())
        worst = "-" if row["worst"] is None else f"{100 * row['worst']:.2f}%"
        shares.add_row(case, got, worst, f"{row['jain']:.4f}")
    out.print(shares)


def _driven(report: Report) -> str:
    if report.native:
        return "Driven by a thread in C."
    why = "" if report.link.simulated else library()[1]
    return f"Driven from Python{f': {why}' if why else ''}."


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):g} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
