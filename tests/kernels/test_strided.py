"""The pointer kernels' shared loop: every edge, both widths of offsets, and what lies beyond a matrix."""

import pytest
import torch
import triton
import triton.language as tl

from fused_lora.kernels.launch import Layout, in_eights, is_wide, only_in_eights
from fused_lora.kernels.primitives import accumulate_strided, store_dense_tile
from tests.kernels.problem import DEVICE, randn

pytestmark = pytest.mark.interpreter

BLOCK_M, BLOCK_N, BLOCK_K = 32, 64, 16


@triton.jit
def product_kernel(
    lhs, rhs, out, M, N, K, k_begin,
    stride_lhs_row, stride_lhs_k, stride_rhs_k, stride_rhs_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = accumulate_strided(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), lhs, rhs, row, col, M, N, k_begin, K,
        stride_lhs_row, stride_lhs_k, stride_rhs_k, stride_rhs_col, 0, 0,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, WIDE, "", "ieee",
    )  # fmt: skip
    store_dense_tile(out, acc, row, col, M, N, BLOCK_M, BLOCK_N)


def product(lhs, rhs, k_begin=0, even_k=False, wide=False):
    (M, K), N = lhs.shape, rhs.shape[1]
    out = torch.full((M, N), float("nan"), device=DEVICE)
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))
    product_kernel[grid](
        lhs, rhs, out, M, N, K, k_begin, *lhs.stride(), *rhs.stride(), BLOCK_M, BLOCK_N, BLOCK_K, even_k, wide
    )
    return out


def inside_nan(matrix):
    """The same values in the middle of a larger matrix of NaN."""
    rows, cols = matrix.shape
    larger = torch.full((rows + 64, cols + 128), float("nan"), dtype=matrix.dtype, device=DEVICE)
    view = larger[32 : 32 + rows, 64 : 64 + cols]
    view.copy_(matrix)
    return view


def assert_close(out, lhs, rhs):
    torch.testing.assert_close(out.double(), lhs.double() @ rhs.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("M", [1, BLOCK_M - 1, BLOCK_M, BLOCK_M + 1])
@pytest.mark.parametrize("N", [1, BLOCK_N - 1, BLOCK_N, BLOCK_N + 1])
@pytest.mark.parametrize("K", [1, BLOCK_K - 1, BLOCK_K, 2 * BLOCK_K + 1])
def test_edges(M, N, K, wide):
    """One less and one more than a block in every dimension; NaN lies all around."""
    lhs, rhs = inside_nan(randn(M, K, dtype=torch.float16)), inside_nan(randn(K, N, dtype=torch.float16))
    assert_close(product(lhs, rhs, wide=wide), lhs, rhs)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_whole_number_of_steps_needs_no_mask(layout):
    lhs, rhs = randn(50, 64, dtype=torch.float16), randn(64, 70, dtype=torch.float16)
    if layout == "columns":
        lhs, rhs = lhs.T.contiguous().T, rhs.T.contiguous().T
    results = [product(lhs, rhs, even_k=even_k, wide=wide) for even_k in (False, True) for wide in (False, True)]
    assert_close(results[0], lhs, rhs)
    assert all(torch.equal(results[0], other) for other in results)


def test_a_slice_of_the_depth():
    lhs, rhs = inside_nan(randn(40, 75, dtype=torch.float16)), inside_nan(randn(75, 70, dtype=torch.float16))
    assert_close(product(lhs, rhs, k_begin=32), lhs[:, 32:], rhs[32:])


@pytest.mark.parametrize(
    ("shape", "strides", "wide"),
    [
        ((2**15, 2**15), (2**15, 1), False),
        ((2**16, 2**15), (2**15, 1), True),
        ((300, 16), (2**23, 1), True),
        ((16, 2**15), (1, 2**15), False),
        ((16, 2**17), (1, 2**15), True),
        ((4096, 64), (0, 0), False),
    ],
)
def test_when_offsets_need_64_bits(shape, strides, wide):
    assert is_wide(Layout(*shape, *strides, torch.float16, torch.device("meta"), True)) == wide


@pytest.mark.parametrize(
    ("cols", "stride", "aligned", "whole", "only"),
    [
        (1000, 1000, True, True, True),
        (1024, 1024, True, True, False),
        (24, 32, True, True, True),
        (1001, 1008, True, False, False),
        (1000, 1001, True, False, False),
        (1000, 1000, False, False, False),
    ],
)
def test_rows_of_16_byte_pieces(cols, stride, aligned, whole, only):
    layout = Layout(50, cols, stride, 1, torch.float16, torch.device("meta"), aligned)
    assert (in_eights(layout), only_in_eights(layout)) == (whole, only)
