"""The map file: a channel map as JSON, whole or not at all, with a checksum over what it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from missile.errors import MisuseError
from missile.files import write_whole
from missile.probe.channel_map import ChannelMap, Interference, Topology, Verdict, Witness
from missile.probe.layout import PageLayout
from missile.probe.matching import Metric
from missile.probe.pages import PageModel
from missile.probe.structure import Digit

__all__ = ["FORMAT_VERSION", "read_map", "write_map"]

FORMAT_VERSION = 1
KIND = "missile channel map"


def write_map(channel_map: ChannelMap, path: Path) -> None:
    """Write `path` whole or leave it as it was. MisuseError when it can't be written."""
    content = to_json(channel_map)
    content["checksum"] = _checksum(content)
    try:
        write_whole(path, _pretty(content))
    except OSError as error:
        raise MisuseError(f"{path} can't be written: {error.strerror}.") from error


def read_map(path: Path) -> ChannelMap:
    """Read a map. MisuseError, in one sentence, for a file that is missing, truncated, edited or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MisuseError(f"There is no channel map at {path}; `missile probe -o {path}` makes one.") from None
    except OSError as error:
        raise MisuseError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError:
        raise MisuseError(f"{path} is no whole channel map: it is truncated or not JSON.") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise MisuseError(f"{path} is not a channel map.")
    if content.get("format") != FORMAT_VERSION:
        raise MisuseError(f"{path} has format {content.get('format')!r}; this Missile reads format {FORMAT_VERSION}.")
    if content.pop("checksum", None) != _checksum(content):
        raise MisuseError(f"{path} was changed after it was written: its checksum is wrong; probe again.")
    try:
        return from_json(content)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise MisuseError(f"{path} is not a valid channel map: {type(error).__name__} at {error}.") from error


def to_json(channel_map: ChannelMap) -> dict[str, Any]:
    """The map as JSON values, without a checksum. docs/map-file.md explains every key."""
    topology, metric, interference = channel_map.topology, channel_map.metric, channel_map.interference
    return {
        "kind": KIND,
        "format": FORMAT_VERSION,
        "gpu": channel_map.gpu,
        "uuid": channel_map.uuid,
        "device": channel_map.device,
        "simulated": channel_map.simulated,
        "granule_bytes": channel_map.granule_bytes,
        "granule_bits": list(channel_map.layout.inner_bits),
        "page_bytes": channel_map.page_bytes,
        "slices": channel_map.slices,
        "linear_masks": list(channel_map.linear_masks),
        "nonlinear": [{"base": digit.base, "table": digit.table.tolist()} for digit in channel_map.digits],
        "colors": [list(color) for color in channel_map.colors],
        "frame_bytes": channel_map.frame_bytes,
        "channels": [list(channel) for channel in channel_map.channels],
        "confidence": channel_map.confidence,
        "seconds": channel_map.seconds,
        "witnesses": [
            {"name": w.name, "verdict": str(w.verdict), "says": w.says, "numbers": dict(w.numbers)}
            for w in channel_map.witnesses
        ],
        "statistics": dict(channel_map.statistics),
        "interference": None
        if interference is None
        else {
            "slowdown": {access: np.round(matrix, 3).tolist() for access, matrix in interference.slowdown.items()},
            "victim_sms": interference.victim_sms,
            "aggressor_sms": interference.aggressor_sms,
            "working_set_bytes": interference.working_set_bytes,
        },
        "topology": {
            "sms": list(topology.sms),
            "groups": [list(group) for group in topology.groups],
            "sm_half": list(topology.sm_half),
            "slice_half": list(topology.slice_half),
            "step": topology.step,
        },
        "fingerprints": {
            "sms": list(metric.sms),
            "ball": metric.ball.tolist(),
            "centres": np.round(metric.centres.astype(np.float64), 3).tolist(),
            "sigma": metric.sigma,
            "radius": metric.radius,
        },
        "patterns": [pattern.tolist() for pattern in channel_map.model.patterns],
        "permutations": [permutation.tolist() for permutation in channel_map.model.permutations],
    }


def from_json(content: dict[str, Any]) -> ChannelMap:
    """The map that `to_json` gave. KeyError, TypeError or ValueError when it is not one."""
    layout = PageLayout(int(content["page_bytes"]), tuple(content["granule_bits"]))
    fingerprints, topology, interference = content["fingerprints"], content["topology"], content["interference"]
    return ChannelMap(
        gpu=str(content["gpu"]),
        uuid=str(content["uuid"]),
        device=str(content["device"]),
        simulated=bool(content["simulated"]),
        layout=layout,
        model=PageModel(
            int(content["slices"]),
            layout.granules,
            [np.array(pattern, np.int64) for pattern in content["patterns"]],
            [np.array(permutation, np.int64) for permutation in content["permutations"]],
        ),
        metric=Metric(
            tuple(fingerprints["sms"]),
            np.array(fingerprints["centres"], np.float32),
            np.array(fingerprints["ball"], np.int64),
            float(fingerprints["sigma"]),
            float(fingerprints["radius"]),
        ),
        linear_masks=tuple(content["linear_masks"]),
        digits=tuple(Digit(int(d["base"]), np.array(d["table"], np.int64)) for d in content["nonlinear"]),
        colors=tuple(tuple(color) for color in content["colors"]),
        frame_bytes=int(content["frame_bytes"]),
        topology=Topology(
            tuple(topology["sms"]),
            tuple(tuple(group) for group in topology["groups"]),
            tuple(topology["sm_half"]),
            tuple(topology["slice_half"]),
            float(topology["step"]),
        ),
        confidence=float(content["confidence"]),
        seconds=float(content["seconds"]),
        channels=tuple(tuple(channel) for channel in content["channels"]),
        interference=None
        if interference is None
        else Interference(
            {access: np.array(matrix, np.float64) for access, matrix in interference["slowdown"].items()},
            int(interference["victim_sms"]),
            int(interference["aggressor_sms"]),
            int(interference["working_set_bytes"]),
        ),
        witnesses=tuple(
            Witness(str(w["name"]), Verdict(w["verdict"]), str(w["says"]), dict(w["numbers"]))
            for w in content["witnesses"]
        ),
        statistics=dict(content["statistics"]),
    )


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _pretty(content: dict[str, Any]) -> str:
    """One key a line: readable at the top, compact below."""
    lines = [f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
