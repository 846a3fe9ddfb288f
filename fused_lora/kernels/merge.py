"""weight += scale * B @ A in place: fp32 product and sum, one rounding to weight's dtype."""

from math import ceil

import triton
import triton.language as tl

from . import tiles
from .launch import Layout, Plan, planned, pointers_aligned
from .primitives import accumulate, load_tile, row_order, store_tile
from .tiles import Gpu


@triton.jit
def merge_kernel(
    weight, A, B, scale_ptr,
    N, K, R,
    stride_weight_row, stride_weight_col, stride_A_row, stride_A_col, stride_B_row, stride_B_col,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of weight. Entries to which nothing is added keep their bits."""
    row, col = row_order(tl.program_id(0), K, BLOCK_N, BLOCK_K)
    delta = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    delta = accumulate(
        delta, B, A, row, col, N, K, R, 0, R, stride_B_row, stride_B_col, stride_A_row, stride_A_col, 0, 0,
        BLOCK_N, BLOCK_K, BLOCK_R, False, False, False, False, PRECISION,
    )  # fmt: skip
    delta *= tl.load(scale_ptr).to(tl.float32)
    old = load_tile(weight, row, col, N, K, stride_weight_row, stride_weight_col, BLOCK_N, BLOCK_K, False)
    new = (old.to(tl.float32) + delta).to(old.dtype)
    store_tile(
        weight, tl.where(delta == 0, old, new), row, col, N, K, stride_weight_row, stride_weight_col,
        BLOCK_N, BLOCK_K, False,
    )  # fmt: skip


def merge_(weight, A, B, scale, gpu: Gpu):
    """weight (N, K) += scale * B (N, r) @ A (r, K); all strides; A and B of one dtype, kept in it."""
    key = (Layout.of(weight), Layout.of(A), Layout.of(B), gpu)
    planned((merge_, *key, *pointers_aligned(scale)), lambda: _plan(*key)).run((), (weight, A, B, scale))


def _plan(weight: Layout, A: Layout, B: Layout, gpu: Gpu) -> Plan:
    tile = tiles.merge_tile(A.rows, gpu, max(A.dtype.itemsize, weight.dtype.itemsize))
    return Plan(
        merge_kernel,
        (ceil(weight.rows / tile.block_m) * ceil(weight.cols / tile.block_n), 1, 1),
        dict(
            BLOCK_N=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=tile.block_k, PRECISION="ieee",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        sizes=(weight.rows, weight.cols, A.rows, *weight.strides, *A.strides, *B.strides),
    )  # fmt: skip
