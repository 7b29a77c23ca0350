"""Probing: a GPU's channel map, recovered by measurement and verified.

`missile.probe(device)` is the whole of it: this package can be called, and calling it is `probe.probe`.
"""

from __future__ import annotations

import sys
from types import ModuleType

from missile.probe.channel_map import REFERENCE_PAGE, ChannelMap, Interference, Topology, Verdict, Witness
from missile.probe.map_file import read_map, write_map
from missile.probe.reuse import map_for, verify
from missile.probe.session import probe, probe_gpu

__all__ = [
    "REFERENCE_PAGE",
    "ChannelMap",
    "Interference",
    "Topology",
    "Verdict",
    "Witness",
    "map_for",
    "probe",
    "probe_gpu",
    "read_map",
    "verify",
    "write_map",
]


class _Callable(ModuleType):
    """A module that is also the function of its name: `missile.probe` is both a package and the call to make."""

    __call__ = staticmethod(probe)


sys.modules[__name__].__class__ = _Callable
