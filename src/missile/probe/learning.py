"""The measured part of a probe: from a GPU to slices, the relation between pages and constants of every page.

Stops measuring when the statistics say enough, and refuses when they never do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.errors import NoisyGpuError
from missile.probe.granule import BitFlips, find_layout, measure_flips
from missile.probe.layout import PageLayout
from missile.probe.matching import Matcher, Metric, learn_page
from missile.probe.pages import NO_PAGE, PageModel
from missile.probe.relation import Related, relate
from missile.probe.sampling import Fingerprints, Sampler, choose_sms
from missile.probe.slices import Balls, find_balls

__all__ = ["Reference", "classify", "learn_reference", "learn_relation", "settle_metric"]

Ints = npt.NDArray[np.int64]
Progress = Callable[[str], None]

MAX_DISTURBED = 0.02  # share of repeated measurements that something else may hit
_PASSES = (4, 4, 8, 16)  # passes over the reference page, one batch after another
_PAGE_PASSES = 4
_MAX_PAGE_PASSES = 16
_MAX_LEARNT = 64  # pages measured whole because nothing known fits them
_CHUNK = 2048  # pages sampled at a time


@dataclass(frozen=True, slots=True)
class Reference:
    """The page that everything is told by.

    prints: its fingerprints from all `sms`, as measured. balls: from them, with drift removed.
    flips: which address bits move an address to another slice.
    """

    address: int
    layout: PageLayout
    flips: BitFlips
    sms: tuple[int, ...]
    prints: Fingerprints
    balls: Balls


def learn_reference(sampler: Sampler, address: int, page_bytes: int) -> Reference:
    """Granule and balls of the page at `address`. NoisyGpuError where they are not sure after all passes."""
    sms = sampler.gpu.sm_ids()
    few = sms[:: max(1, len(sms) // 24)]
    flips = measure_flips(sampler, address, page_bytes, few)
    _check_quiet(flips.disturbed)
    layout = find_layout(flips, page_bytes)
    addresses = address + layout.offsets()
    prints: Fingerprints | None = None
    refusal = NoisyGpuError("Nothing was measured.")
    for passes in _PASSES:
        more = sampler.fingerprints(addresses, sms, passes=passes)
        prints = more if prints is None else prints.joined(more)
        _check_quiet(prints.disturbed())
        try:
            balls = find_balls(prints.mean(), prints.noise())
            # With the slices known, drift can be told from them: once more without it.
            expected = balls.centres[np.maximum(balls.labels, 0)]
            calm = prints.without_drift(expected)
            return Reference(address, layout, flips, sms, prints, balls.refined(calm.mean(), calm.noise()))
        except NoisyGpuError as error:
            refusal = error
    raise refusal


def learn_relation(sampler: Sampler, reference: Reference, pages: Sequence[int]) -> Related:
    """Slices and the pages' relation from whole measurements of `pages` beside the reference page."""
    offsets = reference.layout.offsets()
    table = np.array([reference.balls.labels, *(_label_page(sampler, reference, page + offsets) for page in pages)])
    if (table < 0).any():
        raise NoisyGpuError(
            f"{int((table < 0).sum())} of {table.size} granules can't be told to one slice even after "
            f"{_MAX_PAGE_PASSES} passes: probe again while nothing else runs on the GPU."
        )
    return relate(table)


def settle_metric(reference: Reference, ball: Ints, count: int) -> Metric:
    """The `count` SMs that tell most, and what one pass over them looks like; ball: int64, shape (slices,)."""
    sms = choose_sms(reference.balls.centres, reference.sms, min(count, len(reference.sms)))
    return Metric.calibrated(reference.balls, ball, sms, reference.sms, reference.prints.cycles)


def classify(
    sampler: Sampler,
    model: PageModel,
    metric: Metric,
    layout: PageLayout,
    pages: Ints,
    *,
    samples: int,
    learn: bool = True,
    progress: Progress = lambda _: None,
) -> Ints:
    """Constants of the pages at `pages`, shape (pages, 3), from `samples` granules of each; NO_PAGE where none are sure.

    A page that doesn't match is sampled again at more granules; with `learn`, some are measured whole and `model` grows.
    """
    constants = np.full((len(pages), 3), NO_PAGE, np.int64)
    learnt = 0
    offsets = layout.offsets()
    for attempt in range(4):
        open_ = np.flatnonzero(constants[:, 2] == NO_PAGE)
        if not open_.size:
            break
        matcher = Matcher(model, metric, samples << min(attempt, 2), sampler.rng)
        where = offsets[matcher.indices]
        for start in range(0, len(open_), _CHUNK):
            rows = open_[start : start + _CHUNK]
            addresses = (pages[rows, None] + where).reshape(-1)
            measured = sampler.in_order(addresses, metric.sms).reshape(len(rows), len(where), -1)
            constants[rows] = matcher.match(measured)
            progress(f"classified {int((constants[:, 2] >= 0).sum())} of {len(pages)} pages")
            # New permutations help the chunks to come: learn from the first page that fits none.
            for row in rows[constants[rows, 2] == NO_PAGE][:4]:
                if learn and learnt < _MAX_LEARNT:
                    learnt += 1
                    whole = sampler.in_order(pages[row] + offsets, metric.sms)
                    found = learn_page(model, metric, whole)
                    if found is not None:
                        constants[row] = found
    return constants


def _check_quiet(disturbed: float) -> None:
    if disturbed > MAX_DISTURBED:
        raise NoisyGpuError(
            f"{disturbed:.0%} of repeated latency measurements differ far more than noise does: something else runs on "
            "this GPU; probe again while nothing does."
        )


def _label_page(sampler: Sampler, reference: Reference, addresses: Ints) -> Ints:
    """Ball of every granule at `addresses`, -1 where it stays open after `_MAX_PAGE_PASSES`."""
    prints = sampler.fingerprints(addresses, reference.sms, passes=_PAGE_PASSES)
    while True:
        # Drift is what is left after the slices; which those are is clear enough for that before it is for good.
        calm = prints.without_drift(reference.balls.expected(prints.mean()))
        labels = reference.balls.nearest(calm.mean())
        if (labels >= 0).all() or prints.passes >= _MAX_PAGE_PASSES:
            return labels
        prints = prints.joined(sampler.fingerprints(addresses, reference.sms, passes=prints.passes))
