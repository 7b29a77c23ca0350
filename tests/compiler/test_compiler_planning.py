"""Scratch memory: nothing that is alive at the same step overlaps, and little is wasted."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from missile.compiler.package import Buffer, BufferKind, BytesArgument, KernelStep, ModelPackage, PointerArgument
from missile.compiler.planning import ALIGNMENT, alignments, pack, plan_scratch


@st.composite
def buffers(draw: st.DrawFn) -> list[Buffer]:
    spans = draw(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 12)), max_size=25))
    return [
        Buffer(id=f"b{i}", kind=BufferKind.SCRATCH, nbytes=size, first=first, last=first + more)
        for i, (size, first, more) in enumerate(spans)
    ]


@given(buffers())
def test_live_buffers_never_overlap(chosen: list[Buffer]) -> None:
    plan = plan_scratch(chosen)
    for a, b in combinations(chosen, 2):
        if a.first <= b.last and b.first <= a.last:
            low, high = sorted((a, b), key=lambda x: plan.offsets[x.id])
            assert plan.offsets[low.id] + max(low.nbytes, 1) <= plan.offsets[high.id]


@given(buffers())
def test_plan_is_aligned_bounded_and_reproducible(chosen: list[Buffer]) -> None:
    plan = plan_scratch(chosen)
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets.values())
    assert all(plan.offsets[b.id] + b.nbytes <= plan.nbytes for b in chosen)
    assert plan.nbytes <= pack(chosen).nbytes
    assert plan_scratch(chosen) == plan
    aligned = {b.id: max(1, -(-b.nbytes // ALIGNMENT)) * ALIGNMENT for b in chosen}
    busiest = max((sum(aligned[b.id] for b in chosen if b.first <= s <= b.last) for s in range(45)), default=0)
    assert plan.nbytes >= busiest


def test_chain_needs_memory_for_two() -> None:
    chain = [Buffer(id=str(i), kind=BufferKind.SCRATCH, nbytes=1000, first=i, last=i + 1) for i in range(9)]
    assert plan_scratch(chain).nbytes == 2 * 1024


@given(buffers())
def test_packed_buffers_are_disjoint(chosen: list[Buffer]) -> None:
    plan = pack(chosen)
    ends = [0, *(plan.offsets[b.id] + b.nbytes for b in chosen)]
    assert all(plan.offsets[b.id] >= end for b, end in zip(chosen, ends, strict=False))


def test_arguments_are_aligned_as_their_worst_launch_is(package: ModelPackage) -> None:
    def step(kernel: str, *arguments: PointerArgument | BytesArgument) -> KernelStep:
        return KernelStep(kernel=kernel, grid=(1, 1, 1), block=(32, 1, 1), arguments=arguments)

    number = BytesArgument(value="00")
    steps = (
        step("a", PointerArgument(buffer="x"), PointerArgument(buffer="x", offset=96), number),
        step("b", PointerArgument(buffer="x", offset=1536)),
        step("a", PointerArgument(buffer="x", offset=256), PointerArgument(buffer="y"), number),
    )
    assert alignments(package.model_copy(update={"steps": steps})) == {"a": (256, 32, 1), "b": (512,)}
