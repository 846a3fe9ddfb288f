"""The norms of the rows of W + scale B A, which is made in registers and never stored: W is read once."""

from math import ceil

import torch
import triton
import triton.language as tl

from ..reference import SMALLEST_NORM
from .launch import Layout, Plan, planned, pointers_aligned
from .primitives import accumulate, load_tile
from .tiles import Gpu, rank_block

# Rows of a program: two programs for each of an H200's SMs where W has 4096 rows.
BLOCK_N = 16
# Ranks and columns of a step, by the bytes of an element; for more ranks than FEW half as many columns.
MOST_RANKS, COLUMNS, FEW = {2: 64, 4: 16}, {2: 256, 4: 64}, 32


@triton.jit
def row_norms_kernel(
    weight, A, B, norms, scale_ptr,
    N, K, R,
    stride_weight_row, stride_weight_col, stride_A_row, stride_A_col, stride_B_row, stride_B_col,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ONE_STEP: tl.constexpr,
    SMALLEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Where one step holds all of r there is one loop, whose loads Triton issues ahead."""
    row = tl.program_id(0) * BLOCK_N
    scale = tl.load(scale_ptr).to(tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for col in tl.range(0, K, BLOCK_K):
        own = load_tile(weight, row, col, N, K, stride_weight_row, stride_weight_col, BLOCK_N, BLOCK_K, False)
        update = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        if ONE_STEP:
            b = load_tile(B, row, 0, N, R, stride_B_row, stride_B_col, BLOCK_N, BLOCK_R, False)
            a = load_tile(A, 0, col, R, K, stride_A_row, stride_A_col, BLOCK_R, BLOCK_K, False)
            update = tl.dot(b, a, update, input_precision=PRECISION)
        else:
            update = accumulate(
                update, B, A, row, col, N, K, R, 0, R, stride_B_row, stride_B_col, stride_A_row, stride_A_col, 0, 0,
                BLOCK_N, BLOCK_K, BLOCK_R, False, False, False, False, PRECISION,
            )  # fmt: skip
        entries = own.to(tl.float32) + scale * update  # beyond K both are zero
        squares += entries * entries
    offs = row + tl.arange(0, BLOCK_N)
    tl.store(norms + offs, tl.maximum(tl.sqrt(tl.sum(squares, 1)), SMALLEST), mask=offs < N)


def row_norms(weight, A, B, scale, gpu: Gpu):
    """(N,) float32; factors in weight's dtype, all strides."""
    key = (Layout.of(weight), Layout.of(A), Layout.of(B), gpu)
    norms = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    planned((row_norms, *key, *pointers_aligned(scale)), lambda: _plan(*key)).run((), (weight, A, B, norms, scale))
    return norms


def _plan(weight: Layout, A: Layout, B: Layout, gpu: Gpu) -> Plan:
    itemsize = weight.dtype.itemsize
    block_r = rank_block(A.rows, MOST_RANKS[itemsize])
    block_k = COLUMNS[itemsize] // (2 if block_r > FEW else 1)
    return Plan(
        row_norms_kernel,
        (ceil(weight.rows / BLOCK_N), 1, 1),
        dict(
            BLOCK_N=BLOCK_N, BLOCK_K=block_k, BLOCK_R=block_r, ONE_STEP=A.rows <= block_r, SMALLEST=SMALLEST_NORM,
            PRECISION="ieee", num_warps=4, num_stages=3,
        ),
        sizes=(weight.rows, weight.cols, A.rows, *weight.strides, *A.strides, *B.strides),
    )  # fmt: skip
