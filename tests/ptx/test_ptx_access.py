"""Which accesses are global, and which kernels can't be colored."""

from __future__ import annotations

import pytest
from ptx_cases import INPUTS, source

from missile.compiler.ptx.access import AccessKind, global_accesses
from missile.compiler.ptx.flow import Flow, Origin
from missile.compiler.ptx.parser import parse
from missile.errors import UnsupportedError

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n.global .b32 own;\n"


def accesses(body: str, declarations: str = "") -> list[tuple[AccessKind, int]]:
    module = parse(
        f"{HEAD}{declarations}.visible .entry k(.param .u64 p) {{ .reg .b64 %rd<9>; .reg .b32 %r<9>; .reg .pred %p<3>;"
        f"ld.param.u64 %rd1, [p];\n{body}\nret; }}"
    )
    return [(a.kind, a.nbytes) for a in global_accesses(module, module.functions[-1])]


@pytest.mark.parametrize(
    ("instruction", "kind", "nbytes"),
    [
        ("ld.global.b32 %r1, [%rd1];", AccessKind.LOAD, 4),
        ("@%p1 ld.global.nc.L1::no_allocate.L2::128B.v4.f32 {%r1, %r2, %r3, %r4}, [%rd1+16];", AccessKind.LOAD, 16),
        (
            "ld.relaxed.gpu.global.L1::evict_first.L2::cache_hint.v2.b64 {%rd2, %rd3}, [%rd1], %rd4;",
            AccessKind.LOAD,
            16,
        ),
        ("ld.volatile.global.u8 %r1, [%rd1];", AccessKind.LOAD, 1),
        ("ldu.global.u16 %r1, [%rd1];", AccessKind.LOAD, 2),
        ("st.global.cs.v2.b16 [%rd1], {%r1, %r2};", AccessKind.STORE, 4),
        ("st.release.gpu.global.b32 [%rd1], %r1;", AccessKind.STORE, 4),
        ("atom.global.acq_rel.gpu.add.noftz.f16x2 %r1, [%rd1], %r2;", AccessKind.ATOMIC, 4),
        ("atom.global.relaxed.gpu.cas.b128 %rd5, [%rd1], %rd6, %rd7;", AccessKind.ATOMIC, 16),
        ("red.global.gpu.relaxed.add.f32 [%rd1], %r1;", AccessKind.REDUCTION, 4),
        ("prefetch.global.L2 [%rd1];", AccessKind.PREFETCH, 0),
        ("cp.async.ca.shared.global.L2::cache_hint [%r1], [%rd1], 8, %r2, %rd3;", AccessKind.COPY, 8),
        ("cp.async.cg.shared.global [%r1+64], [%rd1+0], 0x10;", AccessKind.COPY, 16),
    ],
)
def test_global_accesses_are_found_with_their_sizes(instruction: str, kind: AccessKind, nbytes: int) -> None:
    assert accesses(instruction) == [(kind, nbytes)]


@pytest.mark.parametrize(
    "instruction",
    [
        "ld.shared.b32 %r1, [smem+4];",
        "st.shared::cta.b32 [%r2], %r1;",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];",
        "mbarrier.init.shared::cta.b64 [%r1], 1;",
        "ld.global.b32 %r1, [own];",  # the module's own variable
        "mov.b32 %r1, smem; cvt.u64.u32 %rd2, %r1; cvta.shared.u64 %rd3, %rd2; st.b32 [%rd3], %r1;",
        "cp.async.wait_group 2; cp.async.commit_group; fence.proxy.async; bar.sync 0;",
        "wgmma.fence.sync.aligned; griddepcontrol.wait;",
        "createpolicy.fractional.L2::evict_first.b64 %rd2, 1.0;",
    ],
)
def test_memory_of_the_block_is_left_alone(instruction: str) -> None:
    assert accesses(instruction) == []


@pytest.mark.parametrize(
    ("instruction", "says"),
    [
        (
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
            "[%r1], [%rd1, {%r2, %r3}], [%r4];",
            "TMA",
        ),
        ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], %r2, [%r3];", "TMA"),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r1], %r2;", "TMA"),
        ("tensormap.replace.tile.global_address.global.b1024.b64 [%rd1], %rd2;", "descriptor"),
        ("ld.b32 %r1, [%rd1];", "generic address"),
        ("atom.add.u32 %r1, [%rd1], 1;", "generic address"),
        ("multimem.red.global.add.f32 [%rd1], %r1;", "multicast"),
        ("prefetchu.L1 [%rd1];", "generic"),
        ("isspacep.global %p1, %rd1;", "which memory"),
        ("tex.1d.v4.f32.s32 {%r1, %r2, %r3, %r4}, [%rd1, {%r5}];", "textures"),
        ("discard.global.L2 [%rd1], 128;", "no access that is known"),
        ("brand_new.global.b32 %r1, [%rd1];", "no access that is known"),
        ("mov.u64 %rd2, own; add.u64 %rd2, %rd2, %rd1; st.global.b32 [%rd2], %r1;", "module's own memory"),
        ("ld.global.b32 %r1, [4096];", "absolute address"),
        ("call.uni (%r1), vprintf, (%rd1, %rd2);", "'vprintf'"),
        ("cp.async.cg.shared.global [%r1], [%rd1], %r2;", "not constant"),
        ("brx.idx %r1, table;", "table"),
    ],
)
def test_what_can_not_be_translated_is_refused_with_the_kernels_name(instruction: str, says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        accesses(instruction)
    message = str(caught.value)
    assert says in message
    assert message.startswith("Kernel 'k' can't be colored: ")
    assert message.count(".") >= 1
    assert "\n" not in message


@pytest.mark.parametrize("name", INPUTS)
def test_every_global_access_of_the_kernels_is_found(name: str) -> None:
    text = source(name)
    module = parse(text, name)
    found = global_accesses(module, module.functions[0])
    mentioned = [line for line in text.splitlines() if ".global" in line and ".param" not in line]
    assert len(found) == len(mentioned) > 0


def test_origins_follow_values_through_loops() -> None:
    module = parse(
        HEAD
        + """.visible .entry k(.param .u64 p) {
        .reg .b64 %rd<9>; .reg .b32 %r<9>; .reg .pred %p<2>;
        ld.param.u64 %rd1, [p];
        mov.u64 %rd2, %rd1;
        again: add.s64 %rd2, %rd2, %rd3;
        ld.global.u64 %rd4, [%rd2];
        mov.b32 %r1, smem;
        mov.u64 %rd3, %rd4;
        setp.ne.s64 %p1, %rd4, 0;
        @%p1 bra again;
        @%p1 mov.u64 %rd5, %rd4;
        ret; }"""
    )
    flow = Flow(module, module.functions[0])
    assert flow.origins("%rd2") == {Origin.PARAMETER, Origin.MEMORY}
    assert flow.origins("%r1") == {Origin.SHARED}
    assert flow.only_definition("%rd2") is None
    assert flow.only_definition("%rd5") is None  # written under a condition
    definition = flow.only_definition("%rd4")
    assert definition is not None
    assert definition.root == "ld"
    assert (flow.type_of("%rd8"), flow.type_of("%rd9"), flow.type_of("%p1")) == ("b64", "", "pred")
