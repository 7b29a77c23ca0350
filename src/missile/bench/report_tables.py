"""The report's tables as HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from missile.bench.cold import cold_starts
from missile.bench.results import Results, TenantInfo
from missile.bench.summary import ALONE, Spread, Summary
from missile.bench.table import format_share, three_digits

__all__ = ["be_table", "cold_table", "ls_table", "tenant_table"]


def tenant_table(results: Results, summary: Summary) -> str:
    """Who the tenants are, with what each does alone."""
    alone = {
        row.tenant: f"p50 {three_digits(row.p50)}, p99 {three_digits(row.p99.value if row.p99 else None)} ms"
        for row in summary.solo_ls
    }
    alone |= {row.tenant: f"{three_digits(row.rate.value)} /s" for row in summary.solo_be}
    rows = [
        _row(
            _cell(tenant.name, "text strong"),
            _cell(tenant.tenant_class, "text"),
            _cell(f"{tenant.model}, batch {tenant.batch}", "text"),
            _cell(tenant.arrivals, "text wrap"),
            _cell(
                _objective(tenant),
                "text",
            ),
            _cell(alone.get(tenant.name, "–"), "text"),
        )
        for tenant in results.tenants
    ]
    heads = [(name, "text") for name in ("Tenant", "Class", "Model", "Arrivals", "Objective (SLO)", "Alone on the GPU")]
    return _table("", heads, rows)


def _objective(tenant: TenantInfo) -> str:
    if tenant.slo_ms is None:
        return "–"
    return f"{tenant.slo_text} = {three_digits(tenant.slo_ms)} ms" if "solo" in tenant.slo_text else tenant.slo_text


def ls_table(summary: Summary) -> str:
    """Latency percentiles of every LS tenant, alone and under each policy."""
    figures = ("n", "p50", "p95", "p99", "p99.9", "p99 / solo", "queueing p99", "service p99", "SLO met", "lost")
    rows = []
    for policy, index, row in summary.ls_rows():
        verdict = "" if policy == ALONE or row.attainment is None else "good" if row.attainment >= 0.99 else "bad"
        rows.append(
            _row(
                _cell(policy if index == 0 else "", "text strong"),
                _cell(row.tenant, "text"),
                _cell(str(row.n)),
                _cell(three_digits(row.p50)),
                _cell(three_digits(row.p95)),
                _spread_cell(row.p99, three_digits),
                _cell(three_digits(row.p999)),
                _cell(three_digits(row.over_solo) if row.over_solo else "", "strong"),
                _cell(three_digits(row.queueing_p99)),
                _cell(three_digits(row.service_p99)),
                _cell(format_share(row.attainment), verdict),
                _cell(str(row.lost) if row.lost else ""),
                class_=_row_class(policy, index),
            )
        )
    caption = "Times in ms from arrival to output on the host; small figures: lowest and highest repeat."
    return _table(caption, [("Policy", "text"), ("Tenant", "text"), *((name, "") for name in figures)], rows)


def be_table(summary: Summary) -> str:
    """Throughput of every BE tenant, alone and under each policy."""
    total = {p.policy: p.be_share for p in summary.policies}
    rows = [
        _row(
            _cell(policy if index == 0 else "", "text strong"),
            _cell(row.tenant, "text"),
            _spread_cell(row.rate, three_digits),
            _spread_cell(row.share, format_share),
            _cell(format_share(total[policy]) if index == 0 and policy in total else "", "strong"),
            class_=_row_class(policy, index),
        )
        for policy, index, row in summary.be_rows()
    ]
    heads = [
        ("Policy", "text"),
        ("Tenant", "text"),
        ("finished /s", ""),
        ("of its solo rate", ""),
        ("all BE tenants", ""),
    ]
    return _table("Requests are whole batches; small figures: lowest and highest repeat.", heads, rows)


def cold_table(results: Results) -> str:
    """Cold starts of the tenants whose weights wait on the host; "" without any."""
    rows, last = [], ""
    for row in cold_starts(results):
        first = row.policy != last
        rows.append(
            _row(
                _cell(row.policy if first else "", "text strong"),
                _cell(row.tenant, "text"),
                _cell(str(row.starts)),
                _cell(three_digits(row.median), "strong"),
                _cell(three_digits(row.worst)),
                _cell(f"{row.nbytes / 1e9:.2f}"),
                _cell(three_digits(row.ideal)),
                _cell(three_digits(row.median / row.ideal)),
                class_="first" if first else "",
            )
        )
        last = row.policy
    figures = ("starts", "median, ms", "worst, ms", "GB", "link alone, ms", "median / link")
    caption = (
        "From when a request asked for its weights until they had arrived, with what they displace perhaps still running. "
        "Link alone: the bytes over the link's measured rate."
    )
    return _table(caption, [("Policy", "text"), ("Tenant", "text"), *((name, "") for name in figures)], rows)


def _table(caption: str, heads: Sequence[tuple[str, str]], rows: Sequence[str]) -> str:
    """A table with `heads` as (text, class); "" when it would have no rows."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col" class="{class_}">{escape(name)}</th>' for name, class_ in heads)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(*cells: str, class_: str = "") -> str:
    return f'<tr class="{class_}">{"".join(cells)}</tr>'


def _row_class(policy: str, index: int) -> str:
    return ("first " if index == 0 else "") + ("solo" if policy == ALONE else "")


def _cell(content: str, class_: str = "") -> str:
    return f'<td class="{class_}">{escape(content)}</td>'


def _spread_cell(spread: Spread | None, show: Callable[[float | None], str]) -> str:
    if spread is None:
        return _cell("")
    span = f'<span class="spread">{escape(show(spread.low))}–{escape(show(spread.high))}</span>'
    return f'<td class="strong">{escape(show(spread.value))}{span if spread.low < spread.high else ""}</td>'
