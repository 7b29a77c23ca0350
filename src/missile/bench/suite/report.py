"""A suite's `report.html` and `tables.md`: what was run, what came out, what holds, and where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from missile.bench.fidelity import Comparison
from missile.bench.page import render_page
from missile.bench.results import Results
from missile.bench.suite.cells import BASELINES, SLO_FACTOR, family, settings_of
from missile.bench.suite.charts import curves, family_class
from missile.bench.suite.claims import Claim, check_claims
from missile.bench.suite.files import SuiteState
from missile.bench.suite.summary import ATTAINED, LEFT_OUT, CellSummary, FamilySummary, summarize_families
from missile.bench.suite.tables import (
    Table,
    best_table,
    claim_table,
    family_table,
    prediction_table,
    setting_table,
    to_html,
    to_markdown,
)
from missile.bench.svg import element
from missile.files import write_whole

__all__ = ["SuiteReport", "write_suite_report"]


@dataclass(frozen=True, slots=True)
class SuiteReport:
    """All that a suite's report says. cells: what is there, of `planned` cells; predictions: the simulator's error."""

    state: SuiteState
    planned: int
    cells: Sequence[CellSummary]
    results: Mapping[str, Results]
    predictions: Sequence[Comparison] = ()
    predicted_on: str = ""

    @property
    def families(self) -> list[FamilySummary]:
        return summarize_families(self.cells)

    @property
    def claims(self) -> list[Claim]:
        return check_claims(self.cells, self.predictions)


def write_suite_report(report: SuiteReport, directory: Path) -> Path:
    """Write `report.html` and `tables.md` into `directory`; returns the page's path."""
    write_whole(directory / "tables.md", _markdown(report))
    page = directory / "report.html"
    write_whole(page, _page(report))
    return page


def _page(report: SuiteReport) -> str:
    sections = (
        _head(report),
        _claims(report),
        _section(report, "Policies at their best settings", "", to_html(family_table(report.families))),
        _groups(report),
        _curves(report),
        _section(report, "Every cell", "", to_html(best_table(report.cells))),
        _plans(report),
        _predictions(report),
        _left_out(report),
        _method(report),
        _details("Every setting: the points of the curves", to_html(setting_table(report.cells))),
        _environment(report),
    )
    body = "\n".join(section for section in sections if section)
    return render_page(f"Missile: suite {report.state.suite} on {report.state.gpu}", body)


def _head(report: SuiteReport) -> str:
    state, settings = report.state, report.state.settings
    ls = sorted({name for cell in report.cells for name in cell.ls})
    be = sorted({name for cell in report.cells for name in cell.be})
    lead = (
        f"Latency-sensitive (LS) models ({escape(', '.join(ls))}) share one GPU, {escape(state.gpu)}, with best-effort "
        f"(BE) models ({escape(', '.join(be))}): {len(report.cells)} combinations of them and their arrivals "
        f"(<em>cells</em>). In each, every policy ran at each of its settings on exactly the same arrivals, "
        f"{settings.repeats} × {settings.duration_s:g} s, and every tenant ran alone on them (<em>solo</em>) in the same "
        "session; all ratios refer to that."
    )
    warnings = []
    if state.simulated:
        warnings.append(
            "<strong>Simulated.</strong> A model of the GPU ran, not the GPU. Read the comparison between policies, not the "
            "absolute times."
        )
    if len(report.cells) < report.planned:
        warnings.append(
            f"<strong>Part of the suite.</strong> {len(report.cells)} of its {report.planned} cells have been run, whole; "
            "the others are in no figure here. " + " ".join(escape(text) for text in state.chosen)
        )
    badge = "simulated" if state.simulated else "measured"
    label = "simulated" if state.simulated else "measured on hardware"
    return (
        f'<h1>Isolation against everyone: suite {escape(state.suite)} <span class="badge {badge}">{label}</span></h1>'
        f'<p class="lead">{lead}</p>' + "".join(f'<p class="warning">{warning}</p>' for warning in warnings)
    )


def _claims(report: SuiteReport) -> str:
    if not report.claims:
        text = "Policy <code>missile</code> was not run, so this is about the baselines alone."
        return f"<h2>What was to be shown</h2><p>{text}</p>"
    body = to_html(claim_table(report.claims))
    for claim in report.claims:
        if claim.exceptions:
            items = "".join(f"<li>{escape(line)}</li>" for line in claim.exceptions)
            body += _details(f"{claim.title}: where not, and why", f"<ul>{items}</ul>")
    return _section(report, "What was to be shown", "", body)


