"""`missile`: LS requests start at once; BE has all SMs while none is there, and leaves most of them as soon as one comes.

BE models are cut into short segments. While no LS request is queued or runs, segments go to a lane of the whole GPU; while
one does, to a lane that leaves the LS tenants their SMs. What is on the whole GPU then is preempted where that can be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from missile.errors import MisuseError, UnsupportedError
from missile.gpu.interface import GpuInfo, Level, Priority
from missile.runtime.policies._admission import Admission
from missile.runtime.policies._common import latency_first, part_of
from missile.runtime.policies._filling import NEVER, Filling, Floor
from missile.runtime.policies._rates import RateWatch
from missile.runtime.policies.interface import Action, Advance, Lane, Layout, Preempt, Snapshot, TenantBrief, Wake
from missile.runtime.tenant import Tenant

__all__ = ["MissilePolicy"]

_MOST_CHANGES = 100  # noted of one run


class MissilePolicy:
    """ls_share: share of the SMs that BE keeps off while an LS request is queued or runs, in (0, 1], rounded to what the
    GPU can split; 1.0: BE pauses then. be_min: the least rate that BE is promised, as a share of its rate alone on all SMs;
    both together are at most 1. pause: BE pauses beside LS requests unless it has fallen below be_min (off: it always runs
    on its side of the split then).
    ls_whole: LS requests run on the whole GPU before everything else (off: on the SMs kept free for them).
    elastic: BE uses all SMs while there is no LS request (off: never more than its side of the split).
    preempt: stop BE kernels that look at a flag when an LS request comes. colors: whether tenants' memory should be
    separated, where the roster can be. copies: whether copies should be scheduled, where the stage can.
    admission: turn away LS requests that can't meet their objective any more.
    segment_us: how long a BE segment takes alone; two are on the GPU at a time. linger_us: how long BE keeps off after the
    last LS request has ended. queue_limit: requests of an LS tenant without an objective that may wait.
    arm_us: a BE that pauses is given its next segments so long before the LS requests there should have ended, and the GPU
    begins them when they have (0: only after the host has seen that). Another LS request that arrives meanwhile makes them
    leave. lend: a BE that pauses does not while every LS request there is expected to end within so large a share of its
    objective, at its usual speed: BE goes on beside them, on its side of the split (on all SMs where ls_share is 1); in
    [0, 1], 0: never. patience_us: BE work is not stopped that ends by itself within so long. pause_above: LS requests/s, of
    all tenants together, above which BE pauses although pause is off (0: never), until they come slower than 0.8 of that.
    stop_first: BE is told to leave before the LS request is launched (off: after).
    """

    name: ClassVar[str] = "missile"
    summary: ClassVar[str] = (
        "LS requests start at once; BE has all SMs while none is there, and leaves most of them as soon as one comes."
    )

    def __init__(
        self,
        ls_share: float = 0.5,
        be_min: float = 0.0,
        pause: float = True,
        ls_whole: float = True,
        elastic: float = True,
        preempt: float = True,
        colors: float = False,
        copies: float = True,
        admission: float = True,
        segment_us: float = 80.0,
        linger_us: float = 0.0,
        queue_limit: float = 256,
        arm_us: float = 150.0,
        lend: float = 0.0,
        patience_us: float = 0.0,
        pause_above: float = 0.0,
        stop_first: float = False,
    ) -> None:
        if not 0.0 < ls_share <= 1.0:
            raise MisuseError(f"Policy 'missile': ls_share must be above 0 and at most 1, not {ls_share:g}.")
        if not 0.0 <= be_min < 1.0:
            raise MisuseError(f"Policy 'missile': be_min must be at least 0 and below 1, not {be_min:g}.")
        if not 0.0 <= lend <= 1.0:
            raise MisuseError(f"Policy 'missile': lend must be at least 0 and at most 1, not {lend:g}.")
        if ls_share + be_min > 1.0 + 1e-9:
            raise MisuseError(
                f"Policy 'missile': ls_share={ls_share:g} and be_min={be_min:g} promise more than the whole GPU."
            )
        for name, value, least in (
            ("segment_us", segment_us, 0.0),
            ("linger_us", linger_us, 0.0),
            ("queue_limit", queue_limit, 1.0),
            ("arm_us", arm_us, 0.0),
            ("patience_us", patience_us, 0.0),
            ("pause_above", pause_above, 0.0),
        ):
            if not least <= value < float("inf"):
                raise MisuseError(f"Policy 'missile': {name} must be at least {least:g}, not {value:g}.")
        self.ls_share, self.be_min, self.pause = ls_share, be_min, bool(pause)
        self.ls_whole, self.elastic, self.preempt = bool(ls_whole), bool(elastic), bool(preempt)
        self.colors, self.copies, self.admission = bool(colors), bool(copies), bool(admission)
        self._always_pauses = self._pauses = self.elastic and (self.pause or ls_share == 1.0)
        self._rates = RateWatch(0.0 if self._pauses or not self.elastic else pause_above)
        self.changes: list[tuple[int, str]] = []
        self._segment_ns, self._linger_ns = segment_us * 1e3, int(linger_us * 1e3)
        self._queue_limit = int(queue_limit)
        self._lend, self._patience_ns, self._stop_first = lend, patience_us * 1e3, bool(stop_first)
        # Beside LS requests, or when it lingers, BE has nothing to wait for at their end.
        self._arm_ns = int(arm_us * 1e3) if not linger_us else 0
        self._ls: tuple[int, ...] = ()
        self._gates: tuple[Admission, ...] = ()
        self._be = Filling((), (), (), ())
        self._floor = Floor(0.0)
        self._keep_off_until = 0
        self._ls_was_there = False
        self._armed = False  # BE has segments on the GPU that begin when the LS requests there have ended
        self._spared = False  # BE has segments on the GPU that were let go on beside the LS requests there
        self._lent = False  # BE runs beside the LS requests there because they can afford it

    def setup(self, tenants: Sequence[Tenant], info: GpuInfo) -> Layout:
        if info.level < Level.PRIORITIES:
            raise UnsupportedError(f"Policy 'missile' needs stream priorities, which {info.name} does not have.")
        order = latency_first(tenants)
        self._ls = tuple(i for i in order if tenants[i].latency_sensitive)
        be = tuple(i for i in order if not tenants[i].latency_sensitive)
        runs_beside = not self._pauses or self.be_min > 0.0 or self._lend > 0.0
        split = bool(self._ls) and bool(be) and runs_beside and self.ls_share < 1.0
        if split and info.level < Level.PARTITIONS:
            raise UnsupportedError(
                f"Policy 'missile' needs SM partitions, which {info.name} does not have; when BE pauses it needs none."
            )
        kept = part_of(self.ls_share, info) if split else info.sms
        lanes: list[Lane] = []
        ls_part = 0 if split and not self.ls_whole else None
        where = "all SMs" if ls_part is None else f"{kept} SMs"
        gates = []
        for number in self._ls:
            limit = self._queue_limit
            gates.append(Admission(number, tenants[number], len(lanes), queue_limit=limit, refuses=self.admission))
            lanes.append(Lane(f"high-priority stream of {tenants[number].name}, {where}", Priority.HIGH, ls_part))
        self._gates = tuple(gates)
        alone: list[int] = []
        beside: list[int | None] = []
        for number in be:
            name = tenants[number].name
            beside.append(len(lanes) if split or self._lend else None)
            if split:
                # LS blocks may be on these SMs too: what was promised is not for what they leave over.
                priority = Priority.HIGH if self.be_min else Priority.LOW
                lanes.append(Lane(f"stream of {name} on {info.sms - kept} SMs", priority, 1))
            if split and not self.elastic:
                alone.append(len(lanes) - 1)
            else:
                alone.append(len(lanes))
                lanes.append(Lane(f"stream of {name}, all SMs"))
        stays = split and not self.elastic
        self._be = Filling(be, [tenants[i].weight for i in be], alone, beside, stays=stays)
        self._floor = Floor(self.be_min)
        if not self._ls:
            return Layout(tuple(lanes))
        return Layout(
            tuple(lanes),
            (kept,) if split else (),
            tuple(None if tenant.latency_sensitive else self._segment_ns for tenant in tenants),
        )

    def brief(self, tenants: Sequence[TenantBrief]) -> None:
        for number, gate in zip(self._ls, self._gates, strict=True):
            gate.brief(tenants[number])
        self._be.brief(tenants, preempt=self.preempt)

    @property
    def lends(self) -> bool:
        """Whether BE may run beside LS requests that can afford it."""
        return self._lend > 0.0 and self._pauses

    @property
    def lending(self) -> bool:
        """Whether it did so by the last decision."""
        return self._lent

    def decide(self, snapshot: Snapshot) -> Sequence[Action]:
        if not self._ls:
            return self._be.start_whole(snapshot)
        actions: list[Action] = []
        now = snapshot.now_ns
        there = arrived = False
        if self._patience_ns:
            self._be.watch(snapshot)
        for number, gate in zip(self._ls, self._gates, strict=True):
            queued, running = snapshot.queued[number], snapshot.running[number]
            there = there or queued > 0 or running > 0
            arrived = arrived or queued > 0
            if queued or running != gate.running:
                actions += gate.starts(snapshot)
        if there:
            self._keep_off_until = now + self._linger_ns
            if self._rates.ask(now, sum(gate.taken for gate in self._gates)):
                self._change(now)
        elif now < self._keep_off_until:
            there = True
            actions.append(Wake(self._keep_off_until))
        lends = there and self._lends(snapshot)
        stopped: list[int] = []
        if there and not lends and self._is_in_the_way(arrived):
            stops = self._make_way(snapshot)
            stopped = [stop.tenant for stop in stops]
            place = 0 if self._stop_first else len(actions)  # LS kernels wait for the SMs that this frees
            actions[place:place] = stops
        self._ls_was_there, self._lent = there, lends
        self._armed, self._spared = self._armed and there, self._spared and there
        if there and self._pauses and not lends and (owed_at := self._floor.owed_at(now)) > now:
            if owed_at < NEVER:
                actions.append(Wake(owed_at))
            return self._arm(snapshot, actions, stopped) if self._arm_ns else actions
        segment = self._be.fill(snapshot, beside_ls=there, stopped=stopped)
        return self._give(now, segment, actions)

    def _lends(self, snapshot: Snapshot) -> bool:
        """Whether the LS requests there can afford BE beside them."""
        return (
            bool(self._lend) and self._pauses and all(gate.all_end_within(snapshot, self._lend) for gate in self._gates)
        )

    def _is_in_the_way(self, arrived: bool) -> bool:
        """Whether what BE has on the GPU should be stopped for the LS requests there. arrived: one of them just now."""
        return not self._ls_was_there or self._lent or ((self._armed or self._spared) and arrived)

    def _change(self, now: int) -> None:
        """Another plan for the rate at which LS requests come now: its lanes are there."""
        self._pauses = self._always_pauses or self._rates.high
        what = "BE pauses beside LS requests" if self._pauses else "BE runs beside LS requests again"
        if len(self.changes) < _MOST_CHANGES:
            self.changes.append((now, f"{what}: these come at {self._rates.per_s:.0f}/s"))

    def _make_way(self, snapshot: Snapshot) -> list[Preempt]:
        """Stop what BE has on the GPU, unless it ends soon."""
        stops = self._be.make_way(snapshot, self._patience_ns, begun=not self._armed)
        # What was armed and is let be goes on beside the request that has come, and that one's successors are asked again.
        self._spared = self._pauses and not stops and self._be.is_stoppable(snapshot)
        self._armed = self._armed and self._spared
        return stops

    def _arm(self, snapshot: Snapshot, actions: list[Action], stopped: Sequence[int]) -> list[Action]:
        """Give BE segments that begin behind the LS requests, when these are about to end."""
        now = snapshot.now_ns
        at = max(gate.ends_at() for gate in self._gates) - self._arm_ns
        if at > now:
            actions.append(Wake(int(at)))
            return actions
        running = tuple(number for number, gate in zip(self._ls, self._gates, strict=True) if gate.running)
        segment = self._be.fill(snapshot, beside_ls=False, stopped=stopped, after=running)
        self._armed = self._armed or segment is not None
        return self._give(now, segment, actions)

    def _give(self, now: int, segment: Advance | None, actions: list[Action]) -> list[Action]:
        self._floor.gave(now, self._be.work_ns)
        if segment is not None:
            actions.append(segment)
            if not self._be.is_full:
                actions.append(Wake(now))
        return actions
