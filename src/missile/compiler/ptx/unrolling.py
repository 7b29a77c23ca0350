"""Loops that are written out: a copy of the body for each iteration, no jumps.

ptxas does this itself with loops of known length, up to a size that a body with translations is soon beyond. In a copy it is
known how far a window's members have come, so that they need no counter, and those in one unit of memory share an address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from missile.compiler.ptx.blocks import Blocks
from missile.compiler.ptx.edits import Edit, apply
from missile.compiler.ptx.loops import Loop
from missile.compiler.ptx.syntax import Declaration, Function, Label
from missile.compiler.ptx.windows import Member

__all__ = ["MOST_STATEMENTS", "Unrolled", "unrolled"]

MOST_STATEMENTS = 2700
"""Of all copies. Of the loops of twelve models' plain kernels, the longest that ptxas 13.0 writes out itself has 2619."""


@dataclass(slots=True)
class Unrolled:
    """A loop that is written out. start, end: of its body in the source, without the jump, which ends at `behind`.

    edits: for each copy those that are its own.
    """

    loop: Loop
    start: int
    end: int
    behind: int
    edits: Sequence[list[Edit]] = field(default_factory=list)

    def uses(self, members: Sequence[Member]) -> Iterator[tuple[Member, int]]:
        """Which of `members`, all of this loop, may be made in which copies, in order."""
        for index in range(self.loop.count):
            for member in members:
                if self.loop.visits[member.access][index].made:
                    yield member, index

    def unused(self, members: Sequence[Member]) -> Iterator[tuple[Member, int]]:
        """The others."""
        made = {(id(member), index) for member, index in self.uses(members)}
        return ((m, i) for i in range(self.loop.count) for m in members if (id(m), i) not in made)

    def written(self, source: str, edits: Iterable[Edit]) -> list[Edit]:
        """`edits`, of all the `source`, with one that writes the copies in place of those in the loop."""
        common: list[Edit] = []
        others: list[Edit] = []
        for edit in edits:
            (common if self.start <= edit.start < self.end else others).append(edit)
        copies = (apply(source, [*common, *own], self.start, self.end) for own in self.edits)
        return [*others, Edit(self.start, self.behind, "".join(copies))]


def unrolled(function: Function, blocks: Blocks, loops: Iterable[Loop], most: int) -> Mapping[int, Unrolled]:
    """Those of `loops` that are written out, by their blocks: all that touch memory in copies of at most `most` statements,
    and declare nothing."""
    declared = [statement.start for statement in function.body or () if isinstance(statement, Declaration | Label)]
    found = {}
    for loop in loops:
        units = blocks.units_of(loop.block)
        single = not any(units[0].start < start < units[-1].end for start in declared)
        if loop.visits and single and loop.count * len(units) <= most:
            copies: Sequence[list[Edit]] = [[] for _ in range(loop.count)]
            found[loop.block] = Unrolled(loop, units[0].start, units[-1].start, units[-1].end, copies)
    return found
