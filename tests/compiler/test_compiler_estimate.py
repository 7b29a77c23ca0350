"""Work counted from kernels' sources, on sources of the forms that Inductor writes."""

from __future__ import annotations

from missile.compiler.estimate import TensorArgument, estimate

POINTWISE = """
def triton_poi_fused_add_relu_0(in_ptr0, in_ptr1, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    xnumel = 1000
    xoffset = tl.program_id(0) * XBLOCK
    xindex = xoffset + tl.arange(0, XBLOCK)[:]
    tmp0 = tl.load(in_ptr0 + (x0), xmask)
    tmp1 = tl.load(in_ptr1 + (x1), xmask)
    tmp2 = tmp0 + tmp1
    tmp3 = triton_helpers.maximum(0, tmp2)
    tl.store(out_ptr0 + (x0), tmp3, xmask)
"""

REDUCTION = """
def triton_per_fused_mean_0(in_ptr0, out_ptr1, xnumel, r0_numel, XBLOCK : tl.constexpr):
    xnumel = 64
    r0_numel = 49
    R0_BLOCK: tl.constexpr = 64
    tmp0 = tl.load(in_ptr0 + (x0 + 64*r0_1), mask)
    tmp4 = tl.sum(tmp0, 1)
    tl.store(out_ptr1 + (x0), tmp4, xmask)
"""

PRODUCT = """
def triton_tem_fused_addmm_0(in_ptr0, arg_A, arg_B, out_ptr0):
    BLOCK_M : tl.constexpr = 16
    BLOCK_N : tl.constexpr = 64
    BLOCK_K : tl.constexpr = 128
    M = 128
    N = 512
    K = 256
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_TYPE)
        acc += tl.dot(a, b)
    tmp0 = tl.load(in_ptr0 + (idx_n))
    tl.store(out_ptr0 + (xindex), tmp1, mask)
"""

CONVOLUTION = """
def triton_tem_fused_convolution_0(arg_X, arg_W, out_ptr0):
    KERNEL_H : tl.constexpr = 3
    KERNEL_W : tl.constexpr = 3
    GROUPS : tl.constexpr = 1
    BLOCK_M : tl.constexpr = 32
    BLOCK_N : tl.constexpr = 32
    BATCH = 2
    IN_C = 64
    OUT_C = 128
    OUT_H = 14
    OUT_W = 14
        acc += tl.dot(matrix_x, matrix_w)
    tl.store(out_ptr0 + (xindex), acc, mask)
"""


def test_pointwise() -> None:
    tensors = [
        TensorArgument("in_ptr0", 2000, 2),
        TensorArgument("in_ptr1", 40, 2),
        TensorArgument("out_ptr0", 4000, 2),
    ]
    work = estimate(POINTWISE, tensors, (8, 1, 1))
    assert (work.read_bytes, work.write_bytes, work.footprint_bytes) == (2040, 2000, 4040)
    assert work.operations >= 2000
    assert not work.tensor_ops


def test_gather_reads_no_more_than_it_touches() -> None:
    table = [
        TensorArgument("in_ptr0", 1 << 30, 2),
        TensorArgument("in_ptr1", 2000, 2),
        TensorArgument("out_ptr0", 2000, 2),
    ]
    assert estimate(POINTWISE, table, (8, 1, 1)).read_bytes == 4000


def test_reduction_reads_its_whole_space_and_writes_little() -> None:
    tensors = [TensorArgument("in_ptr0", 64 * 49 * 2, 2), TensorArgument("out_ptr1", 64 * 2, 2)]
    work = estimate(REDUCTION, tensors, (1, 1, 1))
    assert (work.read_bytes, work.write_bytes) == (64 * 49 * 2, 128)


def test_matrix_product() -> None:
    tensors = [
        TensorArgument("in_ptr0", 1024, 2),
        TensorArgument("arg_A", 128 * 256 * 2, 2),
        TensorArgument("arg_B", 256 * 512 * 2, 2),
        TensorArgument("out_ptr0", 128 * 512 * 2, 2),
    ]
    work = estimate(PRODUCT, tensors, (64, 1, 1))
    assert work.operations == 2 * 128 * 512 * 256
    assert work.tensor_ops
    assert work.write_bytes == 128 * 512 * 2
    assert work.footprint_bytes == 2 * (128 * 256 + 256 * 512 + 128 * 512) + 1024
    # Eight columns of tiles read A, eight rows of tiles read B.
    assert work.read_bytes == 2 * (8 * 128 * 256 + 8 * 256 * 512) + 1024
    assert estimate(PRODUCT, tensors, (64, 4, 1)).operations == 4 * work.operations


def test_convolution() -> None:
    tensors = [
        TensorArgument("arg_X", 2 * 14 * 14 * 64 * 2, 2),
        TensorArgument("arg_W", 9 * 64 * 128 * 2, 2),
        TensorArgument("out_ptr0", 2 * 14 * 14 * 128 * 2, 2),
    ]
    work = estimate(CONVOLUTION, tensors, (13, 4, 1))
    assert work.operations == 2 * (2 * 14 * 14) * 128 * 64 * 9
    assert work.footprint_bytes == sum(t.nbytes for t in tensors)
