"""BE work in short segments: whose is next, and on which lane. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from missile.runtime.policies.interface import Action, Advance, Preempt, Snapshot, Start, TenantBrief

__all__ = ["NEVER", "Filling", "Floor"]

NEVER = 1 << 62  # ns, later than any clock

_IN_FLIGHT = 2  # segments: one that runs and one that follows it without the host
_CATCH_UP_NS = 1e6
_REMEMBERED_NS = 20e6  # a promise of a rate holds over about this time


class Filling:
    """Keeps the GPU busy with BE tenants' segments, each tenant getting GPU time by its weight.

    numbers: the BE tenants. alone: by tenant, the lane while no LS request is there. beside: that while one is, None for
    keeping off. Tenants that can be preempted have one request on the GPU at a time, others may have two.
    """

    def __init__(
        self, numbers: Sequence[int], weights: Sequence[float], alone: Sequence[int], beside: Sequence[int | None]
    ) -> None:
        self._numbers = tuple(numbers)
        self._weights = tuple(weights)
        self._alone = tuple(alone)
        self._beside = tuple(beside)
        self._lengths: list[tuple[float, ...]] = [(1.0,)] * len(self._numbers)
        self._preemptible = [False] * len(self._numbers)
        self._served = [0.0] * len(self._numbers)  # ns of GPU time over weight
        self._clock = 0.0  # what the tenant whose turn it last was had been served
        self._window = max(_IN_FLIGHT, len(self._numbers))

    def brief(self, tenants: Sequence[TenantBrief], *, preempt: bool) -> None:
        for place, number in enumerate(self._numbers):
            self._lengths[place] = tuple(segment.expected_ns for segment in tenants[number].segments)
            self._preemptible[place] = preempt and tenants[number].preemptible

    def start_whole(self, snapshot: Snapshot) -> list[Action]:
        """Whole requests at once, for tenants that are not cut because there is no LS tenant."""
        return [
            Start(number, lane)
            for number, lane in zip(self._numbers, self._alone, strict=True)
            for _ in range(min(snapshot.queued[number], snapshot.depth[number] - snapshot.running[number]))
        ]

    def make_way(self, snapshot: Snapshot) -> list[Preempt]:
        """An LS request has come: stop what can be stopped. `fill` then waits until it has left."""
        return [
            Preempt(number)
            for place, number in enumerate(self._numbers)
            if self._preemptible[place] and snapshot.pending[number] and self._alone[place] != self._beside[place]
        ]

    def fill(self, snapshot: Snapshot, *, beside_ls: bool, stopped: Collection[int] = ()) -> list[Action]:
        """Segments to give the GPU now. stopped: tenants that were preempted just now."""
        lanes = self._beside if beside_ls else self._alone
        views = [
            _View(place, number, lane, snapshot, idle_first=self._preemptible[place])
            for place, (number, lane) in enumerate(zip(self._numbers, lanes, strict=True))
            if lane is not None and not snapshot.stopping[number] and number not in stopped
        ]
        room = self._window - sum(snapshot.pending[number] for number in self._numbers)
        actions: list[Action] = []
        while room > 0 and (able := [view for view in views if view.can_go_on()]):
            view = min(able, key=lambda candidate: self._turn(candidate))
            lengths = self._lengths[view.place]
            self._clock = self._turn(view)
            self._served[view.place] = self._clock + lengths[view.launched] / self._weights[view.place]
            actions.append(Advance(view.number, view.lane))
            view.advance(len(lengths))
            room -= 1
        return actions

    def expected_ns(self, snapshot: Snapshot, actions: Sequence[Action]) -> float:
        """How long the segments that `actions`, an answer to `snapshot`, start would take alone on all SMs."""
        total = 0.0
        at: dict[int, int] = {}
        for action in actions:
            if isinstance(action, Advance):
                lengths = self._lengths[self._numbers.index(action.tenant)]
                segment = at.get(action.tenant, snapshot.launched[action.tenant])
                total += lengths[segment]
                at[action.tenant] = (segment + 1) % len(lengths)
        return total

    def _turn(self, view: _View) -> float:
        """What the tenant was served; one that had nothing to do for a while does not catch up more than a little."""
        served = self._served[view.place]
        return served if view.pending else max(served, self._clock - _CATCH_UP_NS)


class _View:
    """A tenant's progress in a snapshot, and what this answer to it adds."""

    __slots__ = ("idle_first", "lane", "launched", "number", "openable", "pending", "place")

    def __init__(self, place: int, number: int, lane: int, snapshot: Snapshot, *, idle_first: bool) -> None:
        self.place = place
        self.number = number
        self.lane = lane
        self.idle_first = idle_first
        self.launched = snapshot.launched[number]
        self.pending = snapshot.pending[number]
        self.openable = min(snapshot.queued[number], snapshot.depth[number] - snapshot.running[number])

    def can_go_on(self) -> bool:
        if self.launched:
            return True
        return self.openable > 0 and not (self.idle_first and self.pending)

    def advance(self, segments: int) -> None:
        if not self.launched:
            self.openable -= 1
        self.launched = (self.launched + 1) % segments
        self.pending += 1


class Floor:
    """Whether BE has had the least rate that it was promised. share: of its rate alone on all SMs, in [0, 1).

    Rates are counted over about 20 ms: what BE had before that is forgotten, and so is what it lacked.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._most = share * _REMEMBERED_NS
        self._owed = -self._most  # ns of work alone
        self._at = 0

    def owed_at(self, now: int) -> int:
        """When it will be owed work, if it gets none until then: `now`, later, or `NEVER`."""
        if not self._share:
            return NEVER
        self._update(now)
        return now if self._owed > 0.0 else now + int(-self._owed / self._share) + 1

    def gave(self, now: int, work_ns: float) -> None:
        """It was given segments that take `work_ns` alone."""
        if self._share:
            self._update(now)
            self._owed = max(self._owed - work_ns, -self._most)

    def _update(self, now: int) -> None:
        self._owed = min(self._owed + self._share * (now - self._at), self._most)
        self._at = now
