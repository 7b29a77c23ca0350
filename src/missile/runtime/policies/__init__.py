"""Policies: what runs where and when. One file each, registered by name here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from missile.errors import MisuseError, UnsupportedError
from missile.runtime.policies.interface import Action, Lane, Layout, Policy, Snapshot, Start
from missile.runtime.policies.partition import PartitionPolicy
from missile.runtime.policies.priority import PriorityPolicy
from missile.runtime.policies.streams import StreamsPolicy
from missile.runtime.policies.temporal import TemporalPolicy

__all__ = [
    "POLICIES",
    "RESERVED",
    "Action",
    "Lane",
    "Layout",
    "Policy",
    "Snapshot",
    "Start",
    "create_policy",
    "policy_summaries",
]

POLICIES: dict[str, Callable[..., Policy]] = {
    "temporal": TemporalPolicy,
    "streams": StreamsPolicy,
    "priority": PriorityPolicy,
    "partition": PartitionPolicy,
}

RESERVED: tuple[str, ...] = ("mps", "orion", "missile")
"""Names of policies that are planned."""


def create_policy(text: str, options: Mapping[str, float] | None = None) -> Policy:
    """The policy that `text` names: "streams", or with options "partition:ls_share=0.4" (several: comma-separated).

    options: more of them, which win over those in `text`. MisuseError for an unknown name, option or value;
    UnsupportedError for a name that this version does not have yet.
    """
    name, _, written = text.partition(":")
    if name in RESERVED:
        raise UnsupportedError(f"Policy {name!r} is planned and not in this version, which has {', '.join(POLICIES)}.")
    if name not in POLICIES:
        raise MisuseError(f"Unknown policy {name!r}; known: {', '.join(POLICIES)}.")
    given = {**_parse(name, written), **(options or {})}
    known = tuple(inspect.signature(POLICIES[name]).parameters)
    for option in given:
        if option not in known:
            raise MisuseError(f"Policy {name!r} has no option {option!r}; known: {', '.join(known) or 'none'}.")
    return POLICIES[name](**given)


def _parse(name: str, written: str) -> dict[str, float]:
    options = {}
    for part in filter(None, written.split(",")):
        key, _, value = part.partition("=")
        try:
            options[key.strip()] = float(value)
        except ValueError:
            raise MisuseError(f"Policy {name!r}: option {part!r} is not NAME=NUMBER.") from None
    return options


def policy_summaries() -> dict[str, str]:
    """Every policy of this version, and what it does in a sentence."""
    summaries = {}
    for name, kind in POLICIES.items():
        text = inspect.getdoc(inspect.getmodule(kind)) or ""
        summaries[name] = text.partition("`: ")[2].splitlines()[0]
    return summaries
