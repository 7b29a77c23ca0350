"""The parser: everything that Triton writes, and one clear sentence for what nobody knows."""

from __future__ import annotations

import pytest
from ptx_cases import INPUTS, source

from missile.compiler.ptx.parser import parse
from missile.compiler.ptx.syntax import Address, Declaration, Immediate, Label, Name, Other, Pair, Vector
from missile.errors import UnsupportedError

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"

EVERYTHING = (
    HEAD
    + """
	// .globl	kernel                  // -- Begin function kernel
.extern .shared .align 16 .b8 global_smem[];
.global .align 4 .b8 message[7] = {97, 115, 115, 101, 114, 116, 0};
.const .align 4 .f32 table[2] = {0f3F800000, 0f40000000};
.extern .func __assertfail(.param .b64 a0, .param .b64 a1);
.func  (.param .b32 result) helper(.param .b32 x)
{
	.reg .b32 %r<2>;
	ld.param.b32 %r1, [x];
	st.param.b32 [result], %r1;
	ret;
}
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .align 64 .b8 kernel_param_1[128],
	.param .u32 kernel_param_2
)
.reqntid 128, 1, 1
.minnctapersm 1
{
	.local .align 16 .b8 	__local_depot0[16];
	.reg .pred 	%p<3>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<5>;
	.loc	1 12 0                          // k.py:12:0
$L__func_begin0:
	.loc	1 13 24, function_name $L__info_string0, inlined_at 1 13 24
	/* a comment
	of two lines */
	setp.lt.s32 	%p1|%p2, %r1, -5;
	@!%p1 bra.uni 	$L__BB0_2;
	.pragma "nounroll";
	// begin inline asm
	{
		.reg .pred inner;
		.reg .b32 tmp;
		setp.eq.u32 inner, %r2, 0x1F;
		@inner st.shared.v2.b32 [ %r3 + 0 ], { %r4, %r5 };
	}
	// end inline asm
	ld.global.L1::evict_last.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + -16 ], %rd2;
	atom.global.gpu.acq_rel.cas.b32 %r1, [%rd1+8], %r2, %r3;
	cp.async.cg.shared.global.L2::128B [ %r3 + 0 ], [ %rd1 ], 0x10, %r4;
	fma.rn.f32 %r1, %r2, 0f3F800000, 0d3FF0000000000000;
	shfl.sync.bfly.b32 	%r6|%p1, %r5, 16, 31, -1;
	selp.b32 %r1, %r2, %r3, !%p1;
$L__BB0_2:
	call.uni (%r7), helper, (%r6);
	ret;
$L__tmp6:
}
	.file	1 "/some/where/k.py"
	.section	.debug_abbrev
	{
.b8 1                                   // Abbreviation Code
.b32 .debug_abbrev                      // Offset
	}
	.section	.debug_macinfo	{	}
"""
)


def test_everything_that_triton_writes_is_parsed() -> None:
    module = parse(EVERYTHING)
    assert module.version == (8, 7)
    assert module.target == "sm_90a"
    assert [function.name for function in module.functions] == ["__assertfail", "helper", "kernel"]
    assert module.entries == ("kernel",)
    assert [name for variable in module.variables for name, _ in variable.names] == ["global_smem", "message", "table"]
    assert [note.keyword for note in module.notes] == [".file", ".section", ".section"]
    kernel = module.functions[-1]
    assert [(p.nbytes, p.pointer) for p in kernel.parameters] == [(8, True), (128, False), (4, False)]
    flat = kernel.flat()
    assert [s.name for s in flat if isinstance(s, Label)] == ["$L__func_begin0", "$L__BB0_2", "$L__tmp6"]
    assert ("%rd", 5) in [name for s in flat if isinstance(s, Declaration) for name in s.names]
    assert sum(isinstance(s, Other) for s in flat) == 3
    instructions = {i.root: i for i in kernel.instructions()}
    load = instructions["ld"]
    assert load.parts == ("ld", "global", "L1::evict_last", "L2::cache_hint", "v4", "b32")
    values, address, policy = load.operands
    assert isinstance(values, Vector)
    assert len(values.items) == 4
    assert isinstance(address, Address)
    assert (address.base, address.offset) == ("%rd1", -16)
    assert isinstance(policy, Name)
    assert policy.text == "%rd2"
    assert isinstance(instructions["shfl"].operands[0], Pair)
    assert isinstance(instructions["selp"].operands[3], Name)
    assert instructions["selp"].operands[3].negated
    guard = instructions["bra"].guard
    assert guard is not None
    assert (guard.text, guard.negated) == ("%p1", True)
    constants = [o for o in instructions["fma"].operands if isinstance(o, Immediate)]
    assert [c.bits for c in constants] == [0x3F800000, 0x3FF0000000000000]


@pytest.mark.parametrize("name", INPUTS)
def test_places_in_the_source_are_exact(name: str) -> None:
    text = source(name)
    module = parse(text, name)
    (function,) = module.functions
    for instruction in function.instructions():
        piece = text[instruction.start : instruction.end]
        assert piece.endswith(";")
        assert instruction.opcode in piece
        assert text.count("\n", 0, instruction.start) + 1 == instruction.line
        for operand in instruction.operands:
            if isinstance(operand, Address):
                assert text[operand.start] == "["
                assert text[operand.end - 1] == "]"
                assert str(operand.base) in text[operand.start : operand.end]
    # What is not of an instruction is nothing that could be one.
    rest = text
    for instruction in reversed(function.instructions()):
        rest = rest[: instruction.start] + rest[instruction.end :]
    assert "ld.global" not in rest
    assert "st.global" not in rest


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (".version 6.4\n.target sm_70\n", "is PTX version 6.4; 7.0 to 9.0 are known"),
        (".version 12.1\n.target sm_90\n", "is PTX version 12.1"),
        (".version x\n", "version 'x', which is none"),
        (".version 8.7\n.target sm_90\n.address_size 32\n", "32-bit addresses"),
        (HEAD + ".visible .entry k() { ld.global.b32 %r1, [%rd1]", "ends in the middle"),
        (HEAD + ".visible .entry k() { # }", "line 4 of its PTX has '#'"),
        (HEAD + ".visible .entry k() { .surprise 3; ret; }", "'k', line 4: its PTX has '.surprise'"),
        (HEAD + ".visible .entry k() { ts: .branchtargets a, b; ret; }", "through a table"),
        (HEAD + ".alias a, b;", "'.alias'"),
        ("", "ends in the middle"),
    ],
)
def test_what_is_not_known_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse(text, "k")
    assert says in str(caught.value)
    assert "'k'" in str(caught.value)
    assert "\n" not in str(caught.value)
