"""A whole probe: open, measure, fit, verify, give everything back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError, NoisyGpuError
from missile.gpu import open_gpu
from missile.gpu.interface import Gpu
from missile.probe.channel_map import ChannelMap, Verdict, Witness
from missile.probe.colors import choose_colors
from missile.probe.contention import GroupTests, SliceMemory, measure_interference
from missile.probe.groups import Groups, find_groups
from missile.probe.learning import Reference, classify, learn_reference, learn_relation, settle_metric
from missile.probe.pool import PagePool
from missile.probe.sampling import Sampler
from missile.probe.structure import describe, renamed
from missile.probe.takeover import PageHash, taken_over
from missile.probe.topology import find_topology
from missile.probe.witnesses import contention_witness, held_out_witness, spectral_witness

__all__ = ["probe", "probe_gpu"]

Ints = npt.NDArray[np.int64]
Progress = Callable[[str], None]

HARDWARE_PAGES = 32768  # 64 GiB of 2 MiB pages
SIMULATED_PAGES = 512
RELATED_PAGES = 6  # measured whole, beside the reference page
MEMORY_SHARE = 0.9  # of what is free, that is looked at at most
_MAX_UNMATCHED = 0.01
_LAB_PAGES = 384  # pages whose granules serve contention measurements


def probe(device: str | Gpu = "auto", **options: object) -> ChannelMap:
    """Recover and verify the channel map of `device`: a name as the command line takes, or a GPU that is open already.

    Options are `probe_gpu`'s, and `seed`. Reads only, and gives back all memory it took. Raises MisuseError (unknown
    device), UnsupportedError (no such GPU; it can't be measured; its hash is of no known form), NoisyGpuError (the
    answer would not be sure, and why), OutOfMemoryError (others hold the memory).
    """
    if not isinstance(device, str):
        return probe_gpu(device, **options)  # type: ignore[arg-type]
    seed = options.get("seed", 0)
    with open_gpu(device, seed=seed if isinstance(seed, int) else 0) as gpu:
        return probe_gpu(gpu, **options)  # type: ignore[arg-type]


def probe_gpu(
    gpu: Gpu,
    *,
    pages: int | None = None,
    samples: int = 48,
    sms: int = 16,
    interference: bool = True,
    seed: int = 0,
    known: ChannelMap | None = None,
    progress: Progress = lambda _: None,
) -> ChannelMap:
    """See `probe`.

    pages: how many pages, spread over the memory, to classify (None: 64 GiB on hardware, 512 on a simulated GPU, less
    where less is free). samples: granules measured in each. sms: how many SMs measure them. interference: measure what
    colors do to each other, too. known: a map of another GPU of this kind: where the reference page fits its patterns,
    how pages relate is taken over from it and not measured. progress: called with one line from time to time.
    """
    if samples < 16 or sms < 1 or (pages is not None and pages < 2):
        raise MisuseError("A probe needs at least 2 pages, 16 samples a page and 1 SM.")
    clock = _Clock()
    sampler = Sampler(gpu, seed=seed)
    wanted = pages or (SIMULATED_PAGES if gpu.info.simulated else HARDWARE_PAGES)
    room = int(gpu.memory_free() * MEMORY_SHARE) // gpu.info.page_bytes
    count = wanted if pages is not None else max(2, min(wanted, room))
    progress(f"taking {count} pages spread over {gpu.info.name}'s memory")
    with PagePool(gpu, count, spread=not gpu.info.simulated, rng=sampler.rng) as pool:
        clock.lap("memory")
        progress("measuring fingerprints of the reference page from all SMs")
        reference = learn_reference(sampler, int(pool.addresses[0]), gpu.info.page_bytes)
        clock.lap("reference page")
        hash_ = taken_over(known, reference) if known is not None else None
        if hash_ is None:
            progress(f"{reference.balls.count} latency classes; measuring how pages relate")
            hash_ = _measured_hash(sampler, reference, pool.addresses[1 : 1 + RELATED_PAGES].tolist())
        model, ball = hash_.model, hash_.ball
        metric = settle_metric(reference, ball, sms)
        clock.lap("relation of pages")
        progress(f"{model.slices} slices; classifying {count} pages")
        constants = classify(
            sampler, model, metric, reference.layout, pool.addresses, samples=samples, progress=progress
        )
        unmatched = float((constants[:, 2] < 0).mean())
        if unmatched > _MAX_UNMATCHED:
            raise NoisyGpuError(
                f"{unmatched:.1%} of {count} pages fit no pattern that was seen, so the map would not hold for them; probe "
                "again while nothing else runs on the GPU."
            )
        clock.lap("classification")
        draft = ChannelMap(
            gpu=gpu.info.name,
            uuid=gpu.info.uuid,
            device=gpu.info.device,
            simulated=gpu.info.simulated,
            layout=reference.layout,
            model=model,
            metric=metric,
            linear_masks=tuple(reference.layout.mask_to_address(mask) for mask in hash_.masks),
            digits=hash_.digits,
            colors=tuple((slice_,) for slice_ in range(model.slices)),
            frame_bytes=reference.layout.granule_bytes,
            topology=find_topology(reference.balls.centres[ball], reference.sms),
            confidence=0.0,
            seconds=0.0,
        )
        spectral = spectral_witness(reference.prints.mean(), reference.balls, hash_.masks)
        draft = replace(draft, witnesses=(spectral,))
        groups = known.channels if known is not None and hash_.taken else ()
        return _verified(
            gpu, sampler, draft, reference, pool.addresses, constants, clock, interference, groups, progress
        )


def _measured_hash(sampler: Sampler, reference: Reference, pages: Sequence[int]) -> PageHash:
    """From whole measurements of `pages`."""
    related = learn_relation(sampler, reference, pages)
    structure = describe(related.model, reference.balls.centres[related.ball])
    ball = related.ball[np.argsort(structure.names)]
    return PageHash(renamed(related.model, structure.names), ball, structure.masks, structure.digits)


def _verified(
    gpu: Gpu,
    sampler: Sampler,
    draft: ChannelMap,
    reference: Reference,
    pages: Ints,
    constants: Ints,
    clock: _Clock,
    interference: bool,
    known_groups: Sequence[Sequence[int]],
    progress: Progress,
) -> ChannelMap:
    """`draft` with its witnesses, interference and statistics. NoisyGpuError when a witness contradicts it."""
    progress("verifying: held-out granules")
    held_out = held_out_witness(sampler, draft, reference.balls, reference.sms, pages, constants)
    clock.lap("held-out granules")
    progress("verifying: contention")
    memory = SliceMemory(draft, pages[:_LAB_PAGES], constants[:_LAB_PAGES], sampler.rng)
    contention = contention_witness(gpu, draft, memory, sampler.rng)
    clock.lap("contention")
    for witness in (held_out, contention):
        if witness.verdict is Verdict.DISAGREES:
            raise NoisyGpuError(f"The map is refused by an independent test ({witness.name}): {witness.says}")
    centres = draft.metric.centres[draft.metric.ball]
    groups = Groups((), Witness("channels", Verdict.NOT_RUN, "Contention does not tell slices apart."))
    if contention.verdict is Verdict.AGREES:
        progress("finding slices that share what lies behind them")
        tests = GroupTests(gpu, memory)
        groups = find_groups(centres, draft.model.permutations, tests, sampler.rng, known_groups)
    clock.lap("channels")
    colors, frame_bytes = choose_colors(draft.model, draft.layout, centres, groups.members)
    draft = replace(draft, channels=groups.members, colors=colors, frame_bytes=frame_bytes)
    clock.lap("colors")
    matrix = None
    if interference:
        progress("measuring what colors do to each other")
        matrix = measure_interference(gpu, draft, memory)
        clock.lap("interference")
    balls = reference.balls
    statistics = {
        "noise_cycles": balls.noise,
        "radius_cycles": balls.radius,
        "separation_cycles": balls.separation,
        "gap": balls.gap,
        "latency_classes": balls.count,
        "reference_passes": reference.prints.passes,
        "disturbed": reference.prints.disturbed(),
        "latencies_measured": sampler.samples,
        "pages": len(pages),
        "pages_unmatched": int((constants[:, 2] < 0).sum()),
        "patterns": len(draft.model.patterns),
        "permutations": len(draft.model.permutations),
        "index_xors_seen": len(np.unique(constants[:, 1])),
        **{f"seconds: {name}": round(seconds, 3) for name, seconds in clock.laps.items()},
    }
    confidence = float((constants[:, 2] >= 0).mean()) * held_out.numbers["right"]
    return replace(
        draft,
        confidence=round(confidence, 6),
        seconds=round(clock.total, 3),
        interference=matrix,
        witnesses=(
            held_out,
            *draft.witnesses,
            contention,
            groups.witness,
            Witness("counters", Verdict.NOT_RUN, "Not asked for."),
        ),
        statistics=statistics,
    )


class _Clock:
    """Wall-clock seconds by phase: what the probe costs its user (the GPU's own clock is not what that is)."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._begin = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self._begin
