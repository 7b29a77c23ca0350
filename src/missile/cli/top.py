"""`missile top`: watch a running server in the terminal; the same facts as its web page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from missile.cli.output import JsonOption, console, print_json
from missile.errors import MissileError, MisuseError, UnsupportedError

__all__ = ["command", "fetch_state", "headline", "tenant_table"]

DEFAULT_URL = "http://127.0.0.1:8000"
_BARS = " ▁▂▃▄▅▆▇█"


def command(
    url: Annotated[str, typer.Argument(help="The server's HTTP address.", metavar="URL")] = DEFAULT_URL,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    interval: Annotated[float, typer.Option("--interval", help="Seconds between two looks.", min=0.2, max=60.0)] = 1.0,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="A file with a token (or set MISSILE_TOKEN).")
    ] = None,
    ca_file: Annotated[Path | None, typer.Option("--ca-file", help="Certificate to trust, for https.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Watch a running server: tenants, latency against SLO, SMs, colors and link shares."""
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"`missile top` needs the package {error.name!r}; install missile[serve].") from error
    if not url.startswith(("http://", "https://")):
        raise MisuseError(f"{url!r} is not an address; it looks like {DEFAULT_URL}.")
    token = _token(token_file)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    verify: Any = str(ca_file) if ca_file is not None else True
    with httpx.Client(base_url=url, headers=headers, timeout=5.0, verify=verify) as client:
        state = fetch_state(client)
        if as_json:
            print_json(state)
        elif once or not console().is_terminal:
            screen = console()
            screen.print(headline(state))
            screen.print(tenant_table(state))
        else:
            _watch(client, interval)


def _token(path: Path | None) -> str:
    if path is None:
        return os.environ.get("MISSILE_TOKEN", "").strip()
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"{path} can't be read: {error}.") from error


def fetch_state(client: Any) -> dict[str, Any]:
    """One look. MissileError, in one sentence, when the server does not answer or refuses."""
    import httpx

    try:
        answer = client.get("/missile/state")
    except httpx.HTTPError as error:
        raise MissileError(f"No server answers at {client.base_url} ({error or type(error).__name__}).") from error
    if answer.status_code != 200:
        try:
            reason = answer.json()["error"]
        except (json.JSONDecodeError, KeyError, TypeError):
            reason = f"HTTP status {answer.status_code}; is this a Missile server?"
        raise MissileError(f"{client.base_url}: {reason}")
    state: dict[str, Any] = answer.json()
    return state


# --- what is shown: pure


def headline(state: dict[str, Any]) -> Text:
    """Device, readiness and warnings, in a line or two."""
    server, device = state["server"], state["device"]
    text = Text()
    text.append("missile ", "bold")
    text.append(f"{server['version']}  {device.get('name', 'no engine')}  up {server['uptime_s']:.0f} s  ")
    if server["draining"]:
        text.append("draining", "bold red")
    elif not server["engine_running"]:
        text.append("engine restarting", "bold red")
    elif server["ready"]:
        text.append("ready", "bold green")
    else:
        text.append("not all ready", "bold yellow")
    if device.get("policy"):
        text.append(f"  {device['policy']}")
    if server["engine_starts"] > 1:
        text.append(f"  engine started {server['engine_starts']} times", "yellow")
    if device.get("simulated"):
        text.append("\nsimulated: these numbers come from a model of a GPU", "yellow")
    elif str(device.get("isolation", "")).startswith("none"):
        text.append(f"\nisolation {device['isolation']}", "yellow")
    return text


