"""The W3C trace context: handed back as it came when it is well formed, and left out otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["trace_context"]

_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_LONGEST_STATE = 512


def trace_context(given: Mapping[str, str]) -> list[tuple[str, str]]:
    """`traceparent` and, with it, `tracestate` out of headers or metadata (names in lower case)."""
    parent = given.get("traceparent", "")
    if not _PARENT.fullmatch(parent):
        return []
    found = [("traceparent", parent)]
    state = given.get("tracestate", "")
    if state and len(state) <= _LONGEST_STATE and state.isprintable() and state.isascii():
        found.append(("tracestate", state))
    return found
