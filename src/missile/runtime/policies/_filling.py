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
    keeping off. Tenants that can be preempted have one request on the GPU at a time, others may have two. stays: nobody is
    stopped.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        weights: Sequence[float],
        alone: Sequence[int],
        beside: Sequence[int | None],
        *,
        stays: bool = False,
    ) -> None:
        self._numbers = tuple(numbers)
        self._weights = tuple(weights)
        self._alone = tuple(alone)
        self._beside = tuple(beside)
        self._stays = stays
        self._lengths: list[tuple[float, ...]] = [(1.0,)] * len(self._numbers)
        self._preemptible = [False] * len(self._numbers)
        self._exclusive: tuple[int, ...] = ()
        self._served = [0.0] * len(self._numbers)  # ns of GPU time over weight
        self._given = [0] * len(self._numbers)  # segments of the open request, as far as `fill` knows
        self._begun = [0] * len(self._numbers)  # when what is first on the GPU began to run, as far as can be told
        self._was_pending = [0] * len(self._numbers)
        self._clock = 0.0  # what the tenant whose turn it last was had been served
        self._window = max(_IN_FLIGHT, len(self._numbers))
        self.work_ns = (
            0.0  # how long what `fill` gave last takes alone on all SMs, less what was not had of former work
        )
        self.is_full = False  # whether there is no room for another one after it

    def brief(self, tenants: Sequence[TenantBrief], *, preempt: bool) -> None:
        for place, number in enumerate(self._numbers):
            self._lengths[place] = tuple(segment.expected_ns for segment in tenants[number].segments)
            self._preemptible[place] = preempt and tenants[number].preemptible
        self._exclusive = tuple(number for number in self._numbers if tenants[number].exclusive)

    def start_whole(self, snapshot: Snapshot) -> list[Action]:
        """Whole requests at once, for tenants that are not cut because there is no LS tenant."""
        return [
            Start(number, lane)
            for number, lane in zip(self._numbers, self._alone, strict=True)
            for _ in range(min(snapshot.queued[number], snapshot.depth[number] - snapshot.running[number]))
        ]

    def watch(self, snapshot: Snapshot) -> None:
        """Note what the GPU has finished since; `make_way` and its patience go by that."""
        for place, number in enumerate(self._numbers):
            pending = snapshot.pending[number]
            if pending < self._was_pending[place]:
                self._begun[place] = snapshot.now_ns
            self._was_pending[place] = pending

    def make_way(self, snapshot: Snapshot, patience_ns: float = 0.0, *, begun: bool = True) -> list[Preempt]:
        """An LS request has come: stop what can be stopped and would not end by itself within `patience_ns`. `fill` then
        waits until it has left. begun: it runs; else it waits for LS requests."""
        return [
            Preempt(number)
            for place, number in enumerate(self._numbers)
            if self._is_stoppable(place, snapshot)
            and (not patience_ns or self._left_ns(place, snapshot, begun) > patience_ns)
        ]

    def is_stoppable(self, snapshot: Snapshot) -> bool:
        """Whether BE has something on the GPU that could be stopped."""
        return any(self._is_stoppable(place, snapshot) for place in range(len(self._numbers)))

    def _is_stoppable(self, place: int, snapshot: Snapshot) -> bool:
        number = self._numbers[place]
        return (
            self._preemptible[place]
            and snapshot.pending[number] > 0
            and not snapshot.stopping[number]
            and not self._stays
        )

    def _left_ns(self, place: int, snapshot: Snapshot, begun: bool) -> float:
        number, lengths = self._numbers[place], self._lengths[place]
        pending = snapshot.pending[number]
        first = snapshot.launched[number] - pending
        left = sum(lengths[(first + index) % len(lengths)] for index in range(pending))
        if not begun:
            return left
        return left - min(float(snapshot.now_ns - self._begun[place]), lengths[first % len(lengths)])

    def fill(
        self,
        snapshot: Snapshot,
        *,
        beside_ls: bool,
        stopped: Collection[int] = (),
        after: tuple[int, ...] = (),
    ) -> Advance | None:
        """The segment to give the GPU next, or None; `work_ns` and `is_full` are about it.

        One at a time, because an LS request that arrives meanwhile should not wait for two. stopped: tenants that were
        preempted just now. after: LS tenants whose requests it comes behind.
        """
        self.work_ns = 0.0
        pending = snapshot.pending
        room = self._window
        for number in self._numbers:
            room -= pending[number]
        if room <= 0:
            return None
        opened = next((number for number in self._exclusive if snapshot.launched[number]), None)
        lanes = self._beside if beside_ls else self._alone
        chosen, least = -1, 0.0
        for place, number in enumerate(self._numbers):
            if lanes[place] is None or snapshot.stopping[number] or number in stopped:
                continue
            if opened is not None and number != opened and number in self._exclusive:
                continue
            if self._preemptible[place] and snapshot.launched[number] != self._given[place]:
                self._take_back(place, snapshot.launched[number])
            if not snapshot.launched[number] and not self._may_open(place, number, snapshot):
                continue
            served = self._served[place]
            if not pending[number]:  # one that had nothing to do for a while does not catch up more than a little
                served = max(served, self._clock - _CATCH_UP_NS)
            if chosen < 0 or served < least:
                chosen, least = place, served
        if chosen < 0:
            return None
        number, lane = self._numbers[chosen], lanes[chosen]
        if not pending[number]:
            self._begun[chosen] = snapshot.now_ns
        self.is_full = room == 1
        lengths, segment = self._lengths[chosen], snapshot.launched[number]
        self._given[chosen] = (segment + 1) % len(lengths)
        self.work_ns += lengths[segment]
        self._clock = least
        self._served[chosen] = least + lengths[segment] / self._weights[chosen]
        return None if lane is None else Advance(number, lane, 1, after)

    def _take_back(self, place: int, launched: int) -> None:
        """A preempted tenant's request is back at segment `launched`: what was given since then counts as not had, though
        some of the first segment may have been."""
        lengths = self._lengths[place]
        lost = sum(lengths[launched : self._given[place] or len(lengths)])
        self._given[place] = launched
        self._served[place] -= lost / self._weights[place]
        self.work_ns -= lost

    def _may_open(self, place: int, number: int, snapshot: Snapshot) -> bool:
        """Whether the tenant's next request may be started."""
        if not snapshot.queued[number] or snapshot.running[number] >= snapshot.depth[number]:
            return False
        return not (self._preemptible[place] and snapshot.pending[number])


class Floor:
    """Whether BE has had the least rate that it was promised. share: of its rate alone on all SMs, in [0, 1).

    Rates are counted over about 20 ms: what BE had before that is forgotten, and so is what it lacked.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._most = share * _REMEMBERED_NS
        self._owed = 0.0  # ns of work alone
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
