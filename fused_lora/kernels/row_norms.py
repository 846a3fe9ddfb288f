"""The norms of the rows of W + scale B A, which is made in registers and never stored: W is read once.

Programs are many and short, since what counts are the bytes under way: each sums the squares of some rows in a slice of
the columns, and a second launch adds the slices in a fixed order.
"""

from math import ceil

import torch
import triton
import triton.language as tl

from ..reference import SMALLEST_NORM
from .launch import Layout, Plan, planned, pointers_aligned
from .primitives import accumulate, load_tile
from .tiles import Gpu, rank_block

BLOCK_N, STEPS = 16, (8, 4, 2, 1)  # rows of a program, and its steps over columns: fewer where programs are few
PROGRAMS_PER_SM = 4
BLOCK_K, BLOCK_R = {2: 128, 4: 32}, {2: 64, 4: 16}  # of a step, by the bytes of an element: columns, and at most ranks
BLOCK = 128  # rows of a program of the second launch


@triton.jit
def row_norms_kernel(
    weight, A, B, squares, scale_ptr,
    N, K, R, k_per_split,
    stride_weight_row, stride_weight_col, stride_A_row, stride_A_col, stride_B_row, stride_B_col,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Slice by slice of the columns; squares is (slices, N). ONE_BLOCK: all ranks are in one, and B is read once."""
    blocks = tl.cdiv(N, BLOCK_N)
    split, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    scale = tl.load(scale_ptr).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    if ONE_BLOCK:
        up = load_tile(B, row, 0, N, R, stride_B_row, stride_B_col, BLOCK_N, BLOCK_R, False)
    for col in tl.range(split * k_per_split, tl.minimum((split + 1) * k_per_split, K), BLOCK_K):
        own = load_tile(weight, row, col, N, K, stride_weight_row, stride_weight_col, BLOCK_N, BLOCK_K, False)
        if ONE_BLOCK:
            low = load_tile(A, 0, col, R, K, stride_A_row, stride_A_col, BLOCK_R, BLOCK_K, False)
            update = tl.dot(up, low, input_precision=PRECISION)
        else:
            update = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
            update = accumulate(
                update, B, A, row, col, N, K, R, 0, R, stride_B_row, stride_B_col, stride_A_row, stride_A_col, 0, 0,
                BLOCK_N, BLOCK_K, BLOCK_R, False, False, False, False, PRECISION,
            )  # fmt: skip
        entries = own.to(tl.float32) + scale * update  # beyond K both are zero
        total += entries * entries
    offs = row + tl.arange(0, BLOCK_N)
    tl.store(squares + split.to(tl.int64) * N + offs, tl.sum(total, 1), mask=offs < N)


@triton.jit
def norms_kernel(squares, norms, N, splits, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    """norms = sqrt of the sums over slices."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, splits):
        total += tl.load(squares + offs, mask=offs < N, other=0.0)
        squares += N
    tl.store(norms + offs, tl.maximum(tl.sqrt(total), SMALLEST), mask=offs < N)


def row_norms(weight, A, B, scale, gpu: Gpu):
    """(N,) float32; factors in weight's dtype, all strides."""
    key = (Layout.of(weight), Layout.of(A), Layout.of(B), gpu)
    splits, first, second = planned((row_norms, *key, *pointers_aligned(scale)), lambda: _plans(*key))
    squares = torch.empty(splits, len(weight), dtype=torch.float32, device=weight.device)
    norms = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    first.run((), (weight, A, B, squares, scale))
    second.run((), (squares, norms))
    return norms


def _plans(weight: Layout, A: Layout, B: Layout, gpu: Gpu) -> tuple[int, Plan, Plan]:
    """(slices of the columns, both launches)."""
    N, K, r = weight.rows, weight.cols, A.rows
    block_k, block_r = BLOCK_K[weight.dtype.itemsize], rank_block(r, BLOCK_R[weight.dtype.itemsize])
    blocks = ceil(N / BLOCK_N)
    wanted = blocks * ceil(K / block_k) // (PROGRAMS_PER_SM * gpu.sm_count)
    steps = next(steps for steps in STEPS if steps <= max(1, wanted))
    k_per_split = steps * block_k
    splits = ceil(K / k_per_split)
    one_block = r <= block_r
    first = Plan(
        row_norms_kernel,
        (blocks * splits, 1, 1),
        dict(
            BLOCK_N=BLOCK_N, BLOCK_K=block_k, BLOCK_R=block_r, ONE_BLOCK=one_block, PRECISION="ieee", num_warps=4,
            num_stages=3 if one_block else 2,
        ),
        sizes=(N, K, r, k_per_split, *weight.strides, *A.strides, *B.strides),
    )  # fmt: skip
    second = Plan(norms_kernel, (ceil(N / BLOCK), 1, 1), dict(SMALLEST=SMALLEST_NORM, BLOCK=BLOCK), sizes=(N, splits))
    return splits, first, second