def _groups(report: SuiteReport) -> str:
    """The families' table for each kind of cell, where there are several."""
    groups = dict.fromkeys(cell.cell.group for cell in report.cells)
    if len(groups) < 2:
        return ""
    parts = []
    for group in groups:
        cells = [cell for cell in report.cells if cell.cell.group == group]
        count = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
        parts.append(f"<h3>{escape(group)}, {count}</h3>{to_html(family_table(summarize_families(cells)))}")
    return _section(report, "By kind of load", "", "".join(parts))


def _curves(report: SuiteReport) -> str:
    cards = [
        f'<div class="card"><h3>{escape(cell.cell.name.replace("--", " · "))}</h3>{chart}</div>'
        for cell in report.cells
        if (chart := curves(cell))
    ]
    if not cards:
        return ""
    keys = [name for name in (*BASELINES, "missile") if any(name in cell.points for cell in report.cells)]
    legend = "".join(
        f'<li><svg viewBox="0 0 26 12" aria-hidden="true">'
        f"{element('circle', cx=13, cy=6, r=5, class_=f'dot {family_class(name)}')}</svg>{escape(name)}</li>"
        for name in keys
    )
    text = (
        f"A point is one setting of a policy: far right is much BE work, low is a short LS tail. A filled one met the "
        f"objective in at least {ATTAINED:.0%} of every LS tenant's requests. A line goes through a policy's settings."
    )
    return (
        f'<h2>LS tail against BE rate{_badge(report)}</h2><p>{text}</p><ul class="legend">{legend}</ul>'
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _plans(report: SuiteReport) -> str:
    """The planner's words for each cell in which it planned."""
    parts = [
        _details(
            f"{cell.cell.name}{'' if cell.accepted else ' (no plan was found to hold)'}",
            f'<pre class="wrap">{escape(cell.plan)}</pre>',
        )
        for cell in report.cells
        if cell.plan
    ]
    return f"<h2>Why missile ran as it did{_badge(report)}</h2>{''.join(parts)}" if parts else ""


def _predictions(report: SuiteReport) -> str:
    if not report.predictions:
        return ""
    far = sorted((one for one in report.predictions if not one.close), key=lambda one: -max(one.ratio, 1 / one.ratio))
    rows = tuple(
        (one.policy, one.tenant, one.neighbours, one.figure, f"{one.measured:.3g}", f"{one.simulated:.3g}")
        for one in far
        if one.figure in ("p99", "rate")
    )
    outliers = Table(
        ("policy", "tenant", "beside", "figure", "measured", "simulated"), rows, 4, "p99 in ms, rate per s."
    )
    body = to_html(prediction_table(report.predictions)) + _details(f"{len(rows)} outliers", to_html(outliers))
    text = f"The same cells on the simulated GPU {report.predicted_on}, against the measured ones."
    return _section(report, "How well the simulator predicts it", text, body)


def _left_out(report: SuiteReport) -> str:
    """What the cells' notes say, each once."""
    where: dict[str, dict[str, None]] = {}
    for cell in report.cells:
        for note in cell.notes:
            policy = LEFT_OUT.match(note)
            # A policy that was left out for one reason at several settings was left out once.
            said = f"Policy {family(policy[1])} was left out: {policy[2]}" if policy else note
            where.setdefault(said, {})[cell.cell.name] = None
    items = ""
    for note, names in where.items():
        cells = "every cell" if len(names) == len(report.cells) else ", ".join(names)
        items += f'<li>{escape(note)} <span class="note">({escape(cells)})</span></li>'
    return f"<h2>Left out, and other remarks</h2><ul>{items}</ul>" if items else ""


def _method(report: SuiteReport) -> str:
    settings = report.state.settings
    ran = settings_of(settings.policies)
    tried = "; ".join(
        f"{name}: {', '.join(policy.partition(':')[2] or 'as it is' for policy in ran if family(policy) == name)}"
        for name in BASELINES
        if any(family(policy) == name for policy in ran)
    )
    points = [
        *report.state.chosen,
        f"Every LS tenant's objective is {SLO_FACTOR:g} × its solo p99 under the same arrivals. Solo runs are made in the "
        "same session as the cell's, on the same GPU with all models loaded; cells in which a tenant has the same arrivals "
        "share its solo runs.",
        "Loads are shares of a model's capacity, the rate it finishes alone in a closed loop: "
        + ", ".join(f"{model} {rate:.0f}/s" for model, rate in report.state.capacity.items())
        + ".",
        f"Each baseline is tuned over its own knobs in each cell by itself ({tried}). Its best setting is the one with the "
        f"highest BE rate among those with {ATTAINED:.0%} attainment; where there is none, the one with the highest "
        "attainment. It is chosen on the very runs that it is judged by, which favours the baselines; missile runs what its "
        "planner chose, by its model and by trials on arrivals of another seed.",
        "All policies but mps run in one process and one loop, the same code; under mps each tenant has a process, and a "
        "processor core, of its own.",
        "Orion and missile use each kernel's profile, measured beforehand alone on the GPU.",
        f"Arrivals are drawn from seed {settings.seed} in the first repeat and the next number in each later one. Each "
        "repeat goes through all policies before the next begins.",
        "Latency runs from a request's arrival to its output on the host. Percentiles are over all repeats (nearest rank); "
        "where fewer than 100 requests stand behind it, p99 is left out (–). Rejected and unfinished requests count as "
        "missed.",
        "BE rates are finished batches per second of the counted span, against the same tenant alone.",
        "DISB's networks are played by models of like kind, at the rates and with the traces of the original.",
    ]
    return "<h2>Method and fairness</h2><ul>" + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>"


def _environment(report: SuiteReport) -> str:
    commits = sorted({str(results.environment.get("commit") or "unknown") for results in report.results.values()})
    created = sorted(results.created for results in report.results.values())
    first = next(iter(report.results.values()), None)
    facts = {"commits": ", ".join(commits), "made": f"{created[0]} to {created[-1]}" if created else ""}
    if first is not None:
        gpu, host = first.environment.get("gpu", {}), first.environment.get("host", {})
        facts |= {
            "GPU": f"{gpu.get('name')}, {gpu.get('sms')} SMs, driver {gpu.get('driver')}, {gpu.get('runtime')}",
            "host": f"{host.get('cpu')}, {host.get('cores')} cores, Python {host.get('python')}",
        }
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return (
        f"<h2>Environment and raw data</h2><dl>{listed}</dl><p>Every request's times lie beside this page, a file for each "
        "cell in <code>cells/</code>; <code>missile bench --report cells/CELL.json.gz -o DIR</code> makes a page of any, "
        "and <code>missile bench --report FOLDER</code> this one again.</p>"
    )


def _section(report: SuiteReport, heading: str, text: str, content: str) -> str:
    intro = f"<p>{escape(text)}</p>" if text else ""
    return f'<h2>{heading}{_badge(report)}</h2>{intro}<div class="card scroll">{content}</div>' if content else ""


def _details(summary: str, content: str) -> str:
    return (
        f'<details><summary>{escape(summary)}</summary><div class="scroll">{content}</div></details>' if content else ""
    )


def _badge(report: SuiteReport) -> str:
    return '<span class="badge simulated">simulated</span>' if report.state.simulated else ""


def _markdown(report: SuiteReport) -> str:
    state = report.state
    what = f"{'Simulated: ' if state.simulated else ''}{state.gpu}, {len(report.cells)} of {report.planned} cells"
    parts = [
        f"# Suite {state.suite}: {what}\n",
        f"{state.settings.repeats} × {state.settings.duration_s:g} s per setting; how to read it: docs/benchmarks.md.\n",
        *(f"{text}\n" for text in state.chosen),
    ]
    if report.claims:
        parts += ["## What was to be shown\n", to_markdown(claim_table(report.claims))]
        for claim in report.claims:
            if claim.exceptions:
                parts += [f"{claim.title}, exceptions:\n", *(f"- {line}" for line in claim.exceptions), ""]
    parts += ["## Policies at their best settings\n", to_markdown(family_table(report.families))]
    parts += ["## Every cell\n", to_markdown(best_table(report.cells))]
    if report.predictions:
        parts += [f"## Predicted on {report.predicted_on}\n", to_markdown(prediction_table(report.predictions))]
    parts += ["## Every setting\n", to_markdown(setting_table(report.cells))]
    return "\n".join(parts)