def tenant_table(state: dict[str, Any]) -> Table:
    """One row a tenant. Columns about the GPU appear only where they mean something."""
    tenants = state["tenants"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("tenant", "class", "state"):
        table.add_column(name)
    for name in ("/s", "p50 ms", "p99 ms", "SLO ms", "met 5 min", "burn", "waiting", "refused"):
        table.add_column(name, justify="right")
    gpu = [(key, title) for key, title in _GPU_COLUMNS if any(_granted(t, key) is not None for t in tenants)]
    for _, title in gpu:
        table.add_column(title, justify="right")
    table.add_column("p99, last minute", min_width=30, no_wrap=True)
    for tenant in tenants:
        table.add_row(*_row(tenant), *(_gpu_cell(tenant, key) for key, _ in gpu), _sparkline(tenant))
    return table


_GPU_COLUMNS = (
    ("sms_granted", "SMs"),
    ("sms_used", "used"),
    ("colors", "colors"),
    ("link_granted", "link"),
    ("link_used", "used"),
    ("preemptions", "preempted"),
    ("lent_seconds", "lent s"),
    ("cold_starts", "cold"),
    ("guard_hits", "guard"),
)


def _granted(tenant: dict[str, Any], key: str) -> Any:
    return tenant["granted"].get(key)


def _gpu_cell(tenant: dict[str, Any], key: str) -> str:
    value = _granted(tenant, key)
    if value is None:
        return "-"
    if key == "colors":
        return str(len(value))
    if key.startswith("link"):
        return f"{100 * value:.0f}%"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _row(tenant: dict[str, Any]) -> list[Text]:
    slo, p99, attained, burn = tenant["slo_ms"], tenant["p99_ms"], tenant["attainment_5m"], tenant["burn_5m"]
    late = slo is not None and p99 is not None and p99 > slo
    refused = sum(tenant["refused"].values())
    state = tenant["state"]
    return [
        Text(tenant["name"], "bold"),
        Text(tenant["class"], "cyan" if tenant["class"] == "LS" else "yellow"),
        Text(state.lower(), "green" if state == "READY" else "red" if state == "UNAVAILABLE" else "yellow"),
        Text(f"{tenant['rate']:.1f}"),
        Text(_ms(tenant["p50_ms"])),
        Text(_ms(p99), "red" if late else ""),
        Text(_ms(slo)),
        Text("-" if attained is None else f"{100 * attained:.2f}%", _shade(attained, tenant["objective"])),
        Text("-" if burn is None else f"{burn:.1f}x", "red" if burn is not None and burn > 1 else ""),
        Text(f"{tenant['outstanding']}/{tenant['queue_limit']}"),
        Text(str(refused), "yellow" if refused else ""),
    ]


def _shade(attained: float | None, objective: float) -> str:
    return "" if attained is None else "green" if attained >= objective else "red"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _sparkline(tenant: dict[str, Any], width: int = 30) -> Text:
    """p99 of the last minute, two seconds a character; red where it is beyond the SLO."""
    history = tenant["history"][-2 * width :]
    pairs = [history[index : index + 2] for index in range(0, len(history), 2)]
    worst = [max((row[6] for row in pair if row[6] is not None), default=None) for pair in pairs]
    top = max((value for value in worst if value is not None), default=0.0)
    text = Text()
    for value in worst:
        if value is None or top == 0.0:
            text.append(" ")
        else:
            late = tenant["slo_ms"] is not None and value > tenant["slo_ms"]
            text.append(_BARS[max(1, round(8 * value / top))], "red" if late else "cyan")
    return text


def _watch(client: Any, interval: float) -> None:
    """The full-screen view; q ends it."""
    from textual.app import App, ComposeResult
    from textual.containers import VerticalScroll
    from textual.widgets import Footer, Static

    class Top(App[None]):
        TITLE = "missile top"
        CSS = "#head { padding: 1 1 1 1; } #table { padding: 0 1; } #reasons { padding: 1 1; color: $text-muted; }"
        BINDINGS = [("q", "quit", "Quit"), ("space", "pause", "Pause")]  # noqa: RUF012
        paused = False

        def compose(self) -> ComposeResult:
            yield Static(id="head")
            with VerticalScroll():
                yield Static(id="table")
                yield Static(id="reasons")
            yield Footer()

        def on_mount(self) -> None:
            self.set_interval(interval, self.look)
            self.look()

        def action_pause(self) -> None:
            self.paused = not self.paused

        def look(self) -> None:
            if not self.paused:
                self.run_worker(self._look, thread=True, exclusive=True)

        def _look(self) -> None:
            try:
                state = fetch_state(client)
            except MissileError as error:
                self.call_from_thread(self.query_one("#head", Static).update, Text(str(error), "bold red"))
                return
            self.call_from_thread(self._show, state)

        def _show(self, state: dict[str, Any]) -> None:
            self.query_one("#head", Static).update(headline(state))
            self.query_one("#table", Static).update(tenant_table(state))
            reasons = [f"{t['name']} {t['reason']}." for t in state["tenants"] if t["reason"]]
            self.query_one("#reasons", Static).update("\n".join(reasons))

    Top().run()
