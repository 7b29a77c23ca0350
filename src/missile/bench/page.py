"""A self-contained page: a title and a body in the bench's template, with its style inside."""

from __future__ import annotations

from html import escape
from importlib import resources
from string import Template

__all__ = ["render_page"]


def render_page(title: str, body: str) -> str:
    """title: plain text. body: markup, inside <main>. The page loads nothing."""
    templates = resources.files("missile.bench").joinpath("templates")
    return Template(templates.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title), style=templates.joinpath("report.css").read_text(encoding="utf-8"), body=body
    )
