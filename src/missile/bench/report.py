"""`report.html`: one self-contained page that says what was compared with what, and what came out."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from missile.bench.charts import bars, busiest_window, distribution, tenant_classes, timeline, tradeoff
from missile.bench.page import render_page
from missile.bench.report_tables import be_table, cold_table, ls_table, tenant_table
from missile.bench.results import Results, Run
from missile.bench.scenario import format_scenario
from missile.bench.summary import PolicySummary, Summary
from missile.bench.svg import element
from missile.bench.table import format_share, three_digits
from missile.files import write_whole

__all__ = ["render_report", "write_report"]

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def write_report(results: Results, summary: Summary, path: Path) -> Path:
    """Write the page to `path`, whole or not at all; returns `path`."""
    write_whole(path, render_report(results, summary))
    return path


def render_report(results: Results, summary: Summary) -> str:
    """The page as HTML. It loads nothing: style and pictures are inside."""
    sections = (
        _head(results),
        _in_short(results, summary),
        _tenants(results, summary),
        _policies(results),
        _plan(results),
        _tradeoff(results, summary),
        _section(results, "Latency of the LS tenants", ls_table(summary)),
        _section(results, "Throughput of the BE tenants", be_table(summary)),
        _section(results, "Weights from the host", cold_table(results)),
        _distributions(results),
        _timelines(results),
        _method(results),
        _environment(results),
    )
    body = "\n".join(section for section in sections if section)
    return render_page(f"Missile bench: {results.scenario.name} on {_gpu(results)}", body)


def _head(results: Results) -> str:
    scenario = results.scenario
    ls = sum(tenant.tenant_class == "LS" for tenant in results.tenants)
    be = len(results.tenants) - ls
    ran = [policy for policy in scenario.policies if _first(results, policy)]
    each = f"{_count(scenario.repeats, 'time')} for {scenario.duration_s:g} s"
    lead = (
        f"{_count(ls, 'latency-sensitive (LS) model', start=True)} and {_count(be, 'best-effort (BE) model')} shared one "
        f"GPU, {escape(_gpu(results))}. How much longer do LS requests take than when their model has the whole GPU to "
        f"itself, and how much work do the BE models still get done? {_count(len(ran), 'way', start=True)} of sharing "
        f"({escape(', '.join(ran))}) ran {each} on exactly the same requests, arriving at exactly the same times; the "
        f"first {scenario.warmup_s:g} s of a run are not counted. Every tenant also ran alone (<em>solo</em>): that is "
        "what all ratios refer to."
    )
    commit = results.environment.get("commit")
    meta = [
        f"scenario {scenario.name}",
        results.created.replace("T", " "),
        f"Missile {results.environment.get('missile')}",
    ]
    meta += [f"commit {commit}"] if commit else []
    warnings = []
    if results.simulated:
        warnings.append(
            "<strong>Simulated.</strong> A model of the GPU ran, not the GPU. Read the comparison between policies, not the "
            "absolute times."
        )
    if results.interrupted:
        warnings.append("<strong>Incomplete.</strong> The run ended early; this is what had been measured by then.")
    warnings += [escape(note) for note in results.notes]
    return (
        f"<h1>{_count(len(results.tenants), 'model', start=True)}, one GPU: who slows down whom {_badge(results)}</h1>"
        f'<p class="meta">{escape(" · ".join(meta))}</p><p class="lead">{lead}</p>'
        + (f"<p>{escape(scenario.description)}</p>" if scenario.description else "")
        + "".join(f'<p class="warning">{warning}</p>' for warning in warnings)
    )


def _in_short(results: Results, summary: Summary) -> str:
    """What the numbers say, in sentences that are computed and so hold for any results."""
    rated = [p for p in summary.policies if p.ls_over_solo is not None and p.be_share is not None]
    if not rated:
        return ""
    calm, busy = min(rated, key=lambda p: p.ls_over_solo or 0), max(rated, key=lambda p: p.be_share or 0)
    lines = [f"Shortest LS tail: {_rating(calm)}."]
    if busy.policy != calm.policy:
        lines.append(f"Most BE work: {_rating(busy)}.")
    else:
        lines.append("The same policy also gave the BE tenants the most work done.")
    met = [p.policy for p in summary.policies if p.ls and all((row.attainment or 0) >= 0.99 for row in p.ls)]
    lines.append(
        f"At least 99% of every LS tenant's requests met their objective under {' and '.join(met)}."
        if met
        else "Under none of the policies did at least 99% of every LS tenant's requests meet their objective."
    )
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<h2>In short{_small_badge(results)}</h2><ul>{items}</ul>"


def _rating(policy: PolicySummary) -> str:
    return (
        f"<strong>{escape(policy.policy)}</strong>, LS p99 {three_digits(policy.ls_over_solo)} × solo, "
        f"BE {format_share(policy.be_share)} of solo"
    )


def _tenants(results: Results, summary: Summary) -> str:
    return _section(results, "Who shared the GPU", tenant_table(results, summary))


def _policies(results: Results) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in results.policies.items())
    return f"<h2>The policies</h2><dl>{rows}</dl>"


def _plan(results: Results) -> str:
    if results.plan is None:
        return ""
    words = f'<pre class="wrap">{escape(results.plan["text"])}</pre>'
    return f"<h2>Why missile runs as it does{_small_badge(results)}</h2>{words}"


def _tradeoff(results: Results, summary: Summary) -> str:
    scatter = tradeoff(summary, results.scenario.policies)
    if not scatter:
        return ""
    text = (
        "A good policy is far right (BE work gets done) and low (LS requests take no longer than solo). A dot is the "
        "geometric mean over the LS tenants, its line spans the least and the most affected of them. In the bars, thin "
        "marks show the smallest and largest value of one repeat. BE shares add up: 100% is the work of one BE tenant "
        "alone on the GPU."
    )
    return (
        f"<h2>LS tail against BE throughput{_small_badge(results)}</h2><p>{text}</p>{_tenant_legend(results)}"
        f'<div class="cards"><div class="card">{scatter}</div><div class="card">{bars(summary, results.tenants)}</div></div>'
    )


def _distributions(results: Results) -> str:
    cards = [
        f'<div class="card"><h3>{escape(tenant.name)} <span class="note">{escape(tenant.model)}</span></h3>{chart}</div>'
        for tenant in results.tenants
        if tenant.tenant_class == "LS" and (chart := distribution(results, tenant))
    ]
    if not cards:
        return ""
    keys = [("line alone", "alone (solo)")]
    keys += [(f"line p{index}", policy) for index, policy in enumerate(results.scenario.policies)]
    text = (
        "How many of a tenant's requests were done within a time, from arrival to output on the host. The vertical axis "
        "counts nines, so that the tail is visible; a curve further left is better, and it ends where its samples end."
    )
    return (
        f"<h2>Latency distributions{_small_badge(results)}</h2><p>{text}</p>{_legend(keys)}"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _timelines(results: Results) -> str:
    runs = [run for policy in results.scenario.policies if (run := _first(results, policy))]
    if not runs:
        return ""
    window = busiest_window(runs[0], results.tenants, _window_ns(results))
    charts = "".join(
        f'<div class="card"><h3>{escape(run.policy)}</h3>'
        f'<div class="scroll">{timeline(run, results.tenants, window)}</div></div>'
        for run in runs
    )
    text = (
        f"The same {(window[1] - window[0]) / 1e6:g} ms under every policy: those of the first repeat in which most LS "
        f"requests arrive ({window[0] / 1e9:.3f} s after its start). A bar is a request from its first kernel to its last, "
        "a tick its arrival, the thin line between them its wait. Bars above each other run at the same time."
    )
    return (
        f"<h2>Who ran where{_small_badge(results)}</h2><p>{text}</p>{_tenant_legend(results)}"
        f'<div class="stack">{charts}</div>'
    )


def _first(results: Results, policy: str) -> Run | None:
    return next((run for run in results.runs if run.kind == "policy" and run.policy == policy), None)


def _window_ns(results: Results) -> int:
    """Long enough for about two of the longest requests, 20 to 120 ms."""
    longest = max(
        (
            sorted(end - start for start, end in zip(tenant.start_ns, tenant.end_ns, strict=True))[
                len(tenant.end_ns) // 2
            ]
            for run in results.runs
            if run.kind == "solo"
            for tenant in run.tenants
            if tenant.end_ns
        ),
        default=0,
    )
    return min(max(2 * round(longest / 1e6), 20), 120) * 1_000_000


def _method(results: Results) -> str:
    scenario = results.scenario
    points = [
        "Latency runs from a request's arrival to its output on the host. Queueing is the part before its first kernel "
        "runs, service the rest.",
        "Percentiles are over the requests of all repeats together (nearest rank). The range under a value is the "
        "smallest and largest value of one repeat. A percentile that too few requests stand behind is left out (–).",
        "Requests that were rejected or had not finished when a run ended count as missing their objective.",
        "BE throughput is finished requests (batches) per second of the counted span; its share is against the same "
        "tenant alone on the whole GPU.",
        f"Arrivals are drawn from seed {scenario.seed} in the first repeat and the next number in each later one, per "
        "tenant and independent of the policy. Repeats go through all policies in turn, so that a drift meets them alike.",
        "This is one GPU with these models and loads. Other GPUs, models and loads give other numbers.",
    ]
    if results.simulated:
        points.append(
            "The simulator shares SMs, bandwidth and copy engines among recorded kernels. It leaves out what it does not "
            "model: clock changes, driver hiccups, other processes."
        )
    return "<h2>Method and caveats</h2><ul>" + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>"


def _environment(results: Results) -> str:
    rows = []
    for key, value in results.environment.items():
        if isinstance(value, dict):
            parts = [_plain(name, item) for name, item in value.items() if item not in ("", [], None, 0)]
            rows.append((key, ", ".join(parts)))
        elif value:
            rows.append((key, str(value)))
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows)
    name = escape(results.scenario.name)
    return (
        f"<h2>Environment</h2><dl>{listed}</dl><details><summary>The scenario, to run it again</summary>"
        f"<pre>{escape(format_scenario(results.scenario))}</pre>"
        f"<p>Save it as <code>{name}.toml</code> and run <code>missile bench {name}.toml</code>. The raw samples lie beside "
        "this page in <code>results.json</code>; <code>missile bench --report results.json</code> makes it again.</p>"
        "</details>"
    )


def _section(results: Results, heading: str, content: str) -> str:
    return f'<h2>{heading}{_small_badge(results)}</h2><div class="card scroll">{content}</div>' if content else ""


def _badge(results: Results) -> str:
    return (
        '<span class="badge simulated">simulated</span>'
        if results.simulated
        else '<span class="badge measured">measured on hardware</span>'
    )


def _small_badge(results: Results) -> str:
    return _badge(results) if results.simulated else ""


def _tenant_legend(results: Results) -> str:
    classes = tenant_classes(results.tenants)
    return _legend(
        [(f"fill {classes[t.name]}", f"{t.name} ({t.tenant_class}, {t.model} × {t.batch})") for t in results.tenants]
    )


def _legend(keys: Iterable[tuple[str, str]]) -> str:
    items = []
    for class_, label in keys:
        mark = (
            element("line", x1=0, x2=26, y1=6, y2=6, class_=class_)
            if class_.startswith("line")
            else element("rect", x=4, y=0, width=18, height=12, rx=2, class_=class_)
        )
        items.append(f'<li><svg viewBox="0 0 26 12" aria-hidden="true">{mark}</svg>{escape(label)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _gpu(results: Results) -> str:
    return f"{results.gpu} ({'simulated, ' if results.simulated else ''}{results.device})"


def _count(number: int, noun: str, *, start: bool = False) -> str:
    """ "three models"; with `start`, as a sentence begins."""
    word = _NUMBERS[number] if number < len(_NUMBERS) else str(number)
    return f"{word.capitalize() if start else word} {noun}{'' if number == 1 else 's'}"


def _plain(name: str, value: object) -> str:
    """One fact of the environment: "sms 132", "l2 50 MiB"."""
    if isinstance(value, int | float) and name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes').replace('_', ' ')} {value / 2**20:.0f} MiB"
    if isinstance(value, int | float) and name.endswith("_hz"):
        return f"{name.removesuffix('_hz').replace('_', ' ')} {value / 1e6:.0f} MHz"
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    return f"{name.replace('_', ' ')} {str(value).lower() if isinstance(value, bool) else value}"
