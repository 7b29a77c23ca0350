"""Policies: what runs where and when. One file each, registered by name here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping

from missile.errors import MisuseError, UnsupportedError
from missile.runtime.policies.interface import Action, Lane, Layout, Policy, Snapshot, Start
from missile.runtime.policies.missile import MissilePolicy
from missile.runtime.policies.orion import OrionPolicy
from missile.runtime.policies.partition import PartitionPolicy
from missile.runtime.policies.priority import PriorityPolicy
from missile.runtime.policies.streams import StreamsPolicy
from missile.runtime.policies.temporal import TemporalPolicy

__all__ = [
    "POLICIES",
    "Action",
    "Lane",
    "Layout",
    "Policy",
    "Snapshot",
    "Start",
    "create_policy",
    "parse_options",
    "policy_summaries",
]

_KINDS = (TemporalPolicy, StreamsPolicy, PriorityPolicy, PartitionPolicy, OrionPolicy, MissilePolicy)

POLICIES: dict[str, Callable[..., Policy]] = {kind.name: kind for kind in _KINDS}

_SWITCH = {"on": 1.0, "off": 0.0}


def create_policy(text: str, options: Mapping[str, float] | None = None) -> Policy:
    """The policy that `text` names: "streams", or with options "partition:ls_share=0.4" (several: comma-separated).

    options: more of them, which win over those in `text`. MisuseError for an unknown name, option or value;
    UnsupportedError for a name that this version does not have yet.
    """
    name = text.partition(":")[0]
    if name == "mps":
        raise UnsupportedError(
            "Policy 'mps' runs each tenant in a process of its own; `missile bench` does that, through missile.runtime.mps."
        )
    if name not in POLICIES:
        raise MisuseError(f"Unknown policy {name!r}; known: {', '.join(POLICIES)}.")
    known = tuple(inspect.signature(POLICIES[name]).parameters)
    written = parse_options(text, known)
    for option in options or ():
        _require_known(name, option, known)
    return POLICIES[name](**{**written, **(options or {})})


def parse_options(text: str, known: Collection[str]) -> dict[str, float]:
    """The options in `text`, a policy's name with options: numbers, "on" (1.0) and "off" (0.0).

    MisuseError for what is not NAME=NUMBER, and for an option that is not in `known`.
    """
    name, _, written = text.partition(":")
    options = {}
    for part in filter(None, written.split(",")):
        option, _, value = (side.strip() for side in part.partition("="))
        try:
            options[option] = _SWITCH[value] if value in _SWITCH else float(value)
        except ValueError:
            raise MisuseError(f"Policy {name!r}: option {part!r} is not NAME=NUMBER.") from None
        _require_known(name, option, known)
    return options


def _require_known(policy: str, option: str, known: Collection[str]) -> None:
    if option not in known:
        raise MisuseError(f"Policy {policy!r} has no option {option!r}; known: {', '.join(known) or 'none'}.")


def policy_summaries() -> dict[str, str]:
    """Every policy of this version, and what it does in a sentence."""
    return {kind.name: kind.summary for kind in _KINDS}
