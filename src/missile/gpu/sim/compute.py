"""The SMs: which kernel's blocks are where, how fast each kernel goes, and when the next one ends. Pure of clocks and hosts.

Blocks are counted, not simulated one by one. A kernel holds room for some of its blocks and passes through them in waves;
room goes to pending blocks by priority, then by arrival, so a later kernel gets the SMs that the earlier ones leave over:
kernels share an SM only by turns (on an H200, small kernels next to large ones wait for whole SMs; docs/simulator.md).
Blocks that run are never displaced: a kernel of higher priority gets the room of a lower one's blocks as those end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from missile.gpu.sim.cost import UNITS_PER_SM, KernelCost
from missile.gpu.sim.sharing import Capacities, crowded_speed, placed_speed, speeds
from missile.gpu.sim.spec import GpuSpec

__all__ = ["Compute", "Running"]

_DONE_NS = 1e-3  # work that is less than this from its end has ended: above the rounding of times up to an hour


class Running:
    """One kernel launch, from its arrival on the GPU to its end.

    `left` of `total` ns of work remain (work is measured in time at full speed); `finish` is called when none does.
    """

    __slots__ = (
        "blocks", "cost", "finish", "gap", "handover", "held", "left", "order", "parts", "placed", "sms", "speed",
        "spread", "tail", "total", "waiting", "work",
    )  # fmt: skip

    def __init__(
        self, cost: KernelCost, order: tuple[int, int], parts: tuple[int, ...], sms: int, gap: float, noise: float
    ) -> None:
        self.cost = cost
        self.order = order
        self.parts = parts
        self.sms = sms
        self.gap = gap
        self.work = cost.solo_ns * noise
        self.total = self.left = self.work + gap
        self.blocks = 0  # for how many blocks it holds room
        self.held = [0] * len(parts)  # the same, by part
        self.spread = 0.0  # over how many SMs its blocks lie
        self.waiting = True  # has blocks that were not placed yet
        self.tail = 0.0  # what is left when its last wave starts
        self.placed = 0.0
        self.speed = 0.0
        self.handover = math.inf  # when blocks of lower priority will have made room
        self.finish: Callable[[float], None] = _nothing

    def blocks_left(self) -> int:
        """Blocks that have not ended."""
        return math.ceil(self.cost.blocks * self.left / self.total - 1e-9)

    def blocks_to_place(self) -> int:
        """Blocks that have not started: those that hold room run in waves, and of a wave all end together."""
        if not self.blocks:
            return self.blocks_left()
        waves = -(-self.cost.blocks // self.blocks)
        begun = math.floor((1.0 - self.left / self.total) * waves + 1e-9) + 1
        return max(self.cost.blocks - begun * self.blocks, 0)


def _nothing(_now: float) -> None:
    pass


class Compute:
    """All SMs of one GPU. `advance` to a time, change something, `settle`; `next_ns` says when to come back."""

    def __init__(self, spec: GpuSpec) -> None:
        self._capacities = Capacities.of(spec)
        self._running: list[Running] = []
        self._pending: list[Running] = []  # those with blocks to place, in the order of service
        self._arrivals = 0
        self._now = 0.0
        self.dirty = False  # something arrived since the last `settle`
        self._gone = False  # a kernel without a block has nothing left to do
        self.next_ns = math.inf
        self.busy_sm_ns = 0.0  # SM-time held by blocks so far
        self.divide((spec.sm.count,))

    @property
    def idle(self) -> bool:
        return not self._running

    @property
    def contended(self) -> bool:
        """Whether some blocks wait for room."""
        return bool(self._pending)

    def divide(self, sms: Sequence[int]) -> None:
        """Make the SMs disjoint parts of these sizes. Only while idle."""
        self._sms = tuple(sms)
        self._free = [count * UNITS_PER_SM for count in sms]
        self._all = sum(self._free)

    def launch_load(self, gap: float) -> float:
        """How much of the front end the running kernels keep busy: each one's gap over the time that it takes, summed."""
        load = 0.0
        for kernel in self._running:
            load += gap * kernel.speed / kernel.total
        return load

    def start(
        self, now: float, cost: KernelCost, parts: tuple[int, ...], *, priority: int = 0, gap: float = 0.0,
        noise: float = 1.0, turn: int | None = None,
    ) -> Running:  # fmt: skip
        """A kernel arrives at `now`, with `gap` ns of front-end time before its work. `settle` places it.

        turn: what `take_turn` gave when it was queued, where that was before.
        """
        self.advance(now)
        order = (-priority, self.take_turn() if turn is None else turn)
        kernel = Running(cost, order, parts, self._size(parts), gap, noise)
        self._running.append(kernel)
        self._enqueue(kernel)
        self.dirty = True
        return kernel

    def take_turn(self) -> int:
        """A place in the order of service, behind all that came before."""
        self._arrivals += 1
        return self._arrivals

    def _size(self, parts: tuple[int, ...]) -> int:
        return self._sms[parts[0]] if len(parts) == 1 else sum(self._sms[part] for part in parts)

    def _enqueue(self, kernel: Running) -> None:
        pending = self._pending
        position = len(pending)
        while position and pending[position - 1].order > kernel.order:
            position -= 1
        pending.insert(position, kernel)

    def advance(self, now: float) -> None:
        """Let the work go on until `now`, which is not beyond `next_ns` (rounding aside)."""
        elapsed = now - self._now
        if elapsed <= 0.0:
            return
        self._now = now
        self.busy_sm_ns += (self._all - sum(self._free)) / UNITS_PER_SM * elapsed
        for kernel in self._running:
            kernel.left -= elapsed * kernel.speed

    def curtail(self, now: float, kernel: Running) -> float:
        """Its blocks that have not started leave; those that run end, the last one a block's time from now.

        Returns the share of its work that is then left undone.
        """
        self.advance(now)
        if not kernel.waiting or kernel.left <= _DONE_NS:
            return 0.0
        running = min(kernel.tail, kernel.left) if kernel.blocks else 0.0
        undone = kernel.left - running
        kernel.left = running
        kernel.waiting = False
        self._pending.remove(kernel)
        self._gone = self._gone or not kernel.blocks
        self.dirty = True
        return undone / kernel.total

    def finished(self) -> list[Running]:
        """Take out the kernels that have ended and give their room back."""
        ended = [kernel for kernel in self._running if kernel.left <= _DONE_NS]
        for kernel in ended:
            self._running.remove(kernel)
            if kernel.waiting:
                self._pending.remove(kernel)
            self._release(kernel, kernel.blocks)
        return ended

    def settle(self) -> None:
        """Place what can be placed, set everybody's speed, and find the next time at which something changes."""
        self.dirty = False
        if self._pending:
            for kernel in [k for k in self._pending if k.blocks and k.left <= k.tail + _DONE_NS]:
                self._start_last_wave(kernel)
            self._hand_over()
            self._place()
        active = [kernel for kernel in self._running if kernel.blocks]
        if len(active) == 1 and not active[0].cost.colors:
            found = [active[0].placed]
        else:
            costs = [kernel.cost for kernel in active]
            room = [kernel.blocks * kernel.cost.units / UNITS_PER_SM for kernel in active]
            found = speeds(costs, self._among_others(active), room, self._capacities) if active else []
        crowded = len(self._pending) > 1
        wait = math.inf
        for kernel, speed in zip(active, found, strict=True):
            if kernel.gap:
                speed = kernel.total / (kernel.gap + kernel.work / speed)
            kernel.speed = speed
            until = kernel.left - kernel.tail if crowded and kernel.waiting else kernel.left
            wait = min(wait, until / speed)
        self.next_ns = self._now if self._gone else self._now + max(wait, 0.0)
        self._gone = False
        if crowded:
            self._plan_handover()

    def _among_others(self, active: Sequence[Running]) -> list[float]:
        """Speeds of kernels with blocks on SMs that others have blocks on, before anybody asks for memory."""
        found = []
        for kernel in active:
            around = 0.0
            for other in active:
                if other is not kernel:
                    around += self._met(kernel, other)
            speed = kernel.placed
            if around:
                speed = crowded_speed(kernel.cost, speed, kernel.blocks, kernel.spread, around, self._capacities)
            found.append(speed)
        return found

    def _met(self, kernel: Running, other: Running) -> float:
        """How many blocks of `other` are on an SM of `kernel`, on average. Blocks go where the fewest are: two kernels share
        SMs as far as there are too few for both."""
        if kernel.parts == other.parts:
            both = kernel.spread + other.spread - kernel.sms
            return max(both, 0.0) * other.blocks / (kernel.spread * other.spread)
        common = [part for part in kernel.parts if part in other.parts]
        if not common:
            return 0.0
        mine, theirs = (
            sum(held for part, held in zip(k.parts, k.held, strict=True) if part in common) / k.blocks * k.spread
            for k in (kernel, other)
        )
        both = mine + theirs - self._size(tuple(common))
        return max(both, 0.0) * other.blocks / (kernel.spread * other.spread)

    def _release(self, kernel: Running, blocks: int, among: tuple[int, ...] | None = None) -> None:
        """Give back the room of `blocks` blocks, in the parts `among` (None: in any)."""
        kernel.blocks -= blocks
        kernel.spread = min(kernel.spread, float(kernel.blocks))
        units = kernel.cost.units
        for place, part in enumerate(kernel.parts):
            if among is None or part in among:
                count = min(kernel.held[place], blocks)
                kernel.held[place] -= count
                self._free[part] += count * units
                blocks -= count

    def _start_last_wave(self, kernel: Running) -> None:
        """All its blocks are placed now. Who comes next gets the gaps that the last wave leaves."""
        kernel.waiting = False
        self._pending.remove(kernel)
        total, held = kernel.cost.blocks, kernel.blocks
        if gap := -total % held:
            self._release(kernel, gap)

    def _place(self) -> None:
        free = self._free
        still = []
        for kernel in self._pending:
            units = kernel.cost.units
            for part in kernel.parts:
                if free[part] >= units:
                    break
            else:
                still.append(kernel)
                continue
            blocks = kernel.cost.blocks
            unplaced = kernel.blocks_to_place()
            if unplaced > 0 and self._take_room(kernel, unplaced):
                self._set_pace(kernel)
                kernel.handover = math.inf
            # One that needs several waves stays, even when nothing of it is left out, until the last one starts.
            if kernel.blocks < blocks:
                still.append(kernel)
            else:
                kernel.waiting = False
        self._pending = still

    def _take_room(self, kernel: Running, wanted: int) -> int:
        """Give `kernel` room for up to `wanted` more blocks, from its parts in proportion to what is free. How many."""
        units = kernel.cost.units
        fits = [self._free[part] // units for part in kernel.parts]
        room = sum(fits)
        if not room:
            return 0
        given = wanted = min(wanted, room)
        kernel.spread = min(kernel.spread + min(self._open_sms(kernel), float(given)), float(kernel.sms))
        for place, part in enumerate(kernel.parts):
            count = -(-wanted * fits[place] // room)  # what rounding leaves over is the last parts' loss
            room -= fits[place]
            wanted -= count
            kernel.held[place] += count
            self._free[part] -= count * units
            if not wanted:
                break
        kernel.blocks += given
        return given

    def _open_sms(self, kernel: Running) -> float:
        """On how many of its SMs there is room for a block of `kernel`. Where others have blocks, what is free is what some
        of those would take: blocks that need a whole SM each leave whole SMs."""
        free = sum(self._free[part] for part in kernel.parts)
        grain = kernel.cost.units
        for other in self._running:
            if other.blocks and other is not kernel and other.cost.units > grain:
                grain = other.cost.units
        return min(max(free // grain, 1), kernel.sms)

    def _set_pace(self, kernel: Running) -> None:
        kernel.placed = placed_speed(kernel.cost, kernel.blocks, kernel.spread, self._capacities)
        kernel.tail = kernel.total / -(-kernel.cost.blocks // kernel.blocks) if kernel.blocks else 0.0
        if not kernel.blocks:
            kernel.speed = 0.0

    def _donors(self, kernel: Running) -> list[tuple[Running, int]]:
        """Kernels of lower priority with blocks still to come, whose running blocks' room goes to `kernel` first.

        With how many blocks each has where `kernel` may run.
        """
        level = kernel.order[0]
        donors = []
        for other in self._pending:
            if other.order[0] > level and other.blocks:
                there = sum(held for part, held in zip(other.parts, other.held, strict=True) if part in kernel.parts)
                if there:
                    donors.append((other, there))
        return donors

    def _plan_handover(self) -> None:
        """When will blocks of lower priority have made room for each pending kernel of a higher one?

        Blocks of a long kernel end evenly spread over the time that one takes. A time once planned stands.
        """
        lowest = self._pending[-1].order[0]
        for kernel in self._pending:
            if kernel.order[0] == lowest:
                return
            wanted = self._wanted(kernel)
            if kernel.handover == math.inf and wanted > 0:
                per_ns, longest = 0.0, 0.0
                for donor, blocks in self._donors(kernel):
                    block_ns = donor.tail / donor.speed
                    per_ns += blocks * donor.cost.units / block_ns
                    longest = max(longest, block_ns)
                if per_ns:
                    kernel.handover = self._now + min(wanted / per_ns, longest)
            self.next_ns = min(self.next_ns, kernel.handover)

    def _wanted(self, kernel: Running) -> int:
        """Room that `kernel` lacks, in units."""
        return kernel.blocks_to_place() * kernel.cost.units

    def _hand_over(self) -> None:
        for kernel in self._pending:
            if kernel.handover > self._now + _DONE_NS:
                continue
            kernel.handover = math.inf
            wanted = self._wanted(kernel)
            for donor, blocks in self._donors(kernel):
                if wanted <= 0:
                    break
                given = min(-(-wanted // donor.cost.units), blocks)
                self._release(donor, given, kernel.parts)
                self._set_pace(donor)
                wanted -= given * donor.cost.units
